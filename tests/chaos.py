"""Kills, damaged inputs, two at once: nothing is lost, and nothing goes wrong in silence.

    python tests/chaos.py [--n 10] [--seed 0] [--parts record pack ...]        `make chaos`

kill     SIGKILL at a file operation: the same command then gives what an undisturbed one gave
damage   an input with a flipped bit, cut, with wrong types, absurd numbers or a pickle of code
two      a second process at the same folder: it names the first one's number, or its finished
         folder, or it waits

refused: a message that names the file, without a traceback.  handled: the undisturbed result.
lost: anything else, of which each case is printed; then the exit code is 1.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as D
import diagnostics
import evaluate
import teleop
import train

BOOM, LIMIT = "boom", 300  # a file that foreign code would make; s that a command may take
FORK = multiprocessing.get_context("fork")
WRONG = None, -1, 1e30, 10**12, float("nan"), [], {}, [[]], b"x"  # in the place of something else
TRAIN = "--preset tiny --precision fp32 --steps 3 --log_every 1 --checkpoint_every 1"
TRAIN = f"{TRAIN} --validate_every 2 --data play --out run"
EVALUATE = "--checkpoint run/agent.pt --chains 3 --limit 8 --sentences told.json --out out"


class Bomb:
    def __reduce__(self):  # what a hostile pickle does where it is loaded carelessly
        return os.system, (f"touch {BOOM}",)


# ------------------------------------------------------------------ the commands
def latents():
    world = train.load_world_model(train.load_checkpoint(Path("run/wm.pt"), "wm", "cpu"), "cpu")
    try:
        D.cache_latents(world, D.PlayData("play", "training"), "chaos")
    except (D.DataError, ValueError) as error:
        sys.exit(str(error))


# Each works in a folder that holds what the commands before it made: rec, play, run, out.
COMMANDS = {
    "record": lambda: teleop.main("record rec --frames 150 --val-frames 150 --skip 2".split()),
    "pack": lambda: D.main("pack rec play --procs 1".split()),
    "wm": lambda: train.main(f"--stage wm {TRAIN}".split()),
    "agent": lambda: train.main(f"--stage agent {TRAIN}".split()),
    "latents": latents,
    "evaluate": lambda: evaluate.main(EVALUATE.split()),
}
# What each of them reads, to be damaged; and makes. A bit of play's pictures is one pixel's.
RECORDED = "recording.json ep_start_end_ids.npy disturbed.npy sums.json episode_0000007.npz"
INPUTS = {
    "record": ["rec/training/recording.json", "rec/training/parts/00000.json"],
    "pack": [f"rec/training/{x}" for x in (*RECORDED.split(), f"{D.LANGUAGE}/auto_lang_ann.npy")],
    "wm": [f"play/{x}" for x in ("meta.json", "training/lang.json", "training/sums.json")]
    + [f"play/training/{x}.npy" for x in D.SHAPES | D.OTHERS if x not in D.CAMERAS] + ["run/wm.pt"],
    "agent": ["run/wm.pt", "run/agent.pt"],
    "latents": ["play/training/latents-chaos/h.npy", "play/training/latents-chaos/z.npy"],
    "evaluate": ["run/agent.pt", "told.json", "out/chains.jsonl", "out/calvin_results.json"],
}  # fmt: skip
FILES = {
    "record": "rec/**/*", "pack": "play/**/*", "wm": "run/wm.*", "agent": "run/agent.*",
    "latents": "play/training/latents-chaos/*", "evaluate": "out/results.json",
}  # fmt: skip


def armed(at: int, what: int) -> None:
    """From now on this process, and those that it forks, get signal `what` at operation `at` on
    the files of this folder. `count` grows by a byte at each."""
    counter, place = os.open("count", os.O_APPEND | os.O_WRONLY), f"{Path.cwd()}/"
    fsync = os.fsync

    def operation(*_) -> None:
        os.write(counter, b".")
        if os.fstat(counter).st_size == at:
            os.kill(os.getpid(), what)

    def hook(event: str, args: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        writes = writes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and isinstance(args[0], str | Path):
            if os.path.abspath(args[0]).startswith(place):
                operation()

    os.fsync = lambda descriptor: (operation(), fsync(descriptor))
    sys.addaudithook(hook)


def forked(command, log, at: int, what: int) -> None:
    os.setpgid(0, 0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    signal.alarm(LIMIT)
    multiprocessing.get_context = lambda _: FORK  # for a recorder's workers: they are counted, too
    D.BLOCK, diagnostics.probe = 32, functools.partial(diagnostics.probe, steps=5)
    armed(at, what)
    command()


def start(command, at: int = 0, what: int = signal.SIGKILL):
    """Forks a process that runs a command in this folder. Returns it, and its output's file."""
    log = tempfile.TemporaryFile("w+", errors="replace")
    Path("count").unlink(missing_ok=True)  # another process may go on with its own
    Path("count").touch()
    process = FORK.Process(target=forked, args=(command, log, at, what))
    process.start()
    return process, log


