"""Kills, damaged inputs, two at once: nothing is lost, and nothing goes wrong in silence.

    python tests/chaos.py [--n 10] [--seed 0] [--parts record pack ...]        `make chaos`

kill     SIGKILL at one file operation of a command: the same command, repeated, gives what an
         undisturbed one gave
damage   one input is cut, or has one bit flipped, wrong types, absurd numbers or a pickle that asks
         for code: it is refused, or the result is the undisturbed one
two      a second process at the same folder: it is refused with the first one's number, or it waits

refused: a message that names the file, without a traceback.  handled: the undisturbed result.
lost: anything else, of which each case is printed; then the exit code is 1.

Every command runs in a forked process. An audit hook counts its file operations (opening to write,
renaming, removing, making folders, fsync) and ends or stops it at one of them.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as D
import diagnostics
import evaluate
import teleop
import train

BOOM, LIMIT = "boom", 300  # a file that foreign code would make; s that a command may take
WRONG = (None, "x", -1, 0, True, 1e30, 10**12, float("nan"), [], {}, [[]], ["x"])
TRAIN = ["--preset", "tiny", "--precision", "fp32", "--steps", "3", "--log_every", "1"]
TRAIN += ["--checkpoint_every", "1", "--validate_every", "2", "--data", "play", "--out", "run"]


class Bomb:
    """What a hostile pickle does where it is loaded carelessly."""

    def __reduce__(self):
        return os.system, (f"touch {BOOM}",)


# ------------------------------------------------------------------ the commands
def latents():
    play = D.PlayData("play", "training")
    world = train.load_world_model(train.load_checkpoint(Path("run/wm.pt"), "wm", "cpu"), "cpu")
    D.cache_latents(world, play, "chaos")


# Each works in a folder that holds what the commands before it made: rec, play, run, out.
COMMANDS = {
    "record": functools.partial(
        teleop.main, "record rec --frames 150 --val-frames 150 --procs 1 --skip 2".split()
    ),
    "pack": functools.partial(D.main, "pack rec play --procs 1".split()),
    "wm": functools.partial(train.main, ["--stage", "wm", *TRAIN]),
    "agent": functools.partial(train.main, ["--stage", "agent", *TRAIN]),
    "latents": latents,
    "evaluate": functools.partial(
        evaluate.main,
        "--checkpoint run/agent.pt --chains 3 --limit 8 --sentences told.json --out out".split(),
    ),
}
# What each of them reads, to be damaged. Pictures have no checksum in play/.
LANG = f"lang_{D.TEXT_ENCODER}"
INPUTS = {
    "record": [f"rec/training/{x}" for x in ("recording.json", "parts/00000.json")],
    "pack": [
        "rec/training/recording.json", "rec/training/ep_start_end_ids.npy", "rec/training/sums.json",
        "rec/training/disturbed.npy", "rec/training/episode_0000007.npz",
        f"rec/training/{LANG}/auto_lang_ann.npy",
    ],
    "wm": ["play/meta.json", "play/training/lang.json", "play/training/sums.json"]
    + [f"play/training/{k}.npy" for k in (*D.VECTORS, *D.OTHERS)] + ["run/wm.pt"],
    "agent": ["run/wm.pt", "run/agent.pt"],
    "latents": ["play/training/latents-chaos/h.npy", "play/training/latents-chaos/z.npy"],
    "evaluate": ["run/agent.pt", "told.json", "out/chains.jsonl", "out/calvin_results.json"],
}  # fmt: skip


def armed(place: str, at: int, what: int) -> None:
    """From now on this process, and those that it forks, get signal `what` at operation `at`."""
    counter = os.open("count", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    fsync = os.fsync

    def operation() -> None:
        os.write(counter, b".")
        if os.fstat(counter).st_size == at:
            os.kill(os.getpid(), what)

    def hook(event: str, args: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if event == "open":
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and isinstance(args[0], str | Path):
            if os.path.abspath(args[0]).startswith(place):
                operation()

    def counted(descriptor: int) -> None:
        operation()
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)


def start(command, at: int = 0, what: int = signal.SIGKILL) -> tuple[int, Path]:
    """Forks a process that runs a command in this folder: its number, and its output's file."""
    log = Path(tempfile.mkstemp(dir=Path.cwd().parent, suffix=".log")[1])
    Path("count").unlink(missing_ok=True)
    number = os.fork()
    if number:
        return number, log
    os.setpgid(0, 0)
    file, code = os.open(log, os.O_WRONLY), 70
    os.dup2(file, 1)
    os.dup2(file, 2)
    fork = multiprocessing.get_context("fork")  # for a recorder's workers: they are counted, too
    multiprocessing.get_context = lambda _: fork
    D.BLOCK, diagnostics.probe = 32, functools.partial(diagnostics.probe, steps=5)
    try:
        armed(f"{Path.cwd()}/", at, what)
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        print("" if isinstance(stop.code, int) else stop.code, file=sys.stderr)
    except Exception as error:
        code = 1 if isinstance(error, D.DataError | ValueError) else 70  # latents has no main
        print(f"error: {error}", file=sys.stderr)
        if code == 70:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(number: int, log: Path) -> tuple[int, str]:
    """Waits for it. Its exit code (negative: of a signal; 99: it did not end), and its output."""
    code, begun = None, time.monotonic()
    while code is None:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - begun > LIMIT:
            os.killpg(number, signal.SIGKILL)
            os.waitpid(number, 0)
            code = 99
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)  # its workers
    text = log.read_text(errors="replace")
    log.unlink()
    return code, text


