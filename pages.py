"""Pages to look at: report.html beside each training and evaluation, and `evaluate.py --live`.

report   settings, curves, pictures, tables and films of a folder; needs no server, no network
live     a page on 127.0.0.1: both cameras, what the world model imagines, a field to instruct

    visitors --ask--> Robot.wanted      one robot for all of them: the last wish counts
    visitors <--events-- Robot.shown    what changed, 15 times a second

Templates: assets/report.html, live.html. Needs: torch, scipy, jinja2, matplotlib, flask, imageio.
"""

import base64
import copy
import difflib
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from tqdm import tqdm

import calvin
import data as D
import diagnostics

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"
# Title of a curve: the figures of the log that it shows, those that there are.
CURVES = {
    "Loss": ("loss",),
    "KL": ("kl",),
    "Error of the images": ("x_static", "x_gripper"),
    "Tracking of held-out play": ("tracking_proposed", "tracking_recognised"),
    "Critic's R²": ("critic_r2",),
    "Reward": ("reward", "reward_proposed", "reward_hold", "reward_expert"),
    "Actor's loss": ("loss_actor",),
    "Critic's loss": ("loss_critic",),
    "KL of the plans": ("plan_kl",),
    "Error of the actions": ("action_mse", "mse_observed", "mse_still"),
}
POINTS = 400  # of a curve, at most: the means of neighbours
COLOURS = ("#2f7de1", "#e8710a", "#0f9d75", "#b455c9", "#c9372c", "#8a8d91")
TEXT = "#010203"  # stands for the page's own colour of text
# What the figure varies, and its axis' scale.
STRESS = {"frames of play": "log", "probability of a push, per action": "linear",
          "steps of practice H": "linear"}  # fmt: skip
HZ, AHEAD = 30, 2  # simulator steps per second; seconds that the world model imagines


# ------------------------------------------------------------------ the report
def commit() -> str | None:
    """This code's commit, "-dirty" if files were changed; None without git."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}; {platform.system()}, {software}"


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def report(folder: Path, name: str, settings: dict, seconds: float = 0.0) -> None:
    """Writes folder/report.html anew, and that of the folder above it if there is one.
    name: a stage, or evaluation. settings: its own, kept in settings.json. seconds: that this call
    took; they add up. Never raises, for a training is worth more; what went wrong is printed."""
    try:
        path = folder / "settings.json"
        known = read(path)
        seconds += known.get(name, {}).get("seconds", 0.0)
        about = {"commit": commit(), "machine": machine(), "seconds": seconds}
        plain = json.loads(json.dumps(settings, default=str))
        D.write_json(path, known | {name: about | {"settings": plain}})
        write_report(folder)
        if (folder.parent / "report.html").exists():  # it shows this folder, too
            write_report(folder.parent)
    except Exception as error:
        what = f"note: {folder / 'report.html'} was not written: {type(error).__name__}: {error}"
        tqdm.write(what, file=sys.stderr)


def write_report(folder: Path) -> None:
    known = read(folder / "settings.json")
    results = folder / "results.json", *sorted(folder.glob("*/results.json"))
    content = {
        "title": folder.resolve().name,
        "stages": [stage(path, known) for path in sorted(folder.glob("*.jsonl"), reverse=True)
                   if not path.name.startswith("chains")],
        "pictures": [f"pictures/{p.name}" for p in sorted(folder.glob("pictures/*.png"))[::-1]],
        "probe": read(folder / "probe.json"),
        "evaluations": [evaluation(path.parent, folder) for path in results if path.exists()],
        "films": [{"file": p.name, "caption": p.stem.replace("_", " "), "told": []}
                  for p in sorted(folder.glob("*.gif")) if not p.name.startswith("chain_")],
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    content["running"] = any(s["step"] < s["steps"] for s in content["stages"])
    import jinja2

    how = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), **how)
    D.write_text(folder / "report.html", pages.get_template("report.html").render(content))


def stage(path: Path, known: dict) -> dict:
    """What a stage's log says: how far it is, its curves as SVG, its settings."""
    lines = path.read_text().split("\n")[:-1]  # the last may be half there
    rows = [json.loads(line) for line in lines]
    about = known.get(path.stem, {})
    settings, last = about.get("settings", {}), rows[-1] if rows else {"step": 0, "hours": 0.0}
    curves = {title: curve(f"{path.stem} {title}", rows, keys) for title, keys in CURVES.items()}
    return {
        "name": path.stem, "step": last["step"], "steps": settings.get("steps") or last["step"],
        "hours": last["hours"], "about": about, "settings": settings,
        "curves": {title: svg for title, svg in curves.items() if svg},
    }  # fmt: skip


