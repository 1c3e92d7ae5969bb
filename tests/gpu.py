"""Everything that only a GPU can tell, in one command of at most eight minutes: `make gpu`.

    python tests/gpu.py                                        writes results/gpu_NAME.json
    python tests/gpu.py --device cpu --preset tiny --out DIR   the same parts, to try this script

Compares the GPU with the CPU and CUDA graphs with plain steps, times every stage at Tables III and
IV, and trains both. A line per finding; the file is written anew after each, so that a cut leaves
what was found. The play is that of --play (`make gpu` records it where PyBullet is), else noise.
Needs: torch, numpy, tqdm, imageio, filelock.
"""

import argparse
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import benchmark  # beside this file

import agent as A
import data as D
import diagnostics
import plan as P
import train as T
import world_model as W

ROOT = Path(T.__file__).parent
WANTED = {"world model": 0.025, "agent": 0.030}  # s for a step of Table III, of Table IV, one H100


class Report:
    """What was found: printed, and written at once."""

    def __init__(self, path: Path, limit: float):
        self.path, self.begun, self.limit = path, time.monotonic(), limit
        self.stdout, self.found, self.failed = sys.stdout, {"findings": {}}, []

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begun)

    def say(self, name: str, ok: bool | None = None, **figures) -> None:
        """ok: whether it is as it should be; None: nothing was asked."""
        rounded = {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in figures.items()}
        text = ", ".join(f"{k} {x}" for k, x in rounded.items())
        verdict = {None: "      ", True: "ok    ", False: "FAILED"}[ok]
        line = f"{self.limit - self.left():5.0f} s  {verdict}  {name}: {text}"
        print(line, file=self.stdout, flush=True)
        self.found["findings"][name] = figures if ok is None else figures | {"ok": ok}
        self.found["seconds"] = round(self.limit - self.left(), 1)
        self.failed += [name] if ok is False else []
        D.write_json(self.path, self.found)


# ---------------------------------------------------------------------------- is it right?
@contextmanager
def same_draws():
    """Draws that are alike on all devices. Samples are their means, for rounding flips samples."""

    def mean(logits):
        return logits.float().softmax(-1).flatten(-2)

    def full(*size, device=None):
        size = size[0] if len(size) == 1 else size
        return torch.full(tuple(size), 0.3, device=device)

    with ExitStack() as stack:
        for owner, name, draw in (
            (W, "sample_straight_through", mean), (P, "sample_straight_through", mean),
            (torch, "rand", full), (torch, "randn_like", lambda x: torch.full_like(x, 0.3)),
            (torch, "randint", lambda n, size, device: torch.zeros(size, device=device).long()),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, draw))
        yield


def losses(preset: str, play: str, device: str):
    """Yields (name, model, function of its loss) for both stages, a few rows of each."""
    c, a, n = W.PRESETS[preset], A.PRESETS[preset], 4
    torch.manual_seed(0)
    world, agent = W.make_world_model(c).to(device), A.Agent(a, c.latent).to(device)
    agent.recognition.eval()  # no dropout
    sequences = D.Sequences(D.PlayData(play, "training"), n, 8, 0).batch(0)
    sequences = D.to_device(sequences, device)
    yield "world model", world, lambda: world.loss(sequences, world.initial(n))[0]
    g = torch.Generator().manual_seed(0)
    s_E = torch.randn(a.sequence_length, n, c.latent, generator=g).tanh()
    windows = {"s_E": s_E, "a": torch.randn(len(s_E), n, 7, generator=g).tanh()}
    told = windows | {"emb": torch.randn(n, 384, generator=g), "align": torch.ones(n) > 0}
    both = [D.to_device(x, device) for x in (windows, told)]
    world.requires_grad_(False)
    yield "agent", agent, lambda: sum(agent.losses(world, *both)[:2])


def compare_losses(report: Report, preset: str, play: str, device: str) -> None:
    """Losses and gradients: this device in fp32, with TF32 as torch's defaults have it, and in
    bf16, against the CPU in fp32."""
    tf32, found = torch.backends.cudnn.allow_tf32, {}
    cases = {"cpu": ("cpu", False, False), "fp32": (device, False, False)}
    cases |= {"default": (device, False, tf32), "bf16": (device, True, tf32)}
    for case, (where, bf16, convolutions) in cases.items():
        torch.backends.cudnn.allow_tf32 = convolutions
        for name, model, loss_of in losses(preset, play, where):
            with same_draws(), torch.autocast(where, torch.bfloat16, bf16):
                loss = loss_of()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            gradient = torch.cat([x.float().cpu().flatten() for x in gradients])
            found[name, case] = loss.item(), gradient
    torch.backends.cudnn.allow_tf32 = tf32
    most = {"fp32": (1e-4, 1e-4), "default": (1e-2, 5e-2), "bf16": (2e-2, 3e-1)}
    for name in ("world model", "agent"):
        right, right_gradient = found[name, "cpu"]
        for case, (a, b) in most.items():
            loss, gradient = found[name, case]
            loss = abs(loss / right - 1)
            gradient = float((gradient - right_gradient).norm() / right_gradient.norm())
            ok = loss < a and gradient < b
            report.say(f"{name}, {case} against the CPU", ok, loss=loss, gradient=gradient)


