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
        text = ", ".join(f"{k} {x:.4g}" if isinstance(x, float) else f"{k} {x}"
                         for k, x in figures.items())  # fmt: skip
        verdict = {None: "      ", True: "ok    ", False: "FAILED"}[ok]
        print(f"{self.limit - self.left():5.0f} s  {verdict}  {name}: {text}", file=self.stdout,
              flush=True)  # fmt: skip
        self.found["findings"][name] = figures if ok is None else figures | {"ok": ok}
        self.found["seconds"] = round(self.limit - self.left(), 1)
        self.failed += [name] if ok is False else []
        D.write_json(self.path, self.found)


# ---------------------------------------------------------------------------- is it right?
@contextmanager
def same_draws():
    """Draws that are alike on all devices. Samples are their means, for rounding flips samples."""

    def mean(logits, softness=0.0):
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


def world_model_loss(preset: str, device: str) -> tuple:
    """The loss and the model, of some noise."""
    c, (L, B) = W.PRESETS[preset], (8, 4)
    g = torch.Generator().manual_seed(0)
    batch = {f"rgb_{k}": torch.randint(256, (L, B, 64, 64, 3), generator=g) for k in W.CAMERAS}
    batch = {k: x.to(torch.uint8) for k, x in batch.items()}
    batch |= {"a_prev": torch.randn(L, B, 7, generator=g).tanh(), "reset": torch.zeros(L, B) > 0}
    batch["robot_obs"] = torch.randn(L, B, 15, generator=g)
    world = W.make_world_model(c).to(device)

    def loss(precision):
        with same_draws(), precision:
            return world.loss(D.to_device(batch, device), world.initial(B))[0]

    return world, loss


def agent_loss(preset: str, device: str) -> tuple:
    c, a, n = W.PRESETS[preset], A.PRESETS[preset], 4
    g = torch.Generator().manual_seed(0)
    world = W.make_world_model(c).requires_grad_(False).to(device)
    agent = A.Agent(a, c.latent).to(device)
    agent.recognition.eval()  # no dropout
    s_E = torch.randn(a.sequence_length, n, c.latent, generator=g).tanh()
    play = {"s_E": s_E, "a": torch.randn(len(s_E), n, 7, generator=g).tanh()}
    play["length"] = torch.full((n,), a.min_window)
    language = play | {"emb": torch.randn(n, 384, generator=g), "align": torch.ones(n) > 0}
    both = [D.to_device(x, device) for x in (play, language)]

    def loss(precision):
        with same_draws(), precision:
            return sum(agent.losses(world, *both)[:2])

    return agent, loss


def compare_losses(report: Report, preset: str, device: str) -> None:
    """Losses and gradients: this device in fp32, with TF32 as torch's defaults have it, and in
    bf16, against the CPU in fp32."""
    tf32 = torch.backends.cudnn.allow_tf32
    cases = {"cpu": ("cpu", False, False), "fp32": (device, False, False)}
    cases |= {"default": (device, False, tf32), "bf16": (device, True, tf32)}
    most = {"fp32": (1e-4, 1e-4), "default": (1e-2, 5e-2), "bf16": (2e-2, 3e-1)}
    for name, make in (("world model", world_model_loss), ("agent", agent_loss)):
        found = {}
        for case, (where, bf16, convolutions) in cases.items():
            torch.manual_seed(0)
            torch.backends.cudnn.allow_tf32 = convolutions
            model, loss_of = make(preset, where)
            loss = loss_of(torch.autocast(where, torch.bfloat16, bf16))
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found[case] = loss.item(), torch.cat([x.float().cpu().flatten() for x in gradients])
        (loss, gradient), torch.backends.cudnn.allow_tf32 = found["cpu"], tf32
        for case, (a, b) in most.items():
            off = abs(found[case][0] / loss - 1), relative(found[case][1], gradient)
            report.say(f"{name}, {case} against the CPU", off[0] < a and off[1] < b,
                       loss=off[0], gradient=off[1])  # fmt: skip


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm().clamp_min(1e-30))


