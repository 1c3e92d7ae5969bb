"""The protocol with a person: check, play, rollouts, dreams. LUMOS Sec. V-B, App. E, Table II.

    tick     0    1    2    3    4    5    6     record_hz = 30: state and pictures     App. E
    frame    0         1         2         3     every second one is kept: hz = 15
    action   a_0 ----> a_1 ----> a_2 ---->       a_i leads from commanded pose T_i to T_i+1

    python deploy.py check    SETUP.json                            looks at all, moves nothing
    python deploy.py record   SETUP.json FOLDER training            play by hand guiding
    python deploy.py rollouts SETUP.json --checkpoint RUN/agent.pt  Table II: 22 tasks, 20 chains
    python deploy.py rollouts ... --dream                           its last column: no robot

A recording is in CALVIN's format. `rollouts` writes rollouts.jsonl (a line per rollout: the same
command goes on from there), results.json, and a log, a film and the first picture of each rollout.
Needs: robot.py, data.py; train.py for rollouts, diagnostics.py for dreams.
"""

import contextlib
import dataclasses
import json
import os
import select
import sys
import termios
import time
import tty
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.spatial.transform import Rotation
from tyro.conf import Positional

import data as D
import robot as R

TABLETOP = Path(__file__).resolve().parent / "assets/tabletop.json"  # the paper's tasks
FILM = 240  # pictures in a film, at most


# ---------------------------------------------------------------------------- the operator
def terminal_key() -> str | None:
    """A key that was pressed, "" if none was, None without a keyboard."""
    if not select.select([sys.stdin], [], [], 0)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 1).decode(errors="ignore") or None


@contextlib.contextmanager
def connected(config: R.RobotConfig, dry_run: bool):
    """The environment with the terminal as its keyboard; at the end the arm is at rest."""
    saved = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    env = R.RealEnv(config, dry_run, key=terminal_key)
    try:
        if saved:
            tty.setcbreak(sys.stdin)  # keys count without Enter
        yield env
    finally:
        env.close()  # the arm first: a terminal that is held back may block
        if saved:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)


def ask(env, text: str, choices: str) -> str:
    """Waits until the operator presses one of the keys."""
    print(f"{text} [{'/'.join(choices)}]", flush=True)
    key = ""
    while not key or key not in choices:
        time.sleep(0.01)
        key = env.key() if env.key else None
        if env.interrupted:
            raise KeyboardInterrupt
        if key is None:
            raise R.RobotError("no keyboard to ask the operator: run this in a terminal")
    env.note("asked", text=text, answer=key)
    return key


# ---------------------------------------------------------------------------- pictures
def strip(label: str, images: list) -> np.ndarray:
    """Pictures (H, W, 3) uint8 side by side under a line of text: (286, 260 n, 3) uint8."""
    out = Image.new("RGB", (260 * len(images), 286), "#404040")
    for i, image in enumerate(images):
        large = ImageOps.pad(Image.fromarray(image), (256, 256), Image.Resampling.NEAREST)
        out.paste(large, (260 * i + 2, 28))
    ImageDraw.Draw(out).text((8, 5), label, "white", ImageFont.load_default(14))
    return np.asarray(out)


def save_film(path: Path, film: list[tuple], hz: float):
    """film: the arguments of `strip` for each step. A GIF in real time; a long one is thinned."""
    if not film:  # it ended before its first step
        return
    thin = 1 + len(film) // FILM
    first, *rest = [Image.fromarray(strip(*x)) for x in film[::thin]]
    options = {"save_all": True, "append_images": rest, "duration": 1000 * thin / hz, "loop": 0}
    D.write(path, lambda file: first.save(file, "GIF", **options))


# ---------------------------------------------------------------------------- check
def check_cameras(env, picture: Path):
    """Saves all of each camera's picture with its crop, what is recorded, what the policy gets.
    RobotError: a dark or frozen camera."""
    rows = []
    images, ages = env.frames()
    for name, image in images.items():
        camera = env.cameras[name]
        small = R.resize_area(image, env.config.policy_size)
        top, bottom, left, right = camera.box
        whole = camera.frame // 3  # what the crop leaves out is dark
        whole[top:bottom, left:right] = camera.frame[top:bottom, left:right]
        sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (whole, image, small)]
        label = "{}: {} with its crop, recorded {}, policy {}".format(name, *sizes)
        rows.append(strip(label, [whole, image, small]))
        label += f" ({camera.spec}), {ages[name]:.2f} s old, grey levels +- {image.std():.0f}"
        print(label)
        if image.std() < 3 or ages[name] > env.config.max_frame_age:
            raise R.RobotError(f"{label}: it shows nothing, or is frozen. Cap, light, cable?")
    Image.fromarray(np.concatenate(rows)).save(picture)
    print(f"what they see: {picture}")