def compare_frames(report: Report, play: str, device: str) -> None:
    """Frames that are kept on the device are the disk's."""
    disk, kept = D.PlayData(play, "training"), D.PlayData(play, "training")
    keeps = kept.keep_on(device, 2**40)
    index = np.random.default_rng(0).integers(0, len(disk), (8, 16))
    pairs = zip(disk.frames(index).values(), kept.frames(index).values(), strict=True)
    same = keeps and all(torch.equal(a, b.cpu()) for a, b in pairs)
    report.say("kept frames are the disk's", same, frames=len(kept))


def trained(stage: str, preset: str, out: Path, **options) -> dict[str, torch.Tensor]:
    """A training. Returns its weights; those of critics and statistics among them."""
    c = T.STAGES[stage][0][preset]
    if stage == "agent":
        c = dataclasses.replace(c, slow_critic_interval=min(c.slow_critic_interval, 5))
    out.mkdir(parents=True, exist_ok=True)
    config = T.RunConfig(stage, preset, out=str(out), **options)
    with quiet(), mock.patch.object(diagnostics, "probe", PROBE):
        T.STAGES[stage][1](T.Run(config, c))
    return torch.load(out / f"{stage}.pt", map_location="cpu", weights_only=True)["model"]


PROBE = functools.partial(diagnostics.probe, steps=20)


@contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def compare_runs(report: Report, preset: str, play: str, device: str, folder: Path) -> None:
    """CUDA graphs learn what plain steps do, with schedules, two lengths of sequences, validation
    between the steps and a copy of the critic; a run that goes on equals one without a pause.

    Weights' difference is measured in what they have moved. Plain steps again tell how much of it
    is the device's own: some of cuDNN's gradients are summed in any order.
    """
    how = {"data": play, "device": device, "log_every": 6, "validate_every": 6}
    how |= {"checkpoint_every": 7}
    for stage, wm in (("wm", ""), ("agent", str(folder / "plain/wm.pt"))):
        run = functools.partial(trained, stage, preset, **how, wm=wm)
        steps = {"start": 1, "plain": 12, "again": 12, "graph": 12}
        runs = {k: run(folder / k, steps=n, graph=k == "graph") for k, n in steps.items()}
        (folder / "resumed").mkdir(exist_ok=True)
        shutil.copy(folder / "graph" / f"{stage}_previous.pt", folder / "resumed" / f"{stage}.pt")
        runs["resumed"] = run(folder / "resumed", steps=12)
        names = [k for k, x in runs["plain"].items() if x.dtype == torch.float32 and x.dim()]
        flat = {k: torch.cat([w[name].flatten() for name in names]) for k, w in runs.items()}
        moved = (flat["plain"] - flat["start"]).norm()
        noise = float((flat["again"] - flat["plain"]).norm() / moved)
        # Other draws, or a step that is lost, are as much as was moved.
        pairs = {"a graph's run is the plain one": ("graph", "plain")}
        pairs["resumed, it is the same"] = "resumed", "graph"
        for name, (a, b) in pairs.items():
            off = float((flat[a] - flat[b]).norm() / moved)
            report.say(f"{stage}: {name}", off <= max(0.02, 3 * noise), off=off, plain_again=noise)