def curve(salt: str, rows: list[dict], keys: tuple[str, ...]) -> str:
    """Figures over steps, as SVG; "" if the log has none of them. salt: for ids in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    lines = {}
    for key, kind in itertools.product(keys, ("train", "validate")):
        xy = np.array([(r["step"], r[key]) for r in rows if r["kind"] == kind and key in r])
        if len(xy):
            lines[kind if len(keys) == 1 else f"{key.replace('_', ' ')}, {kind}"] = xy
    if not lines:
        return ""
    parts = ("text.color", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    how = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "grid.alpha": 0.15}
    how |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context(dict.fromkeys(parts, TEXT) | how):
        figure = Figure((4.4, 2.5), layout="constrained")
        axes = figure.subplots()
        for (label, xy), colour in zip(lines.items(), 2 * COLOURS, strict=False):
            xy = np.array([part.mean(0) for part in np.array_split(xy, min(len(xy), POINTS))])
            marker = "o" if len(xy) < 20 else ""
            axes.plot(*xy.T, label=label, color=colour, lw=1.3, marker=marker, markersize=2.5)
        values = np.concatenate([xy[:, 1] for xy in lines.values()])
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        columns = 2 if max(map(len, lines)) < 24 else 1
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(TEXT, "currentColor")


def stress(results: dict[Path, dict], path: Path) -> None:
    """Avg. Len. over each of STRESS, mean ± sample deviation over seeds, as a PNG: of those
    results.json in which the other two are as in most of them. A line for each method; dashed
    where it was measured at one place only. DataError: they do not belong together."""
    from matplotlib.figure import Figure

    lengths, kinds = defaultdict(dict), set()  # {(method, place): {seed: Avg. Len.}}
    for file, r in results.items():
        with D.naming(file, "Give evaluations of agents, of one kind, each seed once"):
            training = r["training"]
            place = (training["frames"], r["disturb"], training["config"]["sequence_length"] - 1)
            kinds.add((r["env"], str(r.get("among")), r["chains"], training["step"]))
            if len(kinds) > 1:
                raise ValueError("environment, tasks, chains or steps of training are others here")
            seeds = lengths[r["method"], place]
            if r["seed"] in seeds:
                raise ValueError(f"{r['method']}'s seed {r['seed']} comes twice")
            seeds[r["seed"]] = r["avg_len"]
    counts = Counter(place for (_, place), seeds in lengths.items() for _ in seeds)
    usual = counts.most_common(1)[0][0]
    methods = list(dict.fromkeys(method for method, _ in lengths))
    figure = Figure((10, 3.4), layout="constrained")
    for n, (axes, name) in enumerate(zip(figure.subplots(1, 3, sharey=True), STRESS, strict=True)):
        others = usual[:n] + usual[n + 1 :]
        places = sorted(place for place in counts if place[:n] + place[n + 1 :] == others)
        for method, colour in zip(methods, itertools.cycle(COLOURS)):
            there = [place for place in places if (method, place) in lengths]
            seeds = [[*lengths[method, place].values()] for place in there]
            mean = [np.mean(x) for x in seeds]
            spread = [np.std(x, ddof=1) if len(x) > 1 else 0 for x in seeds]
            if len(there) == 1:
                axes.axhline(mean[0], color=colour, ls="--")
            elif there:
                xs = [place[n] for place in there]
                axes.errorbar(xs, mean, spread, color=colour, marker="o", capsize=3)
            if n == 0:
                axes.plot([], color=colour, label=method.replace("_", " "))
        axes.set(xlabel=name, xscale=STRESS[name], ylim=(0, 5.1))
        axes.set_xticks([place[n] for place in places], [f"{place[n]:,g}" for place in places])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel("Avg. Len.")
    figure.legend(loc="outside lower center", ncols=len(methods), frameon=False)
    D.write(path, partial(figure.savefig, dpi=110, format="png"))
    print(f"to look at: {path}")


def wilson(ok: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a rate of ok in n."""
    from scipy.stats import binomtest

    return binomtest(ok, n).proportion_ci(method="wilson")


