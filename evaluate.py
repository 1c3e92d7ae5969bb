"""Evaluation: instructions in a row by CALVIN's protocol. LUMOS Sec. V-A, Table I.

    chain      a start state and five tasks, possible in turn: the benchmark has exactly 1000
    attempt    one instruction: at most 360 simulator steps, the oracle asked after each of them
    Avg. Len.  tasks solved in a row before the first failure (0 to 5), averaged over chains

The simulator runs at 30 Hz; a policy trained at 15 Hz (skip = 2) looks at every second frame, and
its actions are held:   look, act   step, judge   step, judge   look, act   step, judge   ...

    python evaluate.py                              a first look: our policy, 20 chains, a film
    python evaluate.py --checkpoint RUN/agent.pt --chains 200 --procs 2 --out DIR [--film 3]
    python evaluate.py --checkpoint RUN/agent.pt --instruction "pull out the drawer" --out DIR
    python evaluate.py --policy operator --chains 200 --procs 2 --out DIR
    torchrun --nproc-per-node 8 evaluate.py --checkpoint RUN/agent.pt --device cuda --out DIR
    python evaluate.py --env dream --checkpoint RUN/agent.pt --chains 200 --out DIR    (Table II)
    python evaluate.py --checkpoint RUN/wm.pt --predict data/play --out DIR             (Fig. 3)
    python evaluate.py --env real --robot SETUP.json --checkpoint RUN/agent.pt --out DIR [--dream]
    python evaluate.py --env calvin --scene task_D_D --checkpoint RUN/agent.pt --out DIR
    python evaluate.py --table DIR/results.json ...    Table I of several seeds' runs
    python evaluate.py --chains-json FILE     all 1000 chains and start states, to compare

DIR gets chains.jsonl (a line per finished chain: the same command goes on from there), films,
results.json, and calvin_results.json in the benchmark's own layout. Another environment is one more
function in ENVIRONMENTS. Needs: all of the project.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import calvin
import sim
import teleop

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "assets/sim.pt"  # by train.publish
TABLETOP = HERE / "assets/tabletop.json"  # the real robot's tasks
LIMIT = 360  # simulator steps per instruction: 12 s
FILM_STEPS, FILM_FPS, FILM_FRAMES = 4, 15, 240  # a picture every 4 steps, shown twice as fast
MARKS = {None: ("#404040", ""), True: ("#188038", ": solved"), False: ("#c5221f", ": failed")}


# ------------------------------------------------------------------ environments and policies
def make_sim(cameras: bool, args):
    """The embedded play table and its oracle."""
    return sim.PlayTable(static_size=64, gripper_size=64, render=cameras), sim.oracle


def make_calvin(cameras: bool, args):
    """CALVIN's own simulator and oracle; images are shrunk as data.py does when it packs."""
    import data

    return calvin.make(cameras, args, data.resize_area)


# name: function(cameras, args of the command line) -> (environment, oracle)
ENVIRONMENTS = {"sim": make_sim, "calvin": make_calvin, "dream": make_sim}
# What a checkpoint's data must agree with, hz times skip being the simulator's rate.
MUST_AGREE = {"sim": {"hz x skip": 30, "action_scale": [0.02, 0.05], "renderer": sim.LOOK}}
MUST_AGREE["dream"] = MUST_AGREE["sim"]
MUST_AGREE["calvin"] = {"hz x skip": 30, "action_scale": [0.02, 0.05]}  # it can render as both do


def load_policy(path, device: str, sample: bool, env: str):
    """The policy of a checkpoint and the checkpoint's other entries; ValueError: not for `env`."""
    import torch

    import train

    torch.set_num_threads(1)  # the cores are for --procs
    policy, checkpoint = train.load_agent(path, device, sample)
    policy.seed = torch.manual_seed  # whence its samples come
    have = {"frame": "base"} | checkpoint["meta"]  # only other frames are named
    have |= {"hz x skip": round(have["hz"] * policy.skip, 6)}
    for key, want in MUST_AGREE[env].items():
        if have[key] != want:
            what = f"{path} was trained on data with {key} {have[key]}, --env {env} has {want}"
            raise ValueError(f"{what}: pack data that agrees, and train on that.")
    return policy, checkpoint


def load_judge(args, world, checkpoint: dict):
    """Who judges the dream, and its short name. It is trained once, on the policy's own data."""
    import torch

    import data
    import dream
    import train

    play = data.PlayData(args.data or checkpoint["run"]["data"], "training")
    if play.meta != checkpoint["meta"]:
        raise ValueError(f"{play.path}: {play.meta}, but the policy: {checkpoint['meta']}; --data?")
    about = f"{play.path.resolve()} {len(play)}".encode() + Path(dream.__file__).read_bytes()
    about += Path(sim.__file__).read_bytes()  # whose oracle labels what it learns from
    key = train.identity(world.state_dict() | {"": torch.tensor([*about])})
    path = args.out / f"judge_{key}.pt"
    if not path.exists():
        env = sim.PlayTable(render=False)
        judge = dream.train_judge(world, play, env, sim.oracle, calvin.TASKS)
        env.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        train.save_checkpoint(path, {"tasks": judge.tasks, "model": judge.state_dict()})
    saved = torch.load(path, map_location=args.device, weights_only=True)
    judge = dream.Judge(world.config.latent, saved["tasks"]).to(args.device)
    judge.load_state_dict(saved["model"])
    return judge.eval(), key


