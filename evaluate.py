"""Evaluation: instructions in a row by CALVIN's protocol. LUMOS Sec. V-A, Table I.

    chain      a start state and five tasks, possible in turn: the benchmark has exactly 1000
    attempt    one instruction: at most 360 simulator steps, the oracle asked after each
    Avg. Len.  tasks solved in a row before the first failure (0 to 5), averaged over chains

The simulator runs at 30 Hz; a policy trained at 15 Hz (skip = 2) looks at every second frame, and
its actions are held:   look, act   step, judge   step, judge   look, act   step, judge   ...

    python evaluate.py                                           the published policy: 20 chains
    python evaluate.py --instruction "pull out the drawer"       one sentence, filmed
    python evaluate.py --live                                    a page to play with it
    python evaluate.py --checkpoint RUN/agent.pt --chains 200 --procs 2       Table I's figures
    torchrun --nproc-per-node 8 evaluate.py --checkpoint RUN/agent.pt --device cuda

The folder --out gets chains.jsonl (a line per finished chain: the same command goes on from there),
films, results.json, and calvin_results.json in the benchmark's own layout.
"""

import argparse
import contextlib
import difflib
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import calvin
import data
import diagnostics
import pages
import sim
import teleop
import train

SHIPPED = Path(__file__).resolve().parent / "assets/sim.pt"  # by train.publish
FILM_STEPS, FILM_FPS, FILM_FRAMES = 4, 15, 240  # a picture every 4 steps, shown twice as fast
HOW = ("replan", "reset_on_replan")  # an agent's own options
RESULT = {"env": str, "seed": int, "chains": int, "success": list, "avg_len": int | float}
MARKS = {None: ("#404040", ""), True: ("#188038", ": solved"), False: ("#c5221f", ": failed")}


@dataclass(frozen=True)
class Options:
    """What is evaluated, where and how. None: see parse."""

    checkpoint: str | None = None  # agent.pt, hulc.pt, ... of train.py; None: published
    policy: str = "agent"  # agent, operator, or MODULE:CLASS of a model for CALVIN
    env: Literal["sim", "calvin"] = "sim"  # real: --robot SETUP.json and deploy.py's options
    instruction: str | None = None  # a sentence to follow where it can be done, and to film
    live: bool = False  # serve a page on this machine, to instruct the policy and watch it
    chains: int | None = None  # how many; None: all, or 20 of the published policy
    tasks: tuple[str, ...] = calvin.TASKS  # the chains' tasks; all 34: the benchmark's chains
    first: int | None = None  # the first chain, 0 to 999; of an instruction: its scene
    procs: int = 1  # processes
    device: str = "cpu"  # where the policy runs: cpu, cuda, cuda:1, ...
    out: Path | None = None  # folder of the results; None: evaluate_ENV beside the checkpoint
    seed: int = 0  # of sampled actions and plans
    limit: int = 360  # simulator steps of 1/30 s per instruction
    replan: int | None = None  # actions from plan to plan; None: the checkpoint's
    reset_on_replan: bool | None = None  # at each plan, forget what was seen; None: as above
    disturb: float = 0.0  # probability per action that the arm is pushed for 3 actions
    film: int | None = None  # film the first N chains; None: 0, or 3 of the published policy
    sentences: Path | None = None  # of the 34 tasks: a JSON file, or a dataset's validation/lang_*
    text_encoder: str | None = None  # its folder, for sentences that are not in assets/
    table: tuple[Path, ...] = ()  # only print Table I of these results.json
    figure: Path | None = None  # a PNG of --table's results over play, pushes, steps of practice
    calvin_env: Path | None = None  # clone of mees/calvin_env; None: in this folder, or installed
    scene: str = calvin.SCENE  # CALVIN's: a folder of its dataset, or a name in conf/scene
    renderer: Literal["egl", "tiny"] | None = None  # CALVIN's; None: the checkpoint's, or tiny