def check(env, picture: Path, moves: str = "THE ARM WILL MOVE"):
    """Prints what is connected, saves what the policy sees, asks the operator. Nothing moves.
    RobotError: something is wrong, or the operator says no."""
    c, s = env.config, env.arm.state()
    check_cameras(env, picture)
    wrong = np.linalg.norm((R.flange(s.q) @ s.F_T_EE)[:3, 3] - s.M[:3, 3])
    if wrong > 0.01:
        raise R.RobotError(f"the arm's pose is {wrong:.3f} m from its joints': another arm?")
    R.check_state(c, s.M, s.q)
    for q in c.neutral:
        R.check_homing(c, s.q, q, s.F_T_EE)
    print(f"arm: mode {s.mode}, tool at {s.M[:3, 3].round(3)} m, hand {env.arm.width:.3f} m open")
    for name, x in dataclasses.asdict(c).items():
        print(f"  {name}: {x}")
    speed, turn = (x * c.hz for x in c.action_scale)
    print(f"an action of 1, {c.hz} times a second: {speed:.2f} m/s, {turn:.2f} rad/s")
    print("DRY RUN: nothing will move" if env.dry_run else moves)
    if ask(env, "Emergency stop in hand, box free of people? Go on?", "yn") == "n":
        raise R.RobotError("the operator said no")


# ---------------------------------------------------------------------------- play
def relative_action(c: R.RobotConfig, T, T_next, gripper: float) -> np.ndarray:
    """The action (7,) that moves commanded pose T to T_next: App. E's difference of commands. The
    arm's six may be beyond -1 and 1: what is recorded is clipped."""
    R_now, R_next = (Rotation.from_matrix(x[:3, :3]) for x in (T, T_next))
    dp, dR = T_next[:3, 3] - T[:3, 3], R_next * R_now.inv()
    if c.frame == "tool":
        dp, dR = R_now.inv().apply(dp), R_now.inv() * R_next
    return np.r_[dp / c.action_scale[0], dR.as_euler("xyz") / c.action_scale[1], gripper]


def frame_ids(place: Path) -> list[int]:
    return sorted(int(path.stem[8:]) for path in place.glob("episode_*.npz"))