def result(name: str) -> dict[str, str]:
    """What a command made, as {file: digest}; of checkpoints the weights, without times."""
    where = {"record": ["rec"], "pack": ["play"], "evaluate": ["out"]}
    where |= {"latents": ["play/training/latents-chaos"]}
    if name in ("wm", "agent"):
        files = [Path(f"run/{name}.pt"), Path(f"run/{name}.jsonl")]
    else:
        files = [p for folder in where[name] for p in Path(folder).rglob("*") if p.is_file()]
    out = {}
    for path in sorted(files):
        content = path.read_bytes()
        if path.suffix == ".pt":
            content = train.identity(torch.load(path, weights_only=True)["model"]).encode()
        if path.suffix == ".jsonl":
            content = re.sub(rb'"(hours|seconds)": [0-9.e-]+', b"", content)
        if not path.name.startswith(".lock"):
            out[str(path)] = hashlib.sha256(content).hexdigest()
    return out


# ------------------------------------------------------------------ damage
def spoil(value, rng):
    """A copy in which one place of nested dicts and lists has something wrong, or is missing."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        value = copy.copy(value)
        key = rng.choice([*value] if isinstance(value, dict) else len(value))
        key = next(k for k in (value if isinstance(value, dict) else range(len(value))) if k == key)
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = spoil(value[key], rng)
        return value
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim and rng.random() < 0.7:
        array = np.array(value)
        how = rng.integers(4)
        if how < 2 and array.dtype.kind == "f":
            array.flat[rng.integers(max(1, array.size))] = (np.nan, 1e30)[how]
            return torch.from_numpy(array) if isinstance(value, torch.Tensor) else array
        return array[:-1] if how % 2 else array.astype("U8" if array.dtype.kind == "b" else "c16")
    return WRONG[rng.integers(len(WRONG))]


def damage(path: Path, kind: str, rng) -> None:
    """kind: flip, cut, spoil or bomb."""
    raw = bytearray(path.read_bytes())
    if kind == "flip":
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        raw = raw[: rng.integers(len(raw))]
    path.unlink()  # it may be linked to others
    if kind in ("flip", "cut"):
        path.write_bytes(raw)
        return
    for folder in path.parents:  # so that a checksum is not what finds it
        (folder / D.SUMS).unlink(missing_ok=True)
    bomb, source = kind == "bomb", Path(tempfile.mkstemp()[1])
    source.write_bytes(raw)
    if path.suffix == ".pt":
        value = torch.load(source, weights_only=True)
        torch.save(value | {"config": Bomb()} if bomb else spoil(value, rng), path)
    elif path.suffix in (".json", ".jsonl"):
        rows = raw.decode().splitlines() if path.suffix == ".jsonl" else [raw.decode()]
        row = rng.integers(len(rows))
        rows[row] = pickle.dumps(Bomb(), 0).decode() if bomb else json.dumps(
            spoil(json.loads(rows[row]), rng))  # fmt: skip
        path.write_text("\n".join(rows) + "\n")
    elif path.suffix == ".npz":
        members = dict(np.load(source))
        np.savez(
            path, **(members | {"robot_obs": np.array(Bomb())} if bomb else spoil(members, rng))
        )
    else:
        try:
            value = np.load(source)
        except ValueError:
            value = D.load_pickled_npy(source)
        np.save(path, np.array(Bomb() if bomb else spoil(value, rng), object if bomb else None))
    source.unlink()


# ------------------------------------------------------------------ the three trials
def trial_kill(name: str, rng, n: int, base: dict):
    """Yields (verdict, what happened)."""
    for at in sorted({*np.linspace(1, base["operations"], n).round().astype(int).tolist()}):
        with scene(base["before"]):
            code, text = end(*start(COMMANDS[name], at))
            what = f"{name}: killed at operation {at}"
            if code == 1 and "Traceback" not in text:
                what += ", a worker's"
            elif code != -signal.SIGKILL:
                yield "lost", f"{what}: exit {code}\n{text[-800:]}"
                continue
            yield repeated(name, what, base)


def repeated(name: str, what: str, base: dict) -> tuple[str, str]:
    code, text = end(*start(COMMANDS[name]))
    if name == "pack" and "exists. Remove it" in text:  # killed after its last operation of all
        code = 0
    same = code == 0 and result(name) == base["result"]
    return ("handled", "") if same else ("lost", f"{what}: repeated: exit {code}\n{text[-800:]}")


def trial_damage(name: str, rng, n: int, base: dict):
    for file in INPUTS[name]:
        made_by_itself = file in base["result"] or file.startswith("rec/training/parts")
        for k in range(n):
            kind = ("flip", "spoil", "cut", "spoil", "bomb", "spoil")[k % 6]
            with scene(base["after" if made_by_itself else "before"]):
                if name == "record":  # it goes on: one split was not finished
                    shutil.rmtree(f"rec/training/{LANG}", ignore_errors=True)
                damage(Path(file), kind, rng)
                if name == "wm" and made_by_itself:
                    Path("run/wm_previous.pt").unlink(missing_ok=True)
                code, text = end(*start(COMMANDS[name]))
                if Path(BOOM).exists():
                    verdict = "lost", f"{name}: {file}, {kind}: it ran foreign code"
                elif code == 1 and "Traceback" not in text and named(file, text):
                    verdict = "refused", ""
                elif code == 0 and result(name) == base["result"]:
                    verdict = "handled", ""
                else:
                    verdict = "lost", f"{name}: {file}, {kind} ({k}): exit {code}\n{text[-800:]}"
                yield verdict


def named(file: str, text: str) -> bool:
    path = Path(file)
    return path.name in text or f"{path.parent.name}:" in text or str(path.parent) in text


def trial_two(name: str, rng, n: int, base: dict):
    for at in sorted({*np.linspace(8, base["operations"] - 2, min(n, 3)).astype(int).tolist()}):
        with scene(base["before"]):
            first, log = start(COMMANDS[name], at, signal.SIGSTOP)
            begun = time.monotonic()
            while Path("count").stat().st_size < at if Path("count").exists() else True:
                if time.monotonic() - begun > LIMIT:
                    break
                time.sleep(0.02)
            shutil.move("count", "first")
            second = start(COMMANDS[name])
            waits = name == "latents"
            if not waits:
                code, text = end(*second)
            os.killpg(first, signal.SIGCONT)
            one = end(first, log)
            if waits:
                code, text = end(*second)
            good = code == 0 if waits else code == 1 and f"process {first} on" in text
            Path("first").unlink()
            if good and one[0] == 0 and result(name) == base["result"]:
                yield ("handled" if waits else "refused"), ""
            else:
                yield "lost", f"{name}: two, {at}: exits {one[0]}, {code}\n{text[-800:]}"


@contextlib.contextmanager
def scene(source: Path):
    """A working folder that is a copy of `source`."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        shutil.copytree(source, f"{folder}/work")
        os.chdir(f"{folder}/work")
        try:
            yield
        finally:
            os.chdir(here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=10, help="kills of a command, damages of a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    trials = {"kill": trial_kill, "damage": trial_damage, "two": trial_two}
    rows, begun = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        stage = Path(root) / "0_empty"
        stage.mkdir()
        (stage / "told.json").write_text(json.dumps({t: f"{t} now" for t in evaluate.calvin.TASKS}))
        sentences = {t: s[0] for t, s in evaluate.calvin.sentences().items()}
        (stage / "told.json").write_text(json.dumps(sentences))
        for k, name in enumerate(COMMANDS, 1):
            after = Path(root) / f"{k}_{name}"
            shutil.copytree(stage, after)
            os.chdir(after)
            code, text = end(*start(COMMANDS[name]))
            if code:
                sys.exit(f"{name}: undisturbed, yet exit {code}\n{text}")
            base = {"operations": Path("count").stat().st_size, "result": result(name)}
            base |= {"before": stage, "after": after}
            stage = after
            for trial, function in trials.items() if name in args.parts else ():
                rng = np.random.default_rng([args.seed, k])
                rows[name, trial] = counts = Counter()
                for verdict, what in function(name, rng, args.n, base):
                    counts[verdict] += 1
                    print(f"LOST: {what}" if verdict == "lost" else "", end="", flush=True)
                print(
                    f"{name} {trial}: {dict(counts)}, {time.monotonic() - begun:.0f} s", flush=True
                )
        os.chdir("/")
    print(
        f"\n| {'part':<10} | trial  | tried | refused | handled | lost |\n|---|---|---|---|---|---|"
    )
    for (name, trial), counts in [*rows.items(), (("all", ""), sum(rows.values(), Counter()))]:
        figures = " | ".join(f"{counts[k]:>5}" for k in ("refused", "handled", "lost"))
        print(f"| {name:<10} | {trial:<6} | {counts.total():>5} | {figures} |")
    sys.exit(any(counts["lost"] for counts in rows.values()))


if __name__ == "__main__":
    main()