# ------------------------------------------------------------------ environments and policies
def make_environment(args, cameras: bool, renderer: str):
    """--env and its oracle. A model for CALVIN gets CALVIN's images; others 64 x 64 pixels."""
    small = args.policy in ("agent", "operator")
    if args.env == "sim":
        static, gripper = (64, 64) if small else (200, 84)
        return sim.PlayTable(static, gripper, cameras), sim.oracle
    shrink = data.resize_area if small else None
    table = calvin.Table(args.scene, renderer, cameras, args.calvin_env, shrink)
    return table, calvin.make_oracle(args.calvin_env)


def load_model(name: str):
    """--policy MODULE:CLASS, as CALVIN's: reset(), step(obs, sentence) -> action (7,), at 30 Hz."""
    module, _, cls = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        model = getattr(importlib.import_module(module), cls)()
    except (ImportError, AttributeError) as error:
        expected = "agent, operator or MODULE:CLASS"
        raise ValueError(f"--policy {name}: expected {expected}; {error}") from error
    return SimpleNamespace(skip=1, reset=model.reset, act=model.step)


def gpu() -> int:
    """CUDA's number of this process's GPU: torchrun's or --procs's processes share them evenly."""
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))
    return rank % max(1, torch.cuda.device_count())


def load_agent(args):
    """The policy of --checkpoint, and the checkpoint's other entries. ValueError: it was trained at
    another rate or scale, or on other pictures."""
    torch.set_num_threads(1)  # the cores are for --procs
    device = f"cuda:{gpu()}" if args.device == "cuda" else args.device
    given = {k: getattr(args, k) for k in HOW if getattr(args, k) is not None}
    policy, c = train.load_agent(args.checkpoint, device, **given)
    known = [sim.LOOK] if args.env == "sim" else calvin.RENDERERS
    seen = c["meta"]["renderer"] if c["meta"]["renderer"] in known else " or ".join(known)
    here = {"hz": 30 / policy.skip, "action_scale": [0.02, 0.05], "renderer": seen}
    train.same_kind(c, here, f"--env {args.env}")
    return policy, c


def pushes(p: float, rng: np.random.Generator):
    """--disturb p: for each action, the motion (6,) that takes the place of the arm's, or None.
    A push starts with probability p, and lasts for 3 actions."""
    while True:
        yield from [rng.uniform(-1, 1, 6)] * 3 if rng.random() < p else [None]


def attempt(env, oracle, policy, words, task: str, limit=360, push=None) -> tuple[bool, int]:
    """One instruction, from wherever the scene is now: (solved?, simulator steps taken).
    words: {task: what the policy is told}. push: as `pushes` makes them; the policy is not told."""
    policy.reset()
    start, obs = env.get_info(), env.get_obs()
    for t in range(limit):
        if t % policy.skip == 0:
            action = policy.act(obs, words[task])
            motion = next(push) if push else None
            if motion is not None:
                action = [*motion, action[6]]
        looks_next = (t + 1) % policy.skip == 0  # no pictures where the policy does not look
        obs, _, _, info = env.step(action, render=looks_next)
        if oracle(start, info, task):
            return True, t + 1
    return False, limit


# ------------------------------------------------------------------ sentences
def read_sentences(args, encoder: str | None) -> tuple[dict, dict]:
    """{task: its sentence}, {task: what the policy is told}: the embedding (384,), or without an
    encoder the sentence. They are of --sentences: {task: sentence} in JSON, a dataset's
    validation/lang_*, or its embeddings.npy alone in a folder of that name; else of --scene, if it
    is a dataset; else of assets/. DataError: unusable, or another encoder's."""
    where, words = args.sentences, {}
    if not where and args.env == "calvin" and encoder and Path(args.scene).is_dir():
        folder, name = calvin.validation(args.scene), Path(encoder).name
        known = {data.encoder_of(path.name): path for path in sorted(folder.glob("lang_*"))}
        where = known.get(name, folder / f"lang_{name}")
    if not where:
        sentences = {task: held_out for task, (held_out, *_) in calvin.sentences().items()}
    elif where.suffix == ".json":
        remedy = 'It should be {"open_drawer": "pull the drawer open", ...}'
        sentences = data.read_json(where, remedy, dict.fromkeys(calvin.TASKS, str))
    else:
        where = where.parent if where.name == "embeddings.npy" else where
        name, rows = data.encoder_of(where.name), data.read_held_out(where)
        data.same_text_encoder(name, encoder or name, where)
        sentences = dict(zip(rows["tasks"], rows["sentences"], strict=True))
        words = dict(zip(rows["tasks"], rows["embeddings"], strict=True))
    wrong = sorted(set(calvin.TASKS) ^ set(sentences))
    if wrong:
        raise data.DataError(f"{where}: {wrong} are missing in it, or no tasks of CALVIN's 34.")
    if encoder and not words:
        try:
            words = dict(zip(sentences, data.encode([*sentences.values()], encoder), strict=True))
        except data.DataError as error:
            raise data.DataError(f"{where}: {error}") from error
    return sentences, words if encoder else sentences