def evaluation(path: Path, folder: Path) -> dict:
    """An evaluation's folder, as the report of `folder` shows it."""
    result, chains = read(path / "results.json"), {}
    for log in path.glob("chains*.jsonl"):
        rows = map(json.loads, log.read_text().splitlines())
        chains |= {row["chain"]: row for row in rows if "chain" in row}
    n, shares, sentences = result["chains"], result["success"], result.get("sentences", {})
    squares = sum((2 * k - 1) * share for k, share in enumerate(shares, 1))
    spread = 1.96 * math.sqrt(max(0.0, squares - result["avg_len"] ** 2) / n)
    films = []
    for number, row in sorted(chains.items()):
        gif = path / f"chain_{number:04}.gif"
        if gif.exists():
            tried = row["tasks"][: row["solved"] + 1]
            told = [(sentences[task], k < row["solved"]) for k, task in enumerate(tried)]
            film = {"file": gif.relative_to(folder).as_posix(), "caption": f"chain {number}"}
            films.append(film | {"told": told})
    return {
        "where": "" if path == folder else f"{path.name}/", "result": result, "films": films,
        "shares": [(str(k), x, *wilson(round(x * n), n), "", "") for k, x in enumerate(shares, 1)],
        "tasks": [(task.replace("_", " "), ok / m, *wilson(ok, m), f"{ok}/{m}", sentences.get(task))
                  for task, (ok, m) in result["tasks"].items()],
        "chains": [chains[number] for number in sorted(chains)],
        "spread": spread, "about": read(path / "settings.json").get("evaluation", {}),
    }  # fmt: skip


# ------------------------------------------------------------------ the live page
class Interrupted(Exception):
    """A visitor wants something else."""


