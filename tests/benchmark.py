"""How fast is each stage here, and how close to what this machine could do?

    python tests/benchmark.py --preset sim --plain --out plain.json
    python tests/benchmark.py --preset sim --against plain.json        prints the ratios
    python tests/benchmark.py --preset paper --batch_size 8 --sequence_length 16 --windows 16

--plain times what the fast forms replace: fp32, whatever --precision says, and the library's own
transposed convolution for the decoders' first layer.

A stage's limit is the longer of two times: its floating-point operations (products, convolutions,
forward and backward, as PyTorch counts them) at this machine's own rate of a large matrix product
in the same precision, and the bytes that it must copy at its own rate of copying (small ones come
from a cache, and beat that). Nothing is asserted.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import agent as A
import data as D
import train as T
import world_model as W


def seconds(function, device: str, least: float) -> float:
    """Median time of a call, over at least `least` s and 3 calls; the first two are not counted."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(2):
        function()
    while len(times) < 3 or sum(times) < least:
        wait()
        begun = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def machine(device: str, dtype: torch.dtype, n: int | None = None) -> dict:
    """Floating-point operations per second of a matrix product (n x n); bytes per second copied."""
    n = n or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x, y = (torch.zeros(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "flop_rate": 2 * n**3 / seconds(lambda: a @ b, device, 1),
        "copy_rate": x.numel() / seconds(lambda: y.copy_(x), device, 1),
    }


def peak(function, device: str) -> int:
    """Bytes that the tensors made in a call take at most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    made, most = {}, 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        size, where = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            made[where] = size
            most = max(most, sum(made.values()))
        else:  # perhaps of something that was there before
            made.pop(where, None)
    return most


def random_play(root: Path, frames: int) -> str:
    """A packed set of noise; a span of 32 frames in every 100."""
    rng = np.random.default_rng(0)
    for split, n in (("training", frames), ("validation", 640)):
        (root / split).mkdir(parents=True)
        for k, shape in D.SHAPES.items():
            array = D.create_array(root / split / f"{k}.npy", (n, *shape), D.DTYPES[k])
            for i in range(0, n, 1000):
                array[i : i + 1000] = rng.integers(0, 2, (min(1000, n - i), *shape))
        spans = np.arange(0, n - 40, 100)[:, None] + [0, 32]
        emb = rng.normal(size=(len(spans), 384)).astype("f4")
        small = {"spans": spans, "span_emb": emb, "episodes": np.array([[0, n]])}
        for k, x in (small | {"disturbed": np.zeros(n, bool)}).items():
            np.save(root / split / f"{k}.npy", x)
        lang = {"sentences": ["x"] * len(spans), "tasks": ["x"] * len(spans)}
        (root / split / "lang.json").write_text(json.dumps(lang))
    meta = {"format": 1, "source": "noise", "renderer": "none", "hz": 15, "skip": 2}
    meta |= {"action_scale": [0.02, 0.05], "text_encoder": D.TEXT_ENCODER}
    (root / "meta.json").write_text(json.dumps(meta))
    return str(root)


def stages(args: argparse.Namespace, folder: Path):
    """Yields (name, function, bytes that it must move, what it is of)."""
    c, a = W.PRESETS[args.preset], A.PRESETS[args.preset]
    B, L, windows = args.batch_size, args.sequence_length, args.windows
    c = dataclasses.replace(c, batch_size=B or c.batch_size, sequence_length=L or c.sequence_length)
    a = dataclasses.replace(a, batch_size=windows or a.batch_size)
    few, many = (random_play(folder / str(i), n) for i, n in enumerate(args.frames))
    options = {k: getattr(args, k) for k in ("preset", "precision", "device", "graph")}
    run = T.Run(T.RunConfig("wm", **options, data=few, out=str(folder / "run")), c)
    world = W.make_world_model(c).to(run.device)
    optimizer = torch.optim.AdamW(world.parameters(), c.learning_rate, fused=True)
    B, L = c.batch_size * c.length_curriculum, c.sequence_length // c.length_curriculum
    shape = f"{B} sequences of {L}"
    load = {d: D.Sequences(D.PlayData(d, "training"), B, L, 0, c.carry_state) for d in (few, many)}
    batch, step = D.to_device(load[few].batch(0), run.device), iter(range(10**9))
    moved = sum(x.nbytes for x in batch.values())
    update = T.world_model_update(run, world, optimizer)

    def world_step():
        world.train()
        update(batch, world.initial(B), c.learning_rate)
        optimizer.zero_grad()  # a call leaves nothing behind that `peak` would miss

    yield "load", lambda: load[few].batch(next(step)), moved, shape
    yield "load, 20 x", lambda: load[many].batch(next(step)), moved, shape
    yield "world model", world_step, 0, shape
    world.eval().requires_grad_(False)

    def extract():
        with torch.no_grad(), run.precision:
            world.filter(batch, world.initial(B))

    yield "latents", extract, 0, f"{B * L} frames"
    agent = A.Agent(a, c.latent).to(run.device)
    parameters = {"actor": agent.actor_parameters(), "critic": agent.critic.parameters()}
    optimizers = {k: torch.optim.Adam(p, 1e-4, fused=True) for k, p in parameters.items()}
    rates, run.model_config = {"actor": a.actor_lr, "critic": a.critic_lr}, a
    windows = D.WindowBatches(run.data, run.latents(world)[0], world, a, 0)
    windows.world = T.rounded(world) if run.bf16 else world

    def load_windows():
        with run.precision:
            return windows.batch(next(step))

    play, language = load_windows()
    both = [D.to_device(x, run.device) for x in windows.read(0)]
    learn = T.agent_update(run, agent, windows, optimizers)

    def agent_step():
        learn(*both, rates)
        for optimizer in optimizers.values():
            optimizer.zero_grad()

    shape = f"{a.batch_size} windows of {a.sequence_length}"
    bytes_ = sum(x.nbytes for x in (*play.values(), *language.values()))
    yield "load windows", load_windows, bytes_, shape
    yield "agent", agent_step, 0, shape
    policy, black = A.Policy(world, agent), np.zeros((64, 64, 3), np.uint8)
    obs = {"robot_obs": np.zeros(15, np.float32)}
    obs["rgb_obs"] = {"rgb_static": black, "rgb_gripper": black}

    def act():
        policy.act(obs, np.zeros(384, np.float32))

    act()  # makes a plan, which most steps do not
    yield "policy", act, weights_read(act, world, agent), "1 step"


def weights_read(function, *models: torch.nn.Module) -> int:
    """Bytes of the weights of all layers that a call uses."""
    used = set()
    layers = [m for model in models for m in model.modules() if not [*m.children()]]
    hooks = [m.register_forward_hook(lambda m, *_: used.add(m)) for m in layers]
    function()
    for hook in hooks:
        hook.remove()
    return sum(p.nbytes for m in used for p in m.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Times every stage.")
    parser.add_argument("--preset", choices=tuple(W.PRESETS), default="sim")
    parser.add_argument("--precision", default="auto", help="as train.py's")
    parser.add_argument("--plain", action="store_true", help="the forms that are to be beaten")
    for name in ("batch_size", "sequence_length", "windows"):  # of the world model; of the agent
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--seconds", type=float, default=5.0, help="at least, per stage")
    parser.add_argument("--out", type=Path, help="JSON of this run")
    parser.add_argument("--against", type=Path, help="JSON of an earlier run")
    parser.set_defaults(frames=(2000, 40000), device="auto", graph=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.plain:
        args.precision, W.one_pixel = "fp32", lambda x, layer: layer(x[..., None, None])
    bf16 = args.precision == "bf16" or (args.precision == "auto" and T.bf16_is_faster(device))
    here = machine(device, torch.bfloat16 if bf16 else torch.float32)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    here |= {"device": f"{device} {name}", "threads": torch.get_num_threads(), "bf16": bf16}
    then = json.loads(args.against.read_text())["stages"] if args.against else {}
    result = {"preset": args.preset, "machine": here, "torch": torch.__version__, "stages": {}}
    print(f"{here['flop_rate'] / 1e9:.0f} GFLOP/s, {here['copy_rate'] / 1e9:.1f} GB/s copied")
    print(f"{'stage':<14}{'of':<24}{'ms':>9}{'GFLOP':>9}{'limit ms':>10}{'reached':>9}"
          f"{'peak MB':>9}{'times':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for stage, function, moved, of in stages(args, Path(folder)):
            with FlopCounterMode(display=False) as counter:
                function()
            took, flop = seconds(function, device, args.seconds), counter.get_total_flops()
            if stage in then and then[stage]["of"] != of:
                sys.exit(f"{args.against} is of {then[stage]['of']}, this run of {of}")
            limit = max(flop / here["flop_rate"], moved / here["copy_rate"])
            row = {"of": of, "seconds": took, "flop": flop, "bytes": moved, "limit": limit}
            row["peak_bytes"] = peak(function, device)
            result["stages"][stage] = row
            faster = f"{then[stage]['seconds'] / took:.2f}" if stage in then else ""
            print(f"{stage:<14}{of:<24}{1000 * took:>9.1f}{flop / 1e9:>9.1f}{1000 * limit:>10.2f}"
                  f"{limit / took:>9.0%}{row['peak_bytes'] / 1e6:>9.1f}{faster:>8}",
                  flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