def end(process, log) -> tuple[int, str]:
    """Waits for it. Its exit code, negative of a signal, and its output."""
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers
    log.seek(0)
    return process.exitcode, log.read()


def result(name: str) -> dict[str, str]:
    """What a command made, as {file: digest}: without locks and times; of checkpoints the weights,
    of an evaluation its figures, for it also notes what a checkpoint says of its training."""
    out = {}
    for path in sorted(p for p in Path().glob(FILES[name]) if p.is_file()):
        content = path.read_bytes()
        if path.suffix == ".pt":
            content = train.identity(torch.load(path, weights_only=True)["model"]).encode()
        if path.suffix == ".jsonl":
            content = re.sub(rb'"hours": [0-9.e-]+', b"", content)
        if name == "evaluate":
            content = str([json.loads(content)[k] for k in ("success", "tasks")]).encode()
        if not path.name.startswith(".lock"):
            out[str(path)] = hashlib.sha256(content).hexdigest()
    return out


# ------------------------------------------------------------------ damage
def spoil(value, rng):
    """A copy in which one place of nested dicts and lists has something wrong, or is missing."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        value = copy.copy(value)
        keys = [*value] if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = spoil(value[key], rng)
        return value
    if isinstance(value, np.ndarray | torch.Tensor) and np.ndim(value):
        array, how = np.array(value), rng.integers(4)
        if how < 2 and array.dtype.kind == "f" and array.size:
            array.flat[rng.integers(array.size)] = (np.nan, 1e30)[how]
            return torch.from_numpy(array) if isinstance(value, torch.Tensor) else array
        return array[:-1] if how % 2 else array.astype("c16")
    return WRONG[rng.integers(len(WRONG))]


def damage(path: Path, kind: str, rng) -> None:
    """kind: flip (one bit), cut, spoil (types and numbers), or bomb (a pickle that runs code)."""
    raw, suffix, pickled = bytearray(path.read_bytes()), path.suffix, "auto_lang" in path.name
    for folder in path.parents if kind in ("spoil", "bomb") else ():
        (folder / D.SUMS).unlink(missing_ok=True)  # so that a checksum is not what finds it
    if kind == "flip":
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
    elif kind == "cut" or (kind == "bomb" and suffix.startswith(".json")):
        path.write_bytes(raw[: rng.integers(len(raw))])
    elif suffix == ".pt":
        value = torch.load(path, weights_only=True)
        torch.save(value | {"config": Bomb()} if kind == "bomb" else spoil(value, rng), path)
    elif suffix.startswith(".json"):
        rows = raw.decode().splitlines() if suffix == ".jsonl" else [raw.decode()]
        row = rng.integers(len(rows))
        rows[row] = json.dumps(spoil(json.loads(rows[row]), rng), default=lambda _: None)
        path.write_text("\n".join(rows) + "\n")
    elif suffix == ".npz":
        members = dict(np.load(path))
        key = [*members][rng.integers(len(members))]
        members[key] = np.array(Bomb()) if kind == "bomb" else spoil(members[key], rng)
        np.savez(path, **members)
    else:
        value = D.load_pickled_npy(path) if pickled else np.load(path)
        value = Bomb() if kind == "bomb" else spoil(value, rng)
        np.save(path, np.array(value, object if pickled or kind == "bomb" else None))


# ------------------------------------------------------------------ the three trials
def trial_kill(name: str, rng, n: int, base: dict):
    """Yields (verdict, what happened)."""
    for at in sorted({*np.linspace(1, base["operations"], n).round().astype(int).tolist()}):
        with scene(base["before"]):
            code, text = end(*start(COMMANDS[name], at))
            worker = code == 1 and "Traceback" not in text  # was killed
            ended = code == -signal.SIGKILL or worker
            code, text = end(*start(COMMANDS[name]))
            done = code == 0 or (name == "pack" and "play exists" in text)  # killed at its very end
            verdict = "handled" if ended and done and result(name) == base["result"] else "lost"
            yield verdict, f"{name}: killed at operation {at}: exit {code}\n{text[-800:]}"


def trial_damage(name: str, rng, n: int, base: dict):
    for file, k in itertools.product(INPUTS[name], range(n)):
        own = not (base["before"] / file).exists()  # the command goes on from what it made
        kind = ("flip", "spoil", "cut", "spoil", "bomb", "spoil")[k % 6]
        with scene(base["after" if own else "before"]):
            damage(Path(file), kind, rng)
            code, text = end(*start(COMMANDS[name]))
            path, verdict = Path(file), "lost"  # also where foreign code ran
            told = any(x in text for x in (path.name, f"{path.parent}", f"{path.parent.name}:"))
            if code == 1 and told and "Traceback" not in text and not Path(BOOM).exists():
                verdict = "refused"
            elif code == 0 and result(name) == base["result"] and not Path(BOOM).exists():
                verdict = "handled"
            yield verdict, f"{name}: {file}, {kind} ({k}): exit {code}\n{text[-800:]}"


def trial_two(name: str, rng, n: int, base: dict):
    """The first is stopped at some operation, goes on when the second one has ended."""
    for at in np.linspace(10, base["operations"] - 2, min(n, 3)).astype(int).tolist():
        with scene(base["before"]):
            first, log = start(COMMANDS[name], at, signal.SIGSTOP)
            begun, count = time.monotonic(), Path("count")
            while time.monotonic() < begun + LIMIT and count.stat().st_size < at:
                time.sleep(0.02)
            second, waits = start(COMMANDS[name]), name == "latents"
            if waits:
                time.sleep(1)
                os.killpg(first.pid, signal.SIGCONT)
            code, text = end(*second)
            os.killpg(first.pid, signal.SIGCONT)
            ended = end(first, log)[0]
            named = f"process {first.pid} on" in text or " exists. " in text  # it was done already
            good = code == 0 if waits else code == 1 and named
            good = good and ended == 0 and result(name) == base["result"]
            verdict = ("handled" if waits else "refused") if good else "lost"
            yield verdict, f"{name}: two, {at}: exits {ended}, {code}\n{text[-800:]}"


@contextlib.contextmanager
def scene(source: Path):
    """A working folder that is a copy of `source`."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        with contextlib.chdir(shutil.copytree(source, f"{folder}/work")):
            yield


def main(n: int = 10, seed: int = 0, parts: tuple[str, ...] = tuple(COMMANDS)) -> None:
    """n: kills of each command, damages of each file. parts: of COMMANDS."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    trials = {"kill": trial_kill, "damage": trial_damage, "two": trial_two}
    lost = 0
    with tempfile.TemporaryDirectory() as root:
        stage = Path(root) / "0_empty"
        stage.mkdir()
        told = {task: known[0] for task, known in evaluate.calvin.sentences().items()}
        D.write_json(stage / "told.json", told)
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
            for trial, function in trials.items() if name in parts else ():
                rng = np.random.default_rng([seed, k])
                counts = Counter()
                for verdict, what in function(name, rng, n, base):
                    counts[verdict] += 1
                    if verdict == "lost":
                        print(f"LOST: {what}", flush=True)
                print(f"{name} {trial}: {counts.total()} tried, {dict(counts)}", flush=True)
                lost += counts["lost"]
        os.chdir("/")
    sys.exit(int(lost > 0))


if __name__ == "__main__":
    tyro.cli(main)