def read_sentences(args, encoder: str) -> dict[str, tuple]:
    """Sentences that replace those of assets/: {task: (sentence, embedding (384,) or None)}.

    From --sentences: {task: sentence} in JSON, or a language folder of a dataset's validation/,
    which is the default where --scene is a dataset. DataError: unusable, or of another encoder.
    """
    import data

    where, tasks = args.sentences, set(calvin.TASKS)
    if where and where.suffix == ".json":
        with data.naming(where, 'It should be {"open_drawer": "pull the drawer open", ...}'):
            told = {task: (s, None) for task, s in json.loads(where.read_text()).items()}
    elif where or (args.env == "calvin" and Path(args.scene).is_dir()):
        where = where or Path(args.scene) / "validation" / f"lang_{encoder}"
        data.same_text_encoder(where.name.removeprefix("lang_"), encoder, where)
        rows = data.read_held_out(where)
        told = zip(rows["sentences"], rows["embeddings"], strict=True)
        told = dict(zip(rows["tasks"], told, strict=True))
    else:
        return {}
    if missing := sorted(tasks ^ set(told)):
        raise data.DataError(f"{where}: {missing} are missing in it, or no tasks of CALVIN's 34.")
    return told


def attempt(env, oracle, policy, embeddings, task: str, limit: int = LIMIT) -> tuple[bool, int]:
    """One instruction, from wherever the scene is now: (solved?, simulator steps taken)."""
    policy.reset()
    start, obs = env.get_info(), env.get_obs()
    for t in range(limit):
        if t % policy.skip == 0:
            action = policy.act(obs, embeddings[task])
        looks_next = (t + 1) % policy.skip == 0  # no pictures where the policy does not look
        obs, _, _, info = env.step(action, render=looks_next)
        if oracle(start, info, task):
            return True, t + 1
    return False, limit