def png(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a data URI."""
    file = imageio.imwrite("<bytes>", image, extension=".png")
    return "data:image/png;base64," + base64.b64encode(file).decode()


def imagine(policy, embedding) -> np.ndarray:
    """What the policy's own actions lead to in its world model, from its latent on: (128, 64 n, 3)
    uint8, the static camera above the gripper's. Policy and random numbers stay as they are."""
    dreamer = copy.copy(policy)  # act() replaces the state, and changes nothing in it
    with torch.random.fork_rng():
        cameras = diagnostics.dream(dreamer, None, embedding, AHEAD * HZ - 1)
    return np.concatenate([np.concatenate(images, 1) for images in cameras])


class Robot:
    """What all visitors watch and instruct. It stands between the policy and the environment, as
    evaluate.Filmed does: step() keeps the pace, shows what is seen, and can be interrupted."""

    def __init__(self, worker):
        """worker: evaluate.Worker."""
        self.worker, self.env, worker.env = worker, worker.env, self
        known = calvin.sentences().items()
        self.tasks = {calvin.plain(s): task for task, told in known for s in told}
        self.task, self.words = None, None  # of the instruction; what the policy is told
        self.t, self.due = 0, 0.0  # steps of it; when the next one may begin
        self.wanted, self.shown = ("scene", worker.args.first), {}
        self.changed = threading.Condition()  # wanted or shown

    def __getattr__(self, name):
        return getattr(self.env, name)

    def ask(self, what: str, wish=None) -> None:
        """what: follow (wish: a sentence), scene or stop. It takes the place of what was asked."""
        with self.changed:
            self.wanted = (what, wish)
            self.changed.notify_all()

    def show(self, **news) -> None:
        with self.changed:
            self.shown = self.shown | news
            self.changed.notify_all()

    def events(self):
        """For one visitor, for ever: what changed, in the format of server-sent events."""
        sent = {}
        while True:
            with self.changed:
                if self.shown is sent:
                    self.changed.wait(timeout=10)
                news = {k: x for k, x in self.shown.items() if sent.get(k) != x}
                sent = self.shown
            yield f"data: {json.dumps(news)}\n\n"

    def step(self, action, render: bool = True):
        if self.wanted:
            raise Interrupted
        out, self.t = self.env.step(action, render=render), self.t + 1
        if self.t % 2 == 0:
            self.look(out[0])
        policy = self.worker.policy
        if self.t % HZ == 2 and hasattr(policy, "world"):
            self.show(dream=png(imagine(policy, self.words)))
        self.due = max(self.due + 1 / HZ, time.monotonic())  # it is never faster than real time
        time.sleep(max(0.0, self.due - time.monotonic()))
        return out

    def look(self, obs: dict) -> None:
        rgb = obs["rgb_obs"] if "rgb_obs" in obs else self.env.get_obs()["rgb_obs"]
        static, gripper = png(rgb["rgb_static"]), png(rgb["rgb_gripper"])
        self.show(static=static, gripper=gripper, seconds=self.t / HZ)

    def oracle(self, start, info, _) -> bool:
        return bool(self.task) and self.worker.oracle(start, info, self.task)

    def run(self) -> None:
        """Does what is asked, one wish after the other, for ever."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted)
                (what, wish), self.wanted = self.wanted, None
            try:
                if what == "follow":
                    self.follow(str(wish))
                elif what == "scene":
                    self.scene(random.randrange(1000) if wish is None else wish)
                else:
                    self.show(state="stopped", message="Stopped.")
            except Interrupted:
                pass

    def scene(self, number: int) -> None:
        _, self.attempt = self.worker.start(number, None, self.oracle)
        self.t = 0
        self.look({})
        self.show(state="ready", message=f"Scene {number}.", instruction="", dream="")

    def follow(self, sentence: str) -> None:
        self.task = self.tasks.get(calvin.plain(sentence))
        self.show(state="acting", message="Acting ...", instruction=sentence, dream="")
        try:
            if not self.worker.policy and not self.task:
                near = difflib.get_close_matches(sentence, self.tasks, 5, cutoff=0)
                raise ValueError("\n  ".join([f"{sentence!r} is not known. The nearest:", *near]))
            self.words = self.worker.words[sentence] = self.worker.embed(sentence)
        except (ValueError, D.DataError) as error:
            return self.show(state="refused", message=str(error))
        self.t, self.due = 0, time.monotonic()
        name = sentence if self.worker.policy else self.task
        done, _ = self.attempt(name, self.worker.args.limit)
        self.look({})
        verdict = "Done" if done else "Not done" if self.task else "No task of the 34: you judge"
        self.show(state="done" if done else "failed", message=f"{verdict}, {self.t / HZ:.1f} s.")


def live(worker) -> None:
    """Serves the page, on this machine alone, until Ctrl-C."""
    import flask
    from werkzeug.serving import make_server

    robot, app = Robot(worker), flask.Flask(__name__, template_folder=str(ASSETS))
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]  # no other site may pose as this one
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    about = [worker.about["label"], *Path(worker.args.checkpoint or "").parts[-2:]]
    shown = {"sentences": [*worker.sentences.values()], "about": " / ".join(about)}
    shown |= {"ahead": AHEAD, "dreams": hasattr(worker.policy, "world")}

    @app.post("/ask")
    def ask():
        wish = flask.request.get_json()  # refuses what another site's form can send
        robot.ask(wish["what"], wish["sentence"] if wish["what"] == "follow" else None)
        return "", 204

    @app.get("/events")
    def events():
        return flask.Response(robot.events(), mimetype="text/event-stream")

    @app.get("/")
    def page():
        return flask.render_template("live.html", **shown)

    server = make_server("127.0.0.1", 0, app, threaded=True)  # 0: any free port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"open http://127.0.0.1:{server.server_port}   Ctrl-C ends it", flush=True)
    robot.run()