def compare_frames(report: Report, play: str, device: str) -> None:
    """Frames that are kept on the device are the disk's."""
    disk, kept = D.PlayData(play, "training"), D.PlayData(play, "training")
    keeps = kept.keep_on(device, 2**40)
    index = np.random.default_rng(0).integers(0, len(disk), (8, 16))
    pairs = zip(disk.frames(index).values(), kept.frames(index).values(), strict=True)
    report.say("kept frames are the disk's", keeps and all(torch.equal(a, b.cpu())
               for a, b in pairs), frames=len(kept))  # fmt: skip


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
    for stage in ("wm", "agent"):
        wm = str(folder / "plain" / "wm.pt")
        run = functools.partial(trained, stage, preset, **how, wm=wm if stage == "agent" else "")
        start = run(folder / f"start_{stage}", steps=1, graph=False)
        plain = run(folder / "plain", steps=12, graph=False)
        again = run(folder / "again", steps=12, graph=False)
        graph = run(folder / "graph", steps=12)
        (folder / "resumed").mkdir(exist_ok=True)
        shutil.copy(folder / "graph" / f"{stage}_previous.pt", folder / "resumed" / f"{stage}.pt")
        resumed = run(folder / "resumed", steps=12)
        names = [k for k, x in plain.items() if x.dtype == torch.float32 and x.dim()]

        def flat(weights, names=names):
            return torch.cat([weights[k].flatten() for k in names])

        moved, off = flat(plain) - flat(start), {}
        pairs = {"plain again": (again, plain), "a graph's run is the plain one": (graph, plain)}
        pairs |= {"resumed, it is the same": (resumed, graph)}
        for name, (a, b) in pairs.items():
            off[name] = float((flat(a) - flat(b)).norm() / moved.norm())
        # Other draws, or a step that is lost, are as much as was moved.
        noise = off.pop("plain again")
        for name, x in off.items():
            report.say(f"{stage}: {name}", x <= max(0.02, 3 * noise),
                       off=x, plain_again=noise)  # fmt: skip


# ---------------------------------------------------------------------------- how fast is it?
def time_stages(report: Report, args: argparse.Namespace, took: dict, folder: Path) -> None:
    """Every stage, plain and as it is trained. took: gets the latter's seconds."""
    dtype = torch.bfloat16 if T.bf16_is_faster(args.device) else torch.float32
    n = None if args.device == "cuda" else 256
    here = benchmark.machine(args.device, dtype, n)
    report.say("machine", dtype=str(dtype), TFLOP_per_s=here["flop_rate"] / 1e12,
               TB_per_s=here["copy_rate"] / 1e12)  # fmt: skip
    flop = {}
    frames = (4000, 4000) if args.device == "cuda" else (300, 300)
    for graph in (False, True):
        how = {"preset": args.preset, "precision": "auto", "device": args.device, "graph": graph}
        how |= {"batch_size": None, "sequence_length": None, "windows": None, "frames": frames}
        with quiet():
            for stage, function, moved, of in benchmark.stages(
                argparse.Namespace(**how), folder / f"stages_{graph}"
            ):
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
        rows = []

        def spy(log, kind, step, figures, seconds, stage=stage, rows=rows):
            write(log, kind, step, figures, seconds)
            kept = {k: float(x) for k, x in figures.items()}
            rows.append(kept | {"kind": kind})
            report.say(f"train {stage}, {kind} {step}", seconds=float(seconds), **kept)

        share = (report.left() - 20) / (2 if stage == "wm" else 1) - 20
        steps = int(min(max(args.train, 8 * took[name]), share) / took[name])
        if steps < 8:
            report.say(f"train {stage}", left_s=report.left(), note="no time was left")
            return
        every = {"log_every": max(1, steps // 8), "validate_every": steps}
        with mock.patch.object(diagnostics.Log, "write", spy):
            trained(stage, args.preset, out, data=play, device=args.device, steps=steps,
                    checkpoint_every=steps, graph=graph, **every)  # fmt: skip
        losses = [row[figure] for row in rows if row["kind"] == "train"]
        falls = losses[-1] < losses[0] if args.preset == "paper" else None
        report.say(f"train {stage}: {figure} falls", falls, steps=steps, first=losses[0],
                   last=losses[-1])  # fmt: skip


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
            "losses": lambda: compare_losses(report, args.preset, args.device),
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