# ------------------------------------------------------------------ films
class Filmed:
    """An environment that keeps what its cameras see if `film` is a path, whoever drives it."""

    def __init__(self, env, film: Path | None, every: int = FILM_STEPS):
        self.env, self.film, self.frames, self.caption, self.t = env, film, [], "", 0
        self.every = every

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action, render: bool = True):
        out, self.t = self.env.step(action, render=render), self.t + 1
        if self.t % self.every == 0:
            self.snap()
        return out

    def snap(self, solved: bool | None = None):
        """Keep a picture; where an attempt ends, for half a second."""
        if self.film:
            rgb = self.env.get_obs()["rgb_obs"]
            frame = (rgb["rgb_static"], rgb["rgb_gripper"], self.caption, solved)
            self.frames += [frame] * (1 if solved is None else FILM_FPS // 2)

    def save(self):
        """Write a GIF or MP4; a long one is thinned, but not the ends of the attempts."""
        if self.film and self.frames:  # none: it ended before its first step
            import imageio.v3 as imageio

            thin = -(-len(self.frames) // FILM_FRAMES)
            frames = [f for i, f in enumerate(self.frames) if i % thin == 0 or f[3] is not None]
            rate = {".gif": {"duration": 1000 // FILM_FPS, "loop": 0}, ".mp4": {"fps": FILM_FPS}}
            frames, kind = np.stack([draw(*f) for f in frames]), self.film.suffix
            film = imageio.imwrite("<bytes>", frames, extension=kind, **rate[kind])
            write(self.film, lambda part: part.write_bytes(film))


def draw(static, gripper, caption: str, solved: bool | None) -> np.ndarray:
    """What the policy sees, four times larger, under its instruction: (304, 520, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

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
    solved, tasks = np.array([r["solved"] for r in records]), {}
    for r in records:
        for k, task in enumerate(r["tasks"][: r["solved"] + 1]):
            ok, n = tasks.get(task, (0, 0))
            tasks[task] = [ok + (k < r["solved"]), n + 1]
    tasks = {task: tasks[task] for task in calvin.TASKS if task in tasks}  # [solved, attempted]
    success = [float((solved >= n).mean()) for n in range(1, 6)]
    length = solved.mean().item()
    return {"chains": len(records), "avg_len": length, "success": success, "tasks": tasks}


def tables(result: dict) -> str:
    """The rates of the tasks, then a row laid out like the paper's Table I."""
    rates = [f"{t:<28}{f'{ok}/{n}':>9}{ok / n:>9.1%}" for t, (ok, n) in result["tasks"].items()]
    head = f"{'':<16}No. Instructions in a Row ({result['chains']} chains)"
    names = f"{'Method':<16}{'1':<9}{'2':<9}{'3':<9}{'4':<9}{'5':<9}Avg. Len."
    row = f"{result['method']:<16}" + "".join(f"{f'{s:.1%}':<9}" for s in result["success"])
    return "\n".join([*rates, "", head, names, f"{row}{result['avg_len']:.2f}"])


def table_of_seeds(paths: list[Path]) -> str:
    """Table I from the results.json of several runs: a row for each environment, method, number of
    training steps and of chains, with mean and standard deviation over its seeds. SystemExit
    names a file that is none of them."""
    rows: dict[tuple, dict[int, list[float]]] = {}
    for path in paths:
        try:
            r = json.loads(path.read_text())
            steps = str(r.get("training", {}).get("step", ""))  # the operator has none
            seeds = rows.setdefault((r["env"], r["method"], steps, str(r["chains"])), {})
            a, b, c, d, e = (100 * x for x in r["success"])
            if r["seed"] in seeds:
                raise ValueError(f"seed {r['seed']} comes twice, give one of the two")
            seeds[r["seed"]] = [a, b, c, d, e, 1.0 * r["avg_len"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            what = f"{path} is no results.json of evaluate.py, or not wanted here"
            raise SystemExit(f"{what}: {type(error).__name__} {error}.") from error
    table = [["Env.", "Method", "Steps", "Chains", "Seeds", "1", "2", "3", "4", "5", "Avg. Len."]]
    for key, seeds in rows.items():
        cells, n = [], len(seeds)
        for i, x in enumerate(np.array([*seeds.values()]).T):  # six figures of n seeds
            form = "{:.2f}" if i == 5 else "{:.1f}"
            spread = [form.format(x.std(ddof=1))] if n > 1 else []
            cells.append(" ± ".join([form.format(x.mean()), *spread]) + "%" * (i < 5))
        table.append([*key, str(n), *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
    return "\n".join(lines)


def as_calvin(result: dict) -> dict:
    """The same figures in the layout of the benchmark's results.json: {training step: figures}."""
    tasks = {task: {"success": ok, "total": n} for task, (ok, n) in result["tasks"].items()}
    rates = {str(i): share for i, share in enumerate(result["success"], 1)}
    step = result.get("training", {}).get("step", 0)
    return {str(step): {"avg_seq_len": result["avg_len"], "chain_sr": rates, "task_info": tasks}}


def write_chains(path: Path) -> None:
    """All 1000 chains with the benchmark's names of things, for anyone to compare."""
    out = []
    for state, tasks in map(calvin.chain, range(1000)):
        robot_obs, scene_obs = (x.tolist() for x in calvin.start_pose(state))
        start = state._asdict() | {"grasped": 0}
        out.append({"initial_state": start, "tasks": tasks, "robot_obs": robot_obs})
        out[-1]["scene_obs"] = scene_obs
    write_json(path, out)


@contextlib.contextmanager
def writing(path: Path):
    """A disk that is full, or may not be written, ends the run with the file and the remedy."""
    try:
        yield
    except OSError as error:
        what = f"evaluate.py: cannot write {path}: {error.strerror or error}"
        remedy = "Make room, or correct the path, and repeat the command: it goes on"
        raise SystemExit(f"{what}. {remedy}.") from error


def write(path: Path, fill) -> None:
    """fill(part) writes beside, then it is renamed: the file is old or new, never half of one."""
    part = path.with_name(f"part_{path.name}")
    with writing(path):
        try:
            fill(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, content, indent: int | None = 1) -> None:
    write(path, lambda part: part.write_text(json.dumps(content, indent=indent) + "\n"))


def read_log(path: Path, identity: dict, ours: bool = True) -> dict[int, dict]:
    """Finished chains by number. Ours to write: starts it, and cuts off a half-written line."""
    text = path.read_text(errors="surrogateescape") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole and not ours:
        return {}
    if not whole:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity) + "\n")
        return {}
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            json.loads(line.encode())["chain" if n > 1 else "env"]
        except (ValueError, TypeError, KeyError) as error:
            remedy = "Remove it: its chain runs again" if n > 1 else "Give another --out"
            raise SystemExit(f"{path}: line {n} is damaged ({error}). {remedy}.") from error
    if ours:
        os.truncate(path, len(whole.encode()))
    was, *records = map(json.loads, whole.splitlines())
    if was != (identity := json.loads(json.dumps(identity))):
        keys = [k for k in was | identity if was.get(k) != identity.get(k)]
        changes = ", ".join(f"{k} was {was.get(k)!r} and is {identity.get(k)!r}" for k in keys)
        raise SystemExit(f"{path} holds another evaluation: {changes}. Give another --out.")
    return {r["chain"]: r for r in records}


# ------------------------------------------------------------------ the real robot (Sec. V-B)
def operator_says(start, info, task) -> bool:
    """The real robot's oracle: the operator pressed s."""
    return info["operator"] == "success"


def read_tasks(path: Path) -> dict:
    """A set-up's task file: the rows of its table, their tasks, chains. DataError: unusable."""
    import data

    with data.naming(path, "Give it rows, tasks and chains as assets/tabletop.json has them"):
        setup = json.loads(path.read_text())
        scenes = [x["scene"] for x in setup["chains"]]  # all there, and strings?
        tasks = {t: x for row in setup["rows"] for t, x in row["tasks"].items()}
        scenes += [x["scene"] + x["sentence"] for x in tasks.values()]
        if unknown := {t for x in setup["chains"] for t in x["tasks"]} - set(tasks):
            raise ValueError(f"chains have {sorted(unknown)}, which no row has")
    return setup


def real_results(records: list[dict], setup: dict) -> dict:
    """Table II's figures; rates per row: both vegetables' tasks are rows' parts, judged apart."""
    chains = [r["solved"] for r in records if len(r["tasks"]) > 1]
    counts, rows = {"real": {}, "dream": {}}, []
    for r in records:
        if len(r["tasks"]) == 1:
            n = counts["dream" if r.get("dream") else "real"].setdefault(r["tasks"][0], [0, 0])
            n[0], n[1] = n[0] + r["solved"], n[1] + 1
    for row in setup["rows"]:
        parts = {k: [n[t] for t in row["tasks"] if t in n] for k, n in counts.items()}
        sums = {k: np.sum(x, 0).tolist() if x else None for k, x in parts.items()}
        rows.append({"row": row["row"], "paper": row.get("paper")} | sums)
    result = {"tasks": counts["real"], "rows": rows, "chains": chains}
    return result | {"paper_chains": setup.get("paper_chains")}


def real_table(result: dict) -> str:
    """A table laid out like the paper's Table II, its figures beside ours."""
    share = lambda x: f"{x[0] / x[1]:.1%}" if x else "-"
    line = lambda name, n, *cells: f"{name:<38}{n:>5}" + "".join(f"{x:>10}" for x in cells)
    paper = lambda row: [f"{x}%" for x in row["paper"]] if row["paper"] else ["-"] * 3
    rows, chains = result["rows"], result["chains"]
    ours = ("dry run" if result["dry_run"] else "real", "dream")
    lines = [line("", "", "here", "", "paper", "", ""),
             line("Task / Method", "n", *ours, "LUMOS", "HULC", "W. Model")]  # fmt: skip
    for r in rows:
        n = r["real"][1] if r["real"] else 0
        lines.append(line(r["row"], n, share(r["real"]), share(r["dream"]), *paper(r)))
    mean = lambda rates: f"{np.mean(rates):.2f}%" if rates else "-"
    rate = lambda key: mean([100 * r[key][0] / r[key][1] for r in rows if r[key]])
    known = [r["paper"] for r in rows if r["paper"]]
    columns = [mean([p[k] for p in known]) for k in range(3)]
    lines.append(line("Average over tasks", "", rate("real"), rate("dream"), *columns))
    length = f"{np.mean(chains):.2f}" if chains else "-"
    paper = [f"{x:.2f}" for x in result["paper_chains"] or ()] or ["-", "-"]
    last = line("Average no. of sequential tasks", len(chains), length, "-", *paper, "-")
    return "\n".join([*lines, last])


def real_rollout(env, policy, embeddings: dict, tasks: dict, job: tuple, args) -> dict | None:
    """One rollout with the operator; None: enough for now. Its log, film and first picture are
    files of their own, also those of a rollout that was invalid."""
    import robot

    name, scene, names, k = job
    stem = args.out / "rollouts" / name.replace("/", "_")
    stem = f"{stem}_{len(list(stem.parent.glob(stem.name + '_*.jsonl')))}"
    if env.ask(f"{name}: {scene}. The scene is set: g go, q enough for now", "gq") == "q":
        return None
    env.start_log(f"{stem}.jsonl")
    film, steps, solved, began = Filmed(env, Path(f"{stem}.{args.format}"), 1), [], 0, time.time()
    outcome = "error"
    try:
        pose = np.zeros(15)
        pose[7:14] = env.config.neutral[k % len(env.config.neutral)]
        obs = env.reset(pose)
        if tasks[names[0]].get("held"):
            if env.ask("Hold it between the fingers: c closes them, a abort", "ca") == "a":
                raise robot.Stopped("abort")
            for _ in range(env.config.hz):
                obs = env.follow(-1.0)
        np.savez(f"{stem}_start.npz", robot_obs=obs["robot_obs"], **obs["rgb_obs"])  # for "dream"
        policy.seed(int(np.random.default_rng((args.seed, k)).integers(2**63)))
        for i, task in enumerate(names):
            film.caption = f"{i + 1}/{len(names)}  {tasks[task]['sentence']}"
            print(film.caption, "   keys: s success, f failed, r repeat, a abort", flush=True)
            env.resume()
            ok, n = attempt(film, operator_says, policy, embeddings, task, args.limit)
            steps.append(n)
            if not ok:
                text = "The time is over: s success, f failed, r repeat, a abort"  # [D22]
                if (answer := env.ask(text, "sfra")) in "ra":
                    raise robot.Stopped({"r": "repeat", "a": "abort"}[answer])
                ok = answer == "s"
            film.snap(solved=ok)
            solved += ok
            if not ok:
                break
        outcome = "solved" if solved == len(names) else "failed"
    except robot.Stopped as stop:
        outcome = stop.reason
        if outcome not in ("failed", "repeat", "abort"):
            text = f"Stopped: {outcome}. f counts as a failure, r repeats it, a aborts"
            answer = env.ask(text, "fra")
            outcome = {"f": f"failed: {outcome}", "r": "repeat", "a": "abort"}[answer]
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        env.rest()
        record = {"chain": name, "tasks": names, "solved": solved, "steps": steps}
        record |= {"outcome": outcome, "began": began, "seconds": time.time() - began}
        record |= {"log": Path(stem).name}
        env.note("outcome", **record)
        env.start_log(None)
        film.save()
    if outcome == "repeat":
        return real_rollout(env, policy, embeddings, tasks, job, args)
    return None if outcome == "abort" else record


def dreamed_rollout(policy, embedding, sentence: str, record: dict, args) -> dict | None:
    """A rollout's task once more in the world model alone, from the same first picture: a film,
    judged by a person as Table II's last column was. None: enough for now."""
    import torch

    import world_model

    stem = str(args.out / "rollouts" / record["log"])
    start = dict(np.load(f"{stem}_start.npz"))
    obs = {"robot_obs": start.pop("robot_obs"), "rgb_obs": start}
    film = Filmed(None, Path(f"{stem}_dream.{args.format}"))
    k = int(record["chain"].split("/")[-1])
    policy.seed(int(np.random.default_rng((args.seed, k)).integers(2**63)))
    policy.reset()
    for t in range(0, args.limit + 1, policy.skip):
        policy.act(None if t else obs, embedding)
        with torch.no_grad():
            seen = policy.world.decode(torch.cat(policy.state, -1)[None])
        seen = [world_model.to_uint8(seen[k])[0, 0].cpu().numpy() for k in ("static", "gripper")]
        film.frames.append((*seen, f"dream  {sentence}", None))
    film.save()
    answer = ""
    while answer not in ("s", "f", "q"):
        answer = input(f"{film.film}: {sentence}. s success, f failed, q enough for now: ").strip()
    dream = {"chain": f"dream/{record['chain']}", "dream": True, "tasks": record["tasks"]}
    return None if answer == "q" else dream | {"solved": int(answer == "s"), "log": record["log"]}


def evaluate_real(args) -> dict:
    """Table II: --rollouts of each task and the chains of five, with a person as the judge; with
    --dream each single task's rollout again, in the world model."""
    import data
    import robot

    config, setup = robot.load_config(args.robot), read_tasks(args.tasks)
    tasks = {t: about for row in setup["rows"] for t, about in row["tasks"].items()}
    every = itertools.product(tasks.items(), range(args.rollouts))
    jobs = [(f"{t}/{k:02}", x["scene"], [t], k) for (t, x), k in every]
    chains = setup["chains"][args.first : args.first + args.chains]
    jobs += [(f"chain/{k:02}", x["scene"], x["tasks"], k) for k, x in enumerate(chains, args.first)]
    MUST_AGREE["real"] = {"hz x skip": config.hz, "action_scale": list(config.action_scale)}
    MUST_AGREE["real"] |= {"frame": config.frame, "renderer": "camera"}
    policy, c = load_policy(args.checkpoint, args.device, not args.mean, "real")
    encoder = args.text_encoder or c["text_encoder"]
    data.same_text_encoder(encoder, c["text_encoder"], args.checkpoint)
    sentences = [about["sentence"] for about in tasks.values()]
    embeddings = dict(zip(tasks, data.encode(sentences, encoder), strict=True))
    identity = {"env": "real", "method": c["config"]["method"], "step": c["step"]}
    identity |= {k: getattr(args, k) for k in ("checkpoint", "mean", "limit", "seed", "dry_run")}
    identity |= {"task_file": str(args.tasks)} if args.tasks != TABLETOP else {}
    identity |= {f"robot.{k}": x for k, x in dataclasses.asdict(config).items()}
    log = args.out / "rollouts.jsonl"
    records = read_log(log, identity, ours=False)  # of another evaluation? Nothing is written yet

    def rollouts():
        env = robot.RealEnv(config, args.dry_run)
        try:
            obs, sentence = env.get_obs(), next(iter(embeddings.values()))
            policy.act(obs, sentence)  # the first is slow
            began = time.perf_counter()
            policy.act(obs, sentence)
            seconds, period = time.perf_counter() - began, 1 / config.hz
            if seconds > period:
                what = f"the policy takes {seconds:.3f} s, a step {period:.3f} s"
                raise robot.RobotError(f"{what}: a faster --device, or fewer other programs")
            print(f"policy: {1000 * seconds:.0f} ms of {1000 * period:.0f}; {len(todo)} rollouts")
            (args.out / "rollouts").mkdir(parents=True, exist_ok=True)
            env.check(args.out / "check.png")
            read_log(log, identity)  # begins it
            for job in todo:
                yield real_rollout(env, policy, embeddings, tasks, job, args)
        finally:
            env.close()

    def dreams():
        for r in todo:
            task = r["tasks"][0]
            yield dreamed_rollout(policy, embeddings[task], tasks[task]["sentence"], r, args)

    todo = [job for job in jobs if job[0] not in records]
    if args.dream:
        todo = [r for r in records.values() if len(r["tasks"]) == 1 and "dream" not in r]
        todo = [r for r in todo if f"dream/{r['chain']}" not in records]
        todo = [r for r in todo if (args.out / "rollouts" / f"{r['log']}_start.npz").exists()]
        if not records:
            raise ValueError(f"{log} has no rollouts: make them first, without --dream")
    done, result = 0, {}
    try:
        with contextlib.closing(dreams() if args.dream else rollouts()) as made:
            for record in itertools.takewhile(bool, made):
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                records[record["chain"]] = record
                done += 1
    finally:
        if log.exists():
            result = identity | real_results([*records.values()], setup)
            write_json(args.out / "results.json", result)
            print(real_table(result))
            if left := len(todo) - done:
                print(f"{left} rollouts are left: the same command again goes on from here.")
    return result


# ------------------------------------------------------------------ running
class Worker:
    """What one process owns: an environment, its oracle and a policy."""

    def __init__(self, args):
        language = json.loads((HERE / "assets/sentences.json").read_text())["tasks"]
        self.args, self.embeddings, self.info = args, {}, {}
        self.sentences = {task: entry["validation"][0] for task, entry in language.items()}
        self.sentences |= {args.instruction: args.instruction} if args.instruction else {}
        if args.checkpoint:
            import data

            if args.device == "cuda" and "LOCAL_RANK" in os.environ:  # under torchrun
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            self.policy, c = load_policy(args.checkpoint, args.device, not args.mean, args.env)
            encoder = args.text_encoder or c["text_encoder"]
            data.same_text_encoder(encoder, c["text_encoder"], args.checkpoint)
            told = read_sentences(args, c["text_encoder"])  # {task: (sentence, embedding or None)}
            self.sentences |= {task: sentence for task, (sentence, _) in told.items()}
            known = {task: e for task, (_, e) in told.items() if e is not None}
            rest = {k: s for k, s in self.sentences.items() if k not in known}
            emb = data.encode(list(rest.values()), encoder) if rest else ()  # (34, 384)
            self.embeddings = known | dict(zip(rest, emb, strict=True))
            # What it was trained on is what it must see.
            args.renderer = c["meta"]["renderer"].split("-")[0]
            self.info = {"method": c["config"]["method"], "seed": c["run"]["seed"]}
            self.info["training"] = {k: c[k] for k in ("step", "seconds", "run", "meta")}
        self.env, self.oracle = ENVIRONMENTS[args.env](bool(args.checkpoint or args.film), args)
        if args.env == "dream":
            self.judge, self.info["judge_key"] = load_judge(args, self.policy.world, c)

    def run_chain(self, number: int, film: Path | None = None) -> dict:
        """One chain, from its start pose to the first failure: what chains.jsonl keeps of it."""
        args, env, (state, tasks) = self.args, Filmed(self.env, film), calvin.chain(number)
        env.reset(*calvin.start_pose(state))
        rng = np.random.default_rng((args.seed, number))  # neither order nor process matters
        if args.policy == "operator":
            try_task = teleop.Operator(env, rng, oracle=self.oracle).attempt
        else:
            self.policy.seed(int(rng.integers(2**63)))
            try_task = functools.partial(attempt, env, self.oracle, self.policy, self.embeddings)
        steps, attempts = [], []
        for k, task in enumerate(tasks):
            env.caption = f"{k + 1}/5  {self.sentences[task]}"
            env.snap()
            if args.env == "dream":
                ok, n, seen = self.try_twice(env, task)
                attempts.append(seen)
            else:
                ok, n = try_task(task, args.limit)
            env.snap(solved=ok)
            steps.append(n)
            if not ok:
                break
        env.save()
        record = {"chain": number, "solved": len(steps) - (not ok), "tasks": tasks, "steps": steps}
        return record | ({"attempts": attempts} if attempts else {})

    def try_twice(self, env, task: str) -> tuple[bool, int, dict]:
        """In the dream; then, from the same picture, in the simulator, which judges the judge."""
        import dream

        policy, emb, limit = self.policy, self.embeddings, self.args.limit
        imagined = dream.attempt(policy, self.judge, env.get_obs(), emb[task], task, limit)
        oracle = dream.Watched(self.oracle, policy, self.judge)
        _, n = attempt(env, oracle, policy, emb, task, limit)
        seen = {"truth": sorted(oracle.truth), "judged": sorted(oracle.verdict.done)}
        return oracle.solved, n, {"task": task, "dream": imagined, "sim": oracle.solved} | seen

    def follow(self, sentence: str, number: int, film: Path) -> dict[str, int]:
        """One free sentence in a chain's scene, to the limit: {task: step that it was seen at}."""
        env, seen = Filmed(self.env, film), {}

        def take_notes(start, info, _):  # of all tasks; says yes to none
            new = [x for x in calvin.TASKS if x not in seen and self.oracle(start, info, x)]
            seen.update(dict.fromkeys(new, env.t))

        self.policy.seed(self.args.seed)
        env.reset(*calvin.start_pose(calvin.chain(number)[0]))
        env.caption = sentence
        attempt(env, take_notes, self.policy, self.embeddings, sentence, self.args.limit)
        env.save()
        return seen


def _start(args):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and so does the parent's end
    end = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=end, daemon=True).start()
    _worker = Worker(args)


def _run(job: tuple) -> dict:
    return _worker.run_chain(*job)


def finished(worker: Worker, jobs: list[tuple]):
    """A record per job, in whatever order they finish; every process has its own worker."""
    if worker.args.procs == 1:
        yield from (worker.run_chain(*job) for job in jobs)
        return
    context, n = multiprocessing.get_context("spawn"), worker.args.procs
    pool = concurrent.futures.ProcessPoolExecutor(n, context, _start, (worker.args,))
    try:
        for done in concurrent.futures.as_completed([pool.submit(_run, job) for job in jobs]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def evaluate(worker: Worker) -> dict:
    """Runs the chains that are not on record yet, prints the tables, writes results.json.

    Under torchrun every process runs its share into a log of its own; rank 0 reports on all.
    """
    rank, ranks = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    args, log = worker.args, worker.args.out / f"chains{f'_{rank}' * (rank > 0)}.jsonl"
    identity = {"env": args.env, "method": args.policy, "seed": args.seed, **worker.info}
    identity |= {k: getattr(args, k) for k in ("checkpoint", "mean", "limit")}
    identity["evaluation_seed"] = args.seed
    identity |= {"sentences": str(args.sentences)} if args.sentences else {}
    if args.env == "calvin":
        identity |= {"scene": args.scene, "renderer": args.renderer}

    def on_record() -> dict[int, dict]:
        logs = [log, *(x for x in sorted(args.out.glob("chains*.jsonl")) if x != log)]
        return {n: r for x in logs for n, r in read_log(x, identity, ours=x == log).items()}

    records = on_record()
    numbers = range(args.first, args.first + args.chains)
    films = {n: args.out / f"chain_{n:04}.{args.format}" for n in numbers[: args.film]}
    todo = [n for n in numbers[rank::ranks] if n not in records or not films.get(n, log).exists()]
    bar = {"total": len(todo), "unit": "chain", "position": rank}
    try:
        with tqdm(**bar) as bar:
            for record in finished(worker, [(n, films.get(n)) for n in todo]):
                if record["chain"] not in records:  # else only its film was missing
                    with writing(log), log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                records[record["chain"]] = record
                lengths = [records[n]["solved"] for n in numbers if n in records]
                bar.set_postfix_str(f"Avg. Len. {np.mean(lengths):.2f}", refresh=False)
                bar.update()
        if ranks > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            dist.barrier()
            dist.destroy_process_group()
            records = on_record()
    finally:  # after Ctrl-C too: the tables so far
        result = {}
        if rank == 0 and (done := [records[n] for n in numbers if n in records]):
            git = "git describe --always --dirty --abbrev=40 --exclude='*'"  # fails: no checkout
            git = subprocess.run(git, shell=True, cwd=HERE, capture_output=True, text=True)
            result = identity | summarise(done) | {"commit": git.stdout.strip() or None}
            if args.env == "dream":
                import dream

                result |= dream.summarise(done)
            print(dream.table(result) if args.env == "dream" else tables(result))
            write_json(args.out / "results.json", result)
            if args.env != "dream":
                write_json(args.out / "calvin_results.json", as_calvin(result))
        if rank == 0 and len(done) < args.chains:
            print(f"{len(done)} of {args.chains} chains: the same command again goes on from here.")
    return result


# ------------------------------------------------------------------ Fig. 3
def predict(args, context: int = 5, frames: int = 200, clips: int = 8) -> dict:
    """Fig. 3: `context` frames of held-out play, then 195 steps from the recorded actions alone.

    Writes prediction.png and .gif (truth above prediction), and prediction.json with PSNR (dB)
    and SSIM of each step after the context, over all clips: of the prediction, of the
    reconstruction from the posterior, which sees every frame, and of the last context frame, held;
    with proprioception [D5] also how far the tcp is from the truth, in cm, median over clips.
    """
    import imageio.v3 as imageio
    import torch
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    import data
    import train

    checkpoint = train.load_checkpoint(Path(args.checkpoint), None, args.device)
    world = train.load_world_model(checkpoint, args.device)
    play = data.PlayData(args.predict, "validation")
    train.same_kind(checkpoint, play, args.predict)
    frames = min(frames, play.longest)
    first = np.random.default_rng(args.seed).permutation(play.stretches(frames))[:clips]
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    batch = play.frames(first + np.arange(frames)[:, None], fresh=True)
    with torch.no_grad():
        torch.manual_seed(args.seed)
        seen, unseen = world.predict(train.to_device(batch, args.device), context)
    psnr = functools.partial(peak_signal_noise_ratio, data_range=255)
    ssim = functools.partial(structural_similarity, data_range=255, channel_axis=-1)
    result = {"checkpoint": args.checkpoint, "step": checkpoint["step"], "hz": play.meta["hz"]}
    result |= {"context": context, "frames": frames, "clips": len(first), "seed": args.seed}
    if "tcp" in unseen:  # [D5] medians over the clips
        tcp = batch["robot_obs"][..., :3].numpy()  # (T, B, 3)
        for name, x in {
            "prediction": unseen["tcp"].cpu().numpy(),
            "copy": tcp[context - 1],
        }.items():
            error = 100 * np.median(np.linalg.norm(x - tcp, axis=-1), axis=-1)
            result[f"tcp_cm_{name}"] = np.round(error[context:], 2).tolist()
    strip, film = [], []
    for k in tqdm(world.encoders, desc="prediction", unit="camera"):
        truth = batch[f"rgb_{k}"].numpy()  # (T, B, 64, 64, 3)
        copied = torch.tensor(truth[context - 1]).expand(*truth.shape)
        for name, x in {"prediction": unseen[k], "reconstruction": seen[k], "copy": copied}.items():
            pairs = list(zip(truth[context:], x[context:].cpu().numpy(), strict=True))
            curves = {"psnr": [psnr(*at_t) for at_t in pairs]}  # of the clips' mean error
            curves["ssim"] = [np.mean(list(map(ssim, *at_t))) for at_t in pairs]
            result |= {f"{m}_{k}_{name}": np.round(c, 3).tolist() for m, c in curves.items()}
        both = np.concatenate([truth, unseen[k].cpu().numpy()], 2)  # (T, B, 128, 64, 3)
        moments = np.linspace(context - 1, frames - 1, 14).astype(int)
        strip += [np.concatenate(both[moments, b], 1) for b in range(min(2, len(first)))]
        film.append(np.concatenate(both[:, :4].swapaxes(0, 1), 2))  # (T, 128, 4 * 64, 3)
    double = lambda x: x.repeat(2, -3).repeat(2, -2)
    picture = imageio.imwrite("<bytes>", double(np.concatenate(strip)), extension=".png")
    write(args.out / "prediction.png", lambda part: part.write_bytes(picture))
    film, how = double(np.concatenate(film, 1)), {"duration": 1000 / play.meta["hz"], "loop": 0}
    film = imageio.imwrite("<bytes>", film, extension=".gif", **how)
    write(args.out / "prediction.gif", lambda part: part.write_bytes(film))
    write_json(args.out / "prediction.json", result, None)
    last = frames - context
    print(f"{'PSNR (dB), SSIM in steps':<34}{'1-10':>14}{'11-50':>14}{f'51-{last}':>14}")
    for key in [k[5:] for k in result if k.startswith("psnr")]:
        curves = [np.array(result[f"{measure}_{key}"]) for measure in ("psnr", "ssim")]
        parts = [[c[a:b].mean() for c in curves] for a, b in ((0, 10), (10, 50), (50, last))]
        print(f"{key:<34}" + "".join(f"{p:>9.1f}{s:>5.2f}" for p, s in parts))
    for key in [k for k in result if k.startswith("tcp")]:
        parts = [np.mean(result[key][a:b]) for a, b in ((0, 10), (10, 50), (50, last))]
        print(f"{key:<34}" + "".join(f"{p:>9.1f} cm  " for p in parts))
    return result


def parse(argv=None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Evaluate a policy.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", help="the agent's, by train.py --stage agent; for sim, ours is the default")
    add("--policy", choices=("agent", "operator"), default="agent")
    add("--env", choices=(*ENVIRONMENTS, "real"), default="sim")
    add(
        "--chains",
        type=int,
        help="how many of the benchmark's 1000 chains; default: all, 20 of ours",
    )
    add("--first", type=int, default=0, help="number of the first; with --instruction: its scene")
    add("--procs", type=int, default=1, help="processes, each with an environment and a policy")
    add("--device", default="cpu", help="where the policy runs: cpu, cuda, cuda:1, ...")
    add("--out", type=Path, help="folder of the record, results.json and films")
    add("--seed", type=int, default=0, help="of sampled actions and plans")
    add("--mean", action="store_true", help="act with tanh of the mean, not with a sample [D17]")
    add("--limit", type=int, default=LIMIT, help="simulator steps per instruction")
    add("--film", type=int, metavar="K", help="film the first K of the chains")
    add("--format", choices=("gif", "mp4"), default="gif", help="of films")
    add("--text-encoder", help="its local folder, for sentences that are not in assets/")
    add("--instruction", metavar="SENTENCE", help="follow one free sentence instead, and film it")
    add("--predict", metavar="DATA", help="no policy: Fig. 3's long predictions of packed play")
    add("--robot", type=Path, help="real: JSON file of robot.RobotConfig's fields")
    add("--tasks", type=Path, default=TABLETOP, help="real: tasks and chains")
    add("--rollouts", type=int, default=20, help="real: of each task, before the chains")
    add("--data", help="dream: packed data for its judge, if the policy's has moved")
    add("--dream", action="store_true", help="real: its rollouts again, in the world model")
    add("--dry-run", action="store_true", help="real: everything but the motion")
    add("--sentences", type=Path, help="of the 34 tasks: JSON, or validation/lang_...")
    add("--chains-json", type=Path, metavar="FILE", help="only write the 1000 chains")
    add("--table", type=Path, nargs="+", metavar="JSON", help="only print Table I of results.json")
    calvin.add_options(parser)
    args = parser.parse_args(argv)
    if args.chains_json or args.table:
        return args
    ours = args.policy == "agent" and args.env == "sim" and not (args.checkpoint or args.predict)
    if ours:  # a first look
        args.checkpoint, args.out = str(SHIPPED), args.out or Path("runs/first_look")
    args.chains = (20 if ours else 1000) if args.chains is None else args.chains
    args.film = int(ours) if args.film is None else args.film
    reads = bool(args.checkpoint)
    if (args.policy == "agent") != reads or (args.instruction and not reads):
        parser.error("give --checkpoint RUN/agent.pt, or --policy operator (for no --instruction)")
    if reads and args.renderer:
        parser.error("--renderer is for --policy operator; a checkpoint needs that of its data")
    least = 0 if args.env == "real" else 1  # there are single tasks, too
    n = 1 if args.instruction else args.chains
    if not (0 <= args.first <= args.first + n <= 1000 and n >= least):
        parser.error(f"there are chains 0 to 999, not {args.chains} from {args.first} on")
    for name, least in (("procs", 1), ("limit", 1), ("film", 0), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    if args.instruction is not None and not args.instruction.strip():
        parser.error("--instruction: give a sentence")
    if args.format == "mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        parser.error("--format mp4: pip install imageio-ffmpeg, or take gif")
    alone = args.procs == 1 and not args.instruction
    one = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if args.env == "dream" and not (reads and one and not args.instruction):
        parser.error("--env dream takes --checkpoint RUN/agent.pt; no --instruction, no torchrun")
    if args.env == "real" and not (args.robot and reads and alone):
        parser.error("--env real takes --robot FILE and --checkpoint; no --instruction, --procs")
    run = Path(args.checkpoint).parent if args.checkpoint else Path("runs") / args.policy
    run = Path("runs/first_look") if run.resolve() == SHIPPED.parent else run  # not into the tree
    name = f"evaluate_{args.env}{'_dry_run' * args.dry_run}"
    args.out = args.out or run / ("predict" if args.predict else name)
    return args


def main(argv=None) -> dict | None:
    args = parse(argv)
    if args.table:
        return print(table_of_seeds(args.table))
    if args.chains_json:
        return write_chains(args.chains_json)
    if args.env == "real":
        import robot

        try:
            return evaluate_real(args)
        except (ValueError, RuntimeError, OSError, robot.RobotError, robot.Stopped) as error:
            raise SystemExit(f"evaluate.py: {error}") from error
        except KeyboardInterrupt:
            text = "Ctrl-C: what is on record is kept; the same command again goes on from there."
            raise SystemExit(text) from None
    try:
        if args.predict:
            return predict(args)
        worker = Worker(args)
    except (ValueError, RuntimeError, ImportError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    if not args.instruction:
        return evaluate(worker)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    film = args.out / f"instruction.{args.format}"
    seen = worker.follow(args.instruction, args.first, film)
    print(*[f"{task} at step {step}" for task, step in seen.items()], sep="\n")
    print(f"{len(seen)} of the 34 tasks seen in {args.limit} steps; film: {film}")
    return seen


if __name__ == "__main__":
    main()