class Recorder:
    """Frames of one split of a recording in CALVIN's format, at the environment's hz / thin.

    Frame ids grow over both splits. Each frame is a file as soon as its action is known.
    """

    def __init__(self, folder, split: str, c: R.RobotConfig, thin: int = 2):
        self.folder, self.place, self.thin = Path(folder), Path(folder) / split, thin
        scale = tuple(round(s * thin, 9) for s in c.action_scale)
        self.config = dataclasses.replace(c, action_scale=scale)
        self.about = {"source": "robot", "renderer": "camera", "hz": c.hz // thin}
        self.about |= {"action_scale": list(scale), "frame": c.frame}

    def start(self):
        """Begins an episode. What a crash left behind becomes an episode of its own before.
        RobotError: the folder is of another set-up."""
        about, table = self.place / "recording.json", self.place / "ep_start_end_ids.npy"
        self.place.mkdir(parents=True, exist_ok=True)
        if not about.exists():
            D.write_json(about, self.about)
        old = D.read_json(about, "Give another folder")
        if any(old.get(k) != x for k, x in self.about.items()):
            raise R.RobotError(f"{about} is of another recording: {old}, not {self.about}.")
        self.episodes = np.load(table).tolist() if table.exists() else []
        left = [i for i in frame_ids(self.place) if not self.episodes or i > self.episodes[-1][1]]
        if left:
            self.first, self.next = left[0], left[-1] + 1
            self.end()
        self.first = 1 + max([-1, *(i for p in self.folder.iterdir() for i in frame_ids(p))])
        self.next, self.pending, self.ticks, self.clipped = self.first, None, 0, 0

    def add(self, T, gripper: float, images: dict, robot_obs):
        """One tick [D21]: commanded pose (4, 4) and gripper in force, images, state (15,)."""
        self.ticks += 1
        if (self.ticks - 1) % self.thin:
            return
        if self.pending is not None:  # now the last frame's action is known: it led to this one
            T_before, frame = self.pending
            a = relative_action(self.config, T_before, T, gripper)
            self.clipped += int(np.abs(a).max() > 1.001)
            frame["rel_actions"] = np.clip(a, -1, 1)
            euler = Rotation.from_matrix(T[:3, :3]).as_euler("xyz")
            frame["actions"] = np.r_[T[:3, 3], euler, gripper]
            np.savez(self.place / "part.npz", **frame)
            os.replace(self.place / "part.npz", self.place / f"episode_{self.next:07d}.npz")
            self.next += 1
        self.pending = (T.copy(), images | {"robot_obs": np.array(robot_obs, float)})

    def end(self) -> int:
        """Closes the episode; its number of frames, 0 if it was too short to keep."""
        n = self.next - self.first
        if n < D.MIN_LEN:  # no window of Table IV fits in
            for i in range(self.first, self.next):
                (self.place / f"episode_{i:07d}.npz").unlink(missing_ok=True)
            return 0
        self.episodes.append([self.first, self.next - 1])  # CALVIN's bounds are inclusive
        bounds = np.array(self.episodes)
        lengths = bounds[:, 1] - bounds[:, 0] + 1
        D.write_array(self.place / "ep_lens.npy", lengths)
        D.write_array(self.place / "ep_start_end_ids.npy", bounds)
        return n


def record(env, folder, split: str, source=None, thin: int = 2) -> int:
    """One episode of play, until the source returns None or the operator presses n. The hand begins
    as it is. Returns its frames, and prints which they are and how many actions were clipped.

    source(obs) -> action (7,) of env.config's scale at its rate, by any teleoperation; None: a
    person guides the arm by its buttons, and g opens and closes the hand.
    """
    recorder, obs, gripper = Recorder(folder, split, env.config, thin), env.resume(), env.gripper
    recorder.start()
    try:
        while "n" not in env.pressed:
            recorder.add(env.T, env.gripper, env.images, obs["robot_obs"])
            if "g" in env.pressed:
                env.pressed.remove("g")
                gripper = -gripper
            action = source(obs) if source else np.r_[np.zeros(6), gripper]
            if action is None:
                break
            obs = env.step(action, guided=source is None)[0]
    finally:  # whatever ended it, what was recorded stays
        n = recorder.end()
        env.note("episode", frames=n, clipped=recorder.clipped)
        print(f"{n} frames are kept, from {recorder.first} on (none if fewer than {D.MIN_LEN}); "
              f"{recorder.clipped} of the actions were clipped", flush=True)  # fmt: skip
    return n


# ---------------------------------------------------------------------------- Table II
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Table II: rollouts of each task, then chains of five, with a person as the judge."""

    setup: Positional[Path]  # JSON of robot.RobotConfig's fields
    checkpoint: str  # agent.pt, or a baseline's, of train.py
    tasks: Path = TABLETOP  # JSON of rows, tasks and chains
    rollouts: int = 20  # of each task
    chains: int = 20  # of the task file's chains
    limit: int = 360  # steps per instruction
    seed: int = 0  # of sampled actions and plans
    replan: int | None = None  # actions from plan to plan; None: the checkpoint's
    reset_on_replan: bool | None = None  # at each plan, forget what was seen
    device: str = "cpu"  # of the policy
    text_encoder: str | None = None  # its folder, for sentences that are not in assets/
    dry_run: bool = False  # everything but the motion
    dream: bool = False  # instead: the tasks' rollouts once more, in the world model alone
    out: Path | None = None  # default: evaluate_real beside the checkpoint


def read_tasks(args: Rollouts) -> tuple[dict, dict, list[dict]]:
    """A task file's content, {task: {sentence, scene, held}}, and the rollouts that args ask for:
    each task's, then the chains. DataError: unusable."""
    with D.naming(args.tasks, "Give it rows, tasks and chains as assets/tabletop.json has them"):
        setup = json.loads(args.tasks.read_text())
        tasks = {t: about for row in setup["rows"] for t, about in row["tasks"].items()}
        "".join(x["sentence"] + x["scene"] for x in tasks.values())  # TypeError: no text
        "".join(chain["scene"] for chain in setup["chains"])
        unknown = {t for chain in setup["chains"] for t in chain["tasks"]} - set(tasks)
        if unknown:
            raise ValueError(f"chains have {sorted(unknown)}, which no row has")
    jobs = []
    for task, about in tasks.items():
        job = {"scene": about["scene"], "tasks": [task]}
        jobs += [{"name": f"{task}/{k:02}", "k": k} | job for k in range(args.rollouts)]
    for k, chain in enumerate(setup["chains"][: args.chains]):
        jobs.append({"name": f"chain/{k:02}", "k": k} | chain)
    return setup, tasks, jobs


def table_ii(records: list[dict], setup: dict) -> dict:
    """Table II's figures: [solved, tried] of each row and task, lengths of the chains. Both
    vegetables' tasks are parts of one row, judged apart."""

    def counted(tasks, dream: bool = False) -> list[int]:  # chains do not count here
        these = [r for r in records if r["tasks"] in [[task] for task in tasks]]
        solved = [r["solved"] for r in these if r.get("dream", False) == dream]
        return [sum(solved), len(solved)]

    rows, tasks = [], {}
    for row in setup["rows"]:
        figures = {"real": counted(row["tasks"]), "dream": counted(row["tasks"], dream=True)}
        rows.append({"row": row["row"], "paper": row.get("paper")} | figures)
        tasks |= {task: counted([task]) for task in row["tasks"]}
    chains = [r["solved"] for r in records if len(r["tasks"]) > 1]
    return {"tasks": tasks, "rows": rows, "chains": chains, "paper": setup.get("paper_chains")}


def table(result: dict) -> str:
    """Laid out like the paper's Table II, the paper's figures beside ours."""

    def line(name, n, cells, form="{:.1f}%") -> str:
        cells = ["-" if x is None else form.format(x) for x in cells]
        return f"{name:<38}{n:>5}" + "".join(f"{x:>10}" for x in cells)

    def mean(figures):
        known = [x for x in figures if x is not None]
        return np.mean(known) if known else None

    here = "dry run" if result["dry_run"] else "real"
    lines = [line("", "", ["here", "", "paper"], "{}")]
    lines.append(line("Task / Method", "n", [here, "dream", "LUMOS", "HULC", "W. Model"], "{}"))
    rates = []
    for row in result["rows"]:
        ours = [100 * ok / n if n else None for ok, n in (row["real"], row["dream"])]
        rates.append([*ours, *(row["paper"] or [None] * 3)])
        lines.append(line(row["row"], row["real"][1], rates[-1]))
    lines.append(line("Average over tasks", "", map(mean, zip(*rates, strict=True)), "{:.2f}%"))
    chains, paper = result["chains"], result["paper"] or [None, None]
    lengths = [mean(chains), None, *paper, None]
    lines.append(line("Average no. of sequential tasks", len(chains), lengths, "{:.2f}"))
    return "\n".join(lines)


# ---------------------------------------------------------------------------- rollouts
def load_policy(args: Rollouts, c: R.RobotConfig):
    """The checkpoint's policy and its other entries. ValueError: it was trained at another rate,
    scale or frame, or not on a camera's pictures."""
    import train

    torch.set_num_threads(1)  # cameras and arm need the other cores
    given = {"replan": args.replan, "reset_on_replan": args.reset_on_replan}
    given = {k: x for k, x in given.items() if x is not None}
    policy, checkpoint = train.load_agent(args.checkpoint, args.device, **given)
    here = {"hz": c.hz / policy.skip, "action_scale": list(c.action_scale), "frame": c.frame}
    train.same_kind(checkpoint, here | {"renderer": "camera"}, args.setup)
    return policy, checkpoint


def instruct(env, policy, about: dict, label: str, limit: int, film: list) -> tuple[bool, int]:
    """One instruction, from wherever the arm is now: (solved?, steps), by the operator [D22]."""
    policy.reset()
    obs = env.resume()
    for t in range(limit):
        if t % policy.skip == 0:
            action = policy.act(obs, about["embedding"])
        obs, _, _, info = env.step(action)
        film.append((label, [*obs["rgb_obs"].values()]))
        if info["operator"] == "success":
            return True, t + 1
    answer = ask(env, "The time is over: s success, f failed, r repeat, a abort", "sfra")
    if answer in "ra":
        raise R.Stopped(R.ENDS[answer])
    return answer == "s", limit


def rollout(env, policy, job: dict, tasks: dict, args: Rollouts) -> dict:
    """One rollout with the operator. Its log, film and first picture are files of their own, also
    those of one that is invalid (outcome "repeat") or the last for now ("abort")."""
    folder, names, film, outcome = args.out / "rollouts", job["tasks"], [], "error"
    stem = job["name"].replace("/", "_")
    stem = f"{stem}_{len([*folder.glob(f'{stem}_*.jsonl')])}"
    record = {"chain": job["name"], "tasks": names, "log": stem, "began": time.time()}
    record |= {"solved": 0, "steps": []}
    env.log = open(folder / f"{stem}.jsonl", "a")
    try:
        start = np.zeros(15)
        start[7:14] = env.config.neutral[job["k"] % len(env.config.neutral)]
        obs = env.reset(start)
        if tasks[names[0]].get("held"):
            if ask(env, "Hold it between the fingers: c closes them, a abort", "ca") == "a":
                raise R.Stopped("abort")
            for _ in range(env.config.hz):
                obs = env.step(np.r_[np.zeros(6), -1.0], guided=True)[0]
        np.savez(folder / f"{stem}_start.npz", robot_obs=obs["robot_obs"], **obs["rgb_obs"])
        torch.manual_seed(1000 * args.seed + job["k"])
        for i, name in enumerate(names, 1):
            label = f"{i}/{len(names)}  {tasks[name]['sentence']}"
            print(f"{label}   keys: s success, f failed, r repeat, a abort", flush=True)
            ok, steps = instruct(env, policy, tasks[name], label, args.limit, film)
            end = f"{label}: {'solved' if ok else 'failed'}"
            film += [(end, film[-1][1])] * (env.config.hz // 2)  # half a second
            record["steps"].append(steps)
            record["solved"] += ok
            if not ok:
                break
        outcome = "solved" if ok else "failed"
    except R.Stopped as stop:
        outcome = str(stop)
        if outcome not in R.ENDS.values():
            text = f"Stopped: {outcome}. f counts as a failure, r repeats it, a aborts"
            answer = ask(env, text, "fra")
            outcome = f"failed: {outcome}" if answer == "f" else R.ENDS[answer]
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        with contextlib.suppress(R.Stopped):
            env.stop("rollout is over")  # the arm holds by itself
        record |= {"outcome": outcome, "seconds": time.time() - record["began"]}
        env.note("outcome", **record)
        env.log.close()
        env.log = None
        save_film(folder / f"{stem}.gif", film, env.config.hz)
    return record


def all_rollouts(todo: list[dict], policy, tasks: dict, config: R.RobotConfig, args):
    """Yields the record of each rollout, until the operator has enough."""
    with connected(config, args.dry_run) as env:
        policy.act(env.get_obs(), next(iter(tasks.values()))["embedding"])  # the first is slow
        (args.out / "rollouts").mkdir(parents=True, exist_ok=True)
        check(env, args.out / "check.png")
        while todo:
            job, *rest = todo
            text = f"{job['name']}: {job['scene']}. The scene is set: g go, q enough for now"
            if ask(env, text, "gq") == "q":
                return
            record = rollout(env, policy, job, tasks, args)
            if record["outcome"] == "abort":
                return
            if record["outcome"] != "repeat":
                yield record
                todo = rest


def all_dreams(todo: list[dict], policy, tasks: dict, config: R.RobotConfig, args):
    """Each single task's rollout again, in the world model alone, from the same first picture: a
    film, judged by a person as Table II's last column was."""
    import diagnostics

    for r in todo:
        about, stem = tasks[r["tasks"][0]], args.out / "rollouts" / r["log"]
        start = dict(np.load(f"{stem}_start.npz"))
        obs = {"robot_obs": start.pop("robot_obs"), "rgb_obs": start}
        torch.manual_seed(1000 * args.seed + int(r["chain"].split("/")[-1]))
        seen = diagnostics.dream(policy, obs, about["embedding"], args.limit)  # one per camera
        film = [(f"dream  {about['sentence']}", [*images]) for images in zip(*seen, strict=True)]
        save_film(Path(f"{stem}_dream.gif"), film, config.hz / policy.skip)
        answer = ""
        while answer not in ("s", "f", "q"):
            print(f"{stem}_dream.gif: {about['sentence']}. s success, f failed, q enough for now")
            answer = input().strip()
        if answer == "q":
            return
        record = {"chain": f"dream/{r['chain']}", "dream": True, "tasks": r["tasks"]}
        yield record | {"solved": int(answer == "s"), "log": r["log"]}


def read_log(path: Path, identity: dict) -> dict[str, dict]:
    """Finished rollouts by name. DataError: damaged, or of another evaluation."""
    if not path.exists():
        return {}
    with D.naming(path, "Give another --out"):
        was, *records = map(json.loads, path.read_text().splitlines())
        changed = [k for k in was | identity if was.get(k) != identity.get(k)]
        if changed:
            what = [f"{k} was {was.get(k)!r} and is {identity.get(k)!r}" for k in changed]
            raise ValueError(f"it holds another evaluation: {', '.join(what)}")
        return {r["chain"]: r for r in records}


def rollouts(args: Rollouts) -> dict:
    """Makes the rollouts, or dreams, that are not on record yet; the figures of Table II."""
    if not args.out:
        name = "evaluate_real_dry_run" if args.dry_run else "evaluate_real"
        args = dataclasses.replace(args, out=Path(args.checkpoint).parent / name)
    config, (setup, tasks, jobs) = R.load_config(args.setup), read_tasks(args)
    policy, checkpoint = load_policy(args, config)
    encoder = args.text_encoder or checkpoint["text_encoder"]
    D.same_text_encoder(encoder, checkpoint["text_encoder"], args.checkpoint)
    embeddings = D.encode([about["sentence"] for about in tasks.values()], encoder)
    for about, embedding in zip(tasks.values(), embeddings, strict=True):
        about["embedding"] = embedding
    identity = {"env": "real", "method": checkpoint["method"], "step": checkpoint["step"]}
    given = ("checkpoint", "limit", "seed", "dry_run", "replan", "reset_on_replan")
    identity |= {k: getattr(args, k) for k in given} | {"task_file": str(args.tasks)}
    identity |= {f"robot.{k}": x for k, x in dataclasses.asdict(config).items()}
    identity = json.loads(json.dumps(identity))  # as it is read back
    log = args.out / "rollouts.jsonl"
    records = read_log(log, identity)
    if args.dream and not records:
        raise ValueError(f"{log} has no rollouts: make them first, without --dream")
    if args.dream and not hasattr(policy, "world"):
        raise ValueError(f"{args.checkpoint} is a baseline, which has no world model to dream in")
    todo, make = [job for job in jobs if job["name"] not in records], all_rollouts
    if args.dream:
        done = [r for r in records.values() if len(r["tasks"]) == 1 and "dream" not in r]
        todo = [r for r in done if f"dream/{r['chain']}" not in records]
        todo = [r for r in todo if (args.out / f"rollouts/{r['log']}_start.npz").exists()]
        make = all_dreams
    left, result = len(todo), {}
    try:
        with contextlib.closing(make(todo, policy, tasks, config, args)) as made:
            for record in made:
                records[record["chain"]] = record
                text = "".join(json.dumps(x) + "\n" for x in (identity, *records.values()))
                D.write_text(log, text)
                left -= 1
    finally:
        if records:
            result = identity | table_ii([*records.values()], setup)
            D.write_json(args.out / "results.json", result)
            print(f"{table(result)}\n{left} rollouts are left: the same command goes on from here.")
    return result


# ---------------------------------------------------------------------------- command line
def check_command(setup: Positional[Path]):
    """Looks at everything, moves nothing; writes check.png."""
    with connected(R.load_config(setup), dry_run=True) as env:
        check(env, Path("check.png"))


def record_command(
    setup: Positional[Path],
    folder: Positional[Path],
    split: Positional[Literal["training", "validation"]],
):
    """Play by hand guiding, in CALVIN's format."""
    c = R.load_config(setup)
    with connected(R.recording(c), dry_run=False) as env:
        check(env, Path("check.png"), moves="you move the arm, g moves the hand")
        while ask(env, "n: a new episode, q: enough", "nq") == "n":
            print("recording; n ends the episode, g opens and closes the hand", flush=True)
            try:
                record(env, folder, split, thin=c.record_hz // c.hz)
            except R.Stopped as stop:
                print(f"stopped: {stop}", flush=True)


def main(argv: list[str] | None = None):
    commands = {"check": check_command, "record": record_command, "rollouts": rollouts}
    how = {"description": __doc__, "config": (tyro.conf.OmitArgPrefixes,)}
    with D.command("deploy.py", R.RobotError, R.Stopped, RuntimeError):
        return tyro.extras.subcommand_cli_from_dict(commands, args=argv, **how)


if __name__ == "__main__":
    main()