def is_here(encoder: str) -> bool:
    """Whether a text encoder is on this machine. Asking is quick, trying takes a minute."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    hub = f"sentence-transformers/{Path(encoder).name}"
    return Path(encoder).is_dir() or bool(try_to_load_from_cache(hub, "modules.json"))


def embed_instruction(sentence: str, encoder: str) -> np.ndarray:
    """(384,). ValueError: it is not in the table, and the text encoder is not on this machine.
    DataError: the encoder fails."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nobody waits for a hub that does not answer
    name, short = Path(encoder).name, calvin.plain(sentence)
    known = short in data.embedding_table()
    if known or is_here(encoder):
        return data.encode([short if known else sentence], encoder)[0]
    told = [s for of_task in calvin.sentences().values() for s in of_task]
    near = "\n  ".join(difflib.get_close_matches(short, told, 5, cutoff=0))
    what = f"{sentence!r} is not known, and {name} is not here. The nearest known ones:"
    way = f"hf download sentence-transformers/{name}, or give --text-encoder FOLDER/{name}"
    raise ValueError(f"{what}\n  {near}\nFor others: pip install sentence-transformers, then {way}")


# ------------------------------------------------------------------ films
class Filmed:
    """An environment that keeps what its cameras see if `film` is a path."""

    def __init__(self, env, film: Path | None):
        self.env, self.film, self.frames, self.caption, self.t = env, film, [], "", 0

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action, render: bool = True):
        out, self.t = self.env.step(action, render=render), self.t + 1
        if self.t % FILM_STEPS == 0:
            self.snap()
        return out

    def snap(self, solved: bool | None = None):
        """Keep a picture; where an attempt ends, for half a second."""
        if self.film:
            rgb = self.env.get_obs()["rgb_obs"]
            frame = (rgb["rgb_static"], rgb["rgb_gripper"], self.caption, solved)
            self.frames += [frame] * (1 if solved is None else FILM_FPS // 2)

    def save(self):
        """Write a GIF; a long one is thinned."""
        frames = self.frames[:: math.ceil(len(self.frames) / FILM_FRAMES)]
        frames = np.stack([draw(*frame) for frame in frames])
        diagnostics.write_film(self.film, frames, FILM_FPS)


def draw(static, gripper, caption: str, solved: bool | None) -> np.ndarray:
    """What the policy sees, enlarged to 256 pixels, under its instruction: (304, 520, 3) uint8."""
    colour, word = MARKS[solved]
    picture = Image.new("RGB", (520, 304), colour)
    for x, image in ((2, static), (262, gripper)):
        large = Image.fromarray(image).resize((256, 256), Image.Resampling.NEAREST)
        picture.paste(large, (x, 46))
    ImageDraw.Draw(picture).text((8, 13), caption + word, "white", ImageFont.load_default(15))
    return np.asarray(picture)


# ------------------------------------------------------------------ figures and records
def summarise(records: list[dict]) -> dict:
    """Table I's figures: shares with 1..5 or more in a row, mean length, rates per task."""
    lengths = np.array([r["solved"] for r in records])
    solved = Counter(task for r in records for task in r["tasks"][: r["solved"]])
    tried = Counter(task for r in records for task in r["tasks"][: r["solved"] + 1])
    return {
        "chains": len(records), "avg_len": lengths.mean().item(),
        "success": [float((lengths >= n).mean()) for n in range(1, 6)],
        "tasks": {task: [solved[task], tried[task]] for task in calvin.TASKS if tried[task]},
        "lengths": lengths.tolist(),  # of each chain: two policies are compared chain by chain
    }  # fmt: skip


def tables(result: dict) -> str:
    """The rates of the tasks with their sentences, then a row laid out like the paper's Table I."""
    lines = []
    for task, (ok, n) in result["tasks"].items():
        lines.append(f"{task:<25}{f'{ok}/{n}':>8}{ok / n:>8.1%}  {result['sentences'][task]}")
    form = "{:<15} " + 5 * "{:<9}" + "{}"
    shares = [f"{share:.1%}" for share in result["success"]]
    lines += ["", f"{'':<16}No. Instructions in a Row ({result['chains']} chains)"]
    lines += [form.format("Method", *"12345", "Avg. Len.")]
    return "\n".join([*lines, form.format(result["label"], *shares, f"{result['avg_len']:.2f}")])


def read_result(path: Path) -> dict:
    """A results.json, with what table and figure need. DataError: unusable."""
    r = data.read_json(path, "Give another", RESULT)
    with data.naming(path, "Give the results.json of evaluate.py"):
        if not np.isfinite([*r["success"], r["avg_len"]]).all():
            raise ValueError("a figure is not finite")
    return r


def table_of_seeds(paths: list[Path]) -> str:
    """Table I from several results.json: a row for each environment, method, number of steps and of
    chains, with mean ± sample deviation over its seeds. DataError: unusable, or a seed twice."""
    rows: dict[tuple, dict[int, list[float]]] = {}
    for path in paths:
        r = read_result(path)
        with data.naming(path, "Give the results.json of evaluate.py, each seed once"):
            figures = [*(100 * share for share in r["success"]), r["avg_len"]]
            step = r.get("training", {}).get("step", "")  # the operator has none
            seeds = rows.setdefault((r["env"], r.get("label", r["method"]), step, r["chains"]), {})
            if r["seed"] in seeds:
                raise ValueError(f"seed {r['seed']} comes twice")
            seeds[r["seed"]] = figures
    form = "{:<8}{:<22}{:<8}{:<8}{:<7}" + 5 * "{:<14}" + "{}"
    lines = [form.format("Env.", "Method", "Steps", "Chains", "Seeds", *"12345", "Avg. Len.")]
    for key, seeds in rows.items():
        cells = []
        for i, x in enumerate(np.array([*seeds.values()]).T):  # six figures of each seed
            digits, unit = (1, "%") if i < 5 else (2, "")
            spread = f" ± {x.std(ddof=1):.{digits}f}" if len(x) > 1 else ""
            cells.append(f"{x.mean():.{digits}f}{spread}{unit}")
        lines.append(form.format(*key, len(seeds), *cells))
    return "\n".join(lines)


def as_calvin(result: dict) -> dict:
    """The same figures in the layout of the benchmark's results.json: {training step: figures}."""
    tasks = {task: {"success": ok, "total": n} for task, (ok, n) in result["tasks"].items()}
    rates = dict(zip("12345", result["success"], strict=True))
    figures = {"avg_seq_len": result["avg_len"], "chain_sr": rates, "task_info": tasks}
    return {str(result.get("training", {}).get("step", 0)): figures}


def read_log(folder: Path, identity: dict, name: str = "chains*.jsonl") -> dict[int, dict]:
    """Finished chains by number. DataError: a damaged line. ValueError: another evaluation's."""
    rows, remedy = {}, "Remove the line, whose chain runs again, or give another --out"
    for path in sorted(folder.glob(name)):
        for n, line in enumerate(path.read_bytes().splitlines(), 1):
            with data.naming(f"{path}: line {n} is damaged", remedy):
                row = dict(json.loads(line))
                if n > 1:
                    check_row(row)
                rows[row["chain"] if n > 1 else "identity"] = row
        was = rows.pop("identity", identity)
        changed = [k for k in was | identity if was.get(k) != identity.get(k)]
        if changed:
            text = [f"{k} was {was.get(k)!s:.99} and is {identity.get(k)!s:.99}" for k in changed]
            raise ValueError(f"{path} is another evaluation's ({'; '.join(text)}). Another --out?")
    return rows


def check_row(row: dict) -> None:
    """ValueError, TypeError: a chain's row is damaged. Takes away its checksum, if it has one."""
    crc, steps = row.pop("crc", None), row["steps"]
    if crc is not None and crc != data.checksum(row):
        raise ValueError("its checksum is wrong")
    if not all(isinstance(x, int) for x in (row["chain"], row["solved"], *steps)):
        raise TypeError("chain, solved and steps are whole numbers")
    known = set(row["tasks"]) <= set(calvin.TASKS)
    if row["solved"] not in (len(steps) - 1, len(steps)) or not known:
        raise ValueError("solved, steps and tasks do not belong together")


# ------------------------------------------------------------------ running
class Worker:
    """What one process owns: an environment, its oracle, and a policy unless the operator acts."""

    def __init__(self, args):
        self.args, self.policy, self.trained = args, None, {}
        encoder, renderer = None, args.renderer or "tiny"
        about = {k: getattr(args, k) for k in ("env", "seed", "checkpoint", "limit", "disturb")}
        about |= {"method": args.policy, "evaluation_seed": args.seed}
        if args.checkpoint:
            self.policy, c = load_agent(args)
            encoder, renderer = args.text_encoder or c["text_encoder"], c["meta"]["renderer"]
            data.same_text_encoder(encoder, c["text_encoder"], args.checkpoint)
            about |= {"method": c["method"], "seed": c["run"]["seed"]}
            about |= {k: getattr(self.policy, k, None) for k in HOW}
            about |= {"training": {k: c[k] for k in ("step", "seconds", "run", "meta")}}
            self.trained = {k: c[k] for k in ("frames", "config") if k in c}  # for --figure
        elif args.policy != "operator":
            self.policy = load_model(args.policy)
        if args.env == "calvin":
            about |= {"scene": args.scene, "renderer": renderer}
        about["label"] = about["method"] + (f" (disturb {args.disturb})" if args.disturb else "")
        if args.tasks != calvin.TASKS:
            about |= {"among": args.tasks, "label": f"{about['label']} ({len(args.tasks)} tasks)"}
        self.sentences, self.words = read_sentences(args, encoder)
        self.about = json.loads(json.dumps(about | {"sentences": self.sentences}))
        self.embed = partial(embed_instruction, encoder=encoder) if encoder else str
        if args.instruction:
            self.words = self.words | {args.instruction: self.embed(args.instruction)}
        cameras = bool(self.policy or args.film or args.live)
        self.env, self.oracle = make_environment(args, cameras, renderer)

    def start(self, number: int, film: Path | None, oracle=None):
        """A chain's first scene: (environment, function(task, limit) that tries a task in it)."""
        env, rng = Filmed(self.env, film), np.random.default_rng((self.args.seed, number))
        env.reset(*calvin.start_pose(calvin.chain(number)[0]))
        if self.policy is None:
            return env, partial(teleop.attempt, env, oracle or self.oracle)
        torch.manual_seed(int(rng.integers(2**63)))  # neither order nor process matters
        push = pushes(self.args.disturb, rng) if self.args.disturb else None
        return env, partial(attempt, env, oracle or self.oracle, self.policy, self.words, push=push)

    def run_chain(self, number: int, film: Path | None) -> dict:
        """One chain to its first failure: what chains.jsonl keeps of it."""
        env, try_task = self.start(number, film)
        tasks, steps = calvin.chain(number, self.args.tasks)[1], []
        for k, task in enumerate(tasks):
            env.caption = f"{k + 1}/5  {self.sentences[task]}"
            env.snap()
            ok, n = try_task(task, self.args.limit)
            env.snap(solved=ok)
            steps.append(n)
            if not ok:
                break
        if film:
            env.save()
        return {"chain": number, "solved": len(steps) - (not ok), "tasks": tasks, "steps": steps}


def evaluate(args, argv: list[str]) -> dict:
    """Runs the chains that are not on record yet, prints the tables, writes results.json.
    Each process has its share and a log of its own; torchrun or --procs starts the others."""
    worker, others, parent = Worker(args), [], os.getppid()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    started_here = range(1, args.procs) if ranks == 1 else ()
    ranks = max(ranks, len(started_here) + 1)
    log = args.out / (f"chains_{rank}.jsonl" if rank else "chains.jsonl")
    numbers = range(args.first or 0, (args.first or 0) + args.chains)
    films = {n: args.out / f"chain_{n:04}.gif" for n in numbers[: args.film]}
    logged = partial(read_log, args.out, worker.about)
    records, mine, result, begun = logged(), logged(log.name), {}, time.monotonic()
    unfilmed = {n for n, film in films.items() if not film.exists()}
    todo = [n for n in numbers[rank::ranks] if n not in records or n in unfilmed]
    try:
        for r in started_here:
            share = os.environ | {"RANK": str(r), "WORLD_SIZE": str(ranks)}
            command = [sys.executable, __file__, *argv]  # a session of its own: Ctrl-C ends us
            others.append(subprocess.Popen(command, env=share, start_new_session=True))
        for n in tqdm(todo, unit="chain", position=rank):
            record = worker.run_chain(n, films.get(n))
            if rank and os.getppid() != parent:
                raise SystemExit("evaluate.py: the first process was killed")
            if n not in records:  # else only its film was missing
                mine[n] = record
                rows = [row | {"crc": data.checksum(row)} for row in mine.values()]
                lines = [json.dumps(row) + "\n" for row in (worker.about, *rows)]
                data.write_text(log, "".join(lines))  # and renamed: no line is ever half written
        if any(other.wait() for other in others):
            raise RuntimeError("another process failed: see above. The same command goes on")
        while rank == 0 and not logged().keys() >= set(numbers):
            time.sleep(1)  # for torchrun's other processes
    finally:  # after Ctrl-C too: the tables so far
        for other in others:
            other.terminate()
        done = [row for n, row in sorted(logged().items()) if n in numbers]
        if rank == 0 and done:
            result = worker.about | summarise(done) | {"commit": pages.commit()}
            if worker.trained:
                result["training"] = result["training"] | worker.trained
            print(tables(result))
            theirs = args.out / "calvin_results.json"  # it accumulates, a training step a key
            old = data.read_json(theirs, "Remove it") if theirs.exists() else {}
            data.write_json(theirs, old | as_calvin(result))
            data.write_json(args.out / "results.json", result)
            pages.report(args.out, "evaluation", asdict(args), time.monotonic() - begun)
            left = "" if len(done) == args.chains else "; the same command goes on from here"
            print(f"{len(done)} of {args.chains} chains: {args.out / 'results.json'}{left}")
            print(f"to look at: {args.out / 'report.html'}")
    return result


def follow(args) -> dict[str, int]:
    """Films --instruction. Returns {task: step it was seen at}. ValueError: it cannot be done."""
    sentence, known = calvin.plain(args.instruction), calvin.sentences().items()
    task = next((task for task, told in known if sentence in map(calvin.plain, told)), None)
    states = calvin.start_states() if args.first is None else [calvin.chain(args.first)[0]]
    states = [state for state in states if not task or calvin.outcomes(state, task)]
    if not states:
        already = args.first is not None and task.startswith(("turn", "move", "open", "close"))
        why = "it is so already" if already else "something else has to be done before"
        raise ValueError(f"{args.instruction!r} asks for {task}: {why}")
    number = args.first or next(n for n in range(1000) if calvin.chain(n)[0] in states)
    worker, seen, stem = Worker(args), {}, re.sub(r"\W+", "_", sentence)[:60]
    films = (args.out / f"{stem}_{k}.gif" for k in itertools.count())
    film = next(path for path in films if not path.exists())

    def oracle(start, info, _) -> bool:
        for each in calvin.TASKS:
            if each not in seen and worker.oracle(start, info, each):
                seen[each] = env.t
        return task in seen

    env, try_task = worker.start(number, film, oracle)
    env.caption = args.instruction
    try_task(args.instruction, args.limit)
    env.snap(solved=task in seen if task else None)
    env.save()
    pages.report(args.out, "instruction", asdict(args))
    print(*[f"{name} at step {step}" for name, step in seen.items()], f"film: {film}", sep="\n")
    print(f"to look at: {args.out / 'report.html'}")
    verdict = "done" if task in seen else "not done" if task else f"{len(seen)} of 34 tasks seen"
    print(f"scene of chain {number}, {env.t} steps ({env.t / 30:.1f} s): {verdict}")
    return seen


# ------------------------------------------------------------------ command line
def parse(argv: list[str] | None = None) -> Options:
    """The command line, with the defaults that depend on it. ValueError: it makes no sense."""
    how = {"use_underscores": True, "config": (tyro.conf.FlagCreatePairsOff,)}
    args = tyro.cli(Options, args=argv, description=__doc__, **how)
    first, told = args.first or 0, calvin.plain(args.instruction or "")
    ours = args.policy == "agent" and args.env == "sim" and not args.checkpoint  # a first look
    checkpoint = str(SHIPPED) if ours else args.checkpoint
    chains = args.chains if args.chains is not None else 20 if ours else 1000 - first
    film = args.film if args.film is not None else 3 if ours else 0
    run = Path(checkpoint).parent if checkpoint else Path("runs") / args.policy
    in_tree = run.resolve() == SHIPPED.parent  # where nothing is written
    out = Path("runs/first_look") if in_tree else run / f"evaluate_{args.env}"
    args = replace(args, checkpoint=checkpoint, chains=chains, film=film, out=args.out or out)
    agent, operator = bool(checkpoint), args.policy == "operator"
    planned = any(getattr(args, k) is not None for k in HOW)
    n = 1 if told else chains
    wrong = {
        "give --checkpoint RUN/agent.pt, or another --policy": (args.policy == "agent") != agent,
        "--instruction: give a sentence": args.instruction is not None and not told,
        "operator: neither --instruction nor --disturb": operator and (told or args.disturb),
        "--replan, --reset_on_replan: they are an agent's": planned and not agent,
        "--renderer: a checkpoint needs that of its data": agent and args.renderer,
        f"there are chains 0 to 999, not {n} from {first} on": not 0 <= first < first + n <= 1000,
        "--disturb: a probability is 0 to 1": not 0 <= args.disturb <= 1,
        "--figure: give results.json files to --table": args.figure and not args.table,
        "--tasks: they are of chains": args.tasks != calvin.TASKS and (told or args.live),
    }
    for name, least in (("procs", 1), ("limit", 1), ("film", 0), ("seed", 0), ("replan", 1)):
        number = getattr(args, name)
        wrong[f"--{name} {number}: at least {least}"] = number is not None and number < least
    calvin.check(*args.tasks)
    if any(wrong.values()):
        raise ValueError(next(text for text, is_so in wrong.items() if is_so))
    return args


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    robot = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    robot.add_argument("--env")
    robot.add_argument("--robot", default="SETUP.json")
    known, rest = robot.parse_known_args(argv)
    if known.env == "real":
        import deploy

        return deploy.main(["rollouts", known.robot, *rest])
    with data.command("evaluate.py", RuntimeError, ImportError):
        args = parse(argv)
        if args.figure:
            return pages.stress({path: read_result(path) for path in args.table}, args.figure)
        if args.table:
            return print(table_of_seeds(args.table))
        if args.live:
            return pages.live(Worker(args))
        args.out.mkdir(parents=True, exist_ok=True)
        first = os.environ.get("RANK", "0") == "0"  # it keeps others out of the folder
        with data.locked(args.out) if first else contextlib.nullcontext():
            return follow(args) if args.instruction else evaluate(args, argv)


if __name__ == "__main__":
    main()