# ---------------------------------------------------------------------------- how fast is it?
def time_stages(report: Report, args: argparse.Namespace, took: dict, folder: Path) -> None:
    """Every stage, plain and as it is trained. took: gets the latter's seconds."""
    dtype = torch.bfloat16 if T.bf16_is_faster(args.device) else torch.float32
    n = None if args.device == "cuda" else 256
    here = benchmark.machine(args.device, dtype, n)
    rates = {"TFLOP_per_s": here["flop_rate"] / 1e12, "TB_per_s": here["copy_rate"] / 1e12}
    report.say("machine", dtype=str(dtype), **rates)
    flop = {}
    frames = (4000, 4000) if args.device == "cuda" else (300, 300)
    for graph in (False, True):
        how = {"preset": args.preset, "precision": "auto", "device": args.device, "graph": graph}
        how |= {"batch_size": None, "sequence_length": None, "windows": None, "frames": frames}
        stages = benchmark.stages(argparse.Namespace(**how), folder / f"stages_{graph}")
        with quiet():
            for stage, function, moved, of in stages:
                if stage.startswith("load, ") or (graph and stage not in WANTED):
                    continue
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                if not graph:
                    with FlopCounterMode(display=False) as counter:
                        function()
                    flop[stage] = counter.get_total_flops()
                    if stage in WANTED:
                        longest(report, stage, function, args.device)
                took[stage] = benchmark.seconds(function, args.device, args.seconds)
                limit = max(flop[stage] / here["flop_rate"], moved / here["copy_rate"])
                figures = {"ms": 1000 * took[stage], "of": of, "limit_ms": 1000 * limit}
                figures |= {"reached": limit / took[stage], "GFLOP": flop[stage] / 1e9}
                if args.device == "cuda":  # with weights, optimisers and what else is there
                    figures["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
                fast = took[stage] <= WANTED[stage] if stage in WANTED and graph else None
                asked = fast if args.device == "cuda" and args.preset == "paper" else None
                report.say(f"{stage}, {'as trained' if graph else 'plain'}", asked, **figures)


def longest(report: Report, stage: str, function, device: str) -> None:
    """The ten kernels that take longest, and how many there are."""
    function()
    cuda = device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds, acc_events=True) as seen:
        function()
        if cuda:
            torch.cuda.synchronize()
    what = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in seen.key_averages() if not cuda or e.device_type.name == "CUDA"]
    events.sort(key=lambda e: -getattr(e, what))
    for i, e in enumerate(events[:10]):
        report.say(f"{stage}, kernel {i}", ms=getattr(e, what) / 1e3, calls=e.count, kernel=e.key)
    ms = sum(getattr(e, what) for e in events) / 1e3
    report.say(f"{stage}, kernels", number=sum(e.count for e in events), ms=ms)


# ---------------------------------------------------------------------------- does it learn?
def train_both(report: Report, args: argparse.Namespace, took: dict, play: str, out: Path) -> None:
    """Each stage for --train seconds, or for as long as is left. Every record is a finding."""
    write = diagnostics.Log.write
    names = {"wm": ("world model", "loss"), "agent": ("agent", "action_mse")}
    graph = "agent, as trained" in report.found["findings"]  # it could be recorded
    for stage, (name, figure) in names.items():
        losses = []

        def spy(log, kind, step, figures, seconds, stage=stage, figure=figure, losses=losses):
            write(log, kind, step, figures, seconds)
            kept = {k: float(x) for k, x in figures.items()}
            losses.extend([kept[figure]] if kind == "train" else [])
            report.say(f"train {stage}, {kind} {step}", seconds=float(seconds), **kept)

        share = (report.left() - 20) / (2 if stage == "wm" else 1) - 20
        steps = int(min(max(args.train, 8 * took[name]), share) / took[name])
        if steps < 8:
            report.say(f"train {stage}", left_s=report.left(), note="no time was left")
            return
        how = {"data": play, "device": args.device, "graph": graph, "steps": steps}
        how |= {"log_every": steps // 8, "validate_every": steps, "checkpoint_every": steps}
        with mock.patch.object(diagnostics.Log, "write", spy):
            trained(stage, args.preset, out, **how)
        falls = losses[-1] < losses[0] if args.preset == "paper" else None
        figures = {"steps": steps, "first": losses[0], "last": losses[-1]}
        report.say(f"train {stage}: {figure} falls", falls, **figures)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that only a GPU can tell.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(W.PRESETS), default="paper")
    parser.add_argument("--play", type=Path, default=ROOT / "runs/gpu_play", help="packed")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--limit", type=float, default=460, help="s, of all")
    parser.add_argument("--train", type=float, default=90, help="s, of either stage")
    parser.add_argument("--seconds", type=float, default=1.5, help="at least, of a timed stage")
    args = parser.parse_args(arguments)
    T.check_device(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report = Report(args.out / f"gpu_{device.lower().replace(' ', '_')}.json", args.limit)
    report.found = {"device": device, "torch": torch.__version__, "preset": args.preset,
                    "cuda": torch.version.cuda, **report.found}  # fmt: skip
    small = "sim" if args.preset == "paper" else args.preset
    with tempfile.TemporaryDirectory() as name:
        folder, took = Path(name), {}
        play = str(folder / "play")  # a copy, for latents are cached beside it
        if args.play.exists():
            shutil.copytree(args.play, play)
        else:
            benchmark.random_play(Path(play), 2000 if args.device == "cuda" else 600)
        report.say("play", source=D.PlayData(play, "training").meta["source"])
        parts = {
            "losses": lambda: compare_losses(report, args.preset, play, args.device),
            "frames": lambda: compare_frames(report, play, args.device),
            "runs": lambda: compare_runs(report, small, play, args.device, folder),
            "times": lambda: time_stages(report, args, took, folder),
            "training": lambda: train_both(report, args, took, play, folder / "training"),
        }
        for part, work in parts.items():
            try:
                work()
            except Exception as error:  # the other parts are still worth their minutes
                report.say(part, False, error=f"{type(error).__name__}: {error}")
    print(f"{report.path}: {len(report.found['findings'])} findings, failed: {report.failed}")
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
