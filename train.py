"""Both phases of LUMOS: `--stage wm` learns the world model, `--stage agent` practises inside it.

    python data.py pack RECORDING data/play --skip 2
    python train.py --stage wm    --preset sim --data data/play --out runs/sim
    python train.py --stage agent --preset sim --data data/play --out runs/sim

The only file where data, models, losses and optimisers meet. Phase one (Sec. IV-A) minimises Eq. 2
over sequences of play, then caches the latents of every frame and probes what they know. Phase two
(Sec. IV-B) minimises Eqs. 5 and 6 over imagined windows while the world model stays frozen.
Every field of the configuration is an option (`--batch_size 16`); a run that was stopped at any
moment goes on from its last checkpoint when the same command is given again.

    torchrun --nproc-per-node 8 train.py --stage wm ...      the same batch, shared among 8 GPUs
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import agent as A
import data as D
import diagnostics
import world_model as W


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a stage is run. The model's own numbers are Table III (wm) and Table IV (agent)."""

    stage: str  # wm | agent
    preset: str = "paper"  # paper | sim | tiny
    data: str = "data/play"  # packed by data.py
    out: str = "runs/lumos"  # checkpoints, log, pictures; holds wm.pt when the agent is trained
    steps: int = 0  # 0: the preset's
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # fp32 | bf16 (matrix products only; losses stay fp32) | the faster
    compile: bool = False  # torch.compile the losses: a minute or more, again for every new shape
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 250


# Steps of each stage; the paper does not say [D7].
STEPS = {
    "paper": {"wm": 2_000_000, "agent": 100_000},
    "sim": {"wm": 12_000, "agent": 20_000},
    "tiny": {"wm": 300, "agent": 200},
}
DEVICES = ("auto", "cpu", "cuda")
RANKS = {"RANK": "0", "WORLD_SIZE": "1"}  # torchrun's, and what they are without it
# Given again with more steps, a run goes on, but its schedules are shares of them [D7, D25, D26].
RESUMABLE = "steps log_every validate_every checkpoint_every device compile out data forget".split()


# ---------------------------------------------------------------------------- checkpoints
def save_checkpoint(path: Path, checkpoint: dict) -> None:
    D.write(path, lambda file: torch.save(checkpoint, file))


def check_device(device: str) -> None:
    """ValueError: this machine does not have it, or this torch was built without it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"--device {device} cannot be used here: {error}"
        raise ValueError(f"{what}. Give --device cpu, or install a torch for it.") from error


def load_checkpoint(path: Path, stage: str | None, device: str) -> dict:
    """A plain dict of one of the two stages (None: either), and its path. Raises ValueError naming
    the file and the remedy."""
    command = f"python train.py --stage {stage or 'wm'}"
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; make it with: {command}")
    check_device(device)
    remedy = f"copy it anew, or remove it and train again: {command}"
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        what = f"{path} is no checkpoint of train.py, or damaged"
        raise ValueError(f"{what}; {remedy} ({error})") from error
    got = checkpoint.get("stage") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if got not in ((stage,) if stage else ("wm", "agent")):
        raise ValueError(
            f"{path} holds stage {got!r}; this needs one of --stage {stage or 'wm or agent'}"
        )
    needs = "config model meta run step seconds text_encoder".split()
    needs += ["world_model"] if got == "agent" else []
    if missing := [k for k in needs if k not in checkpoint]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; {remedy}")
    return checkpoint | {"path": str(path)}


def same_kind(checkpoint: dict, data: D.PlayData, name: str) -> None:
    """ValueError unless data is of the kind that a world model has seen."""
    for key in ("hz", "action_scale", "renderer", "frame"):
        named = ({"frame": "base"} | meta for meta in (checkpoint["meta"], data.meta))
        there, here = (meta.get(key) for meta in named)
        if there != here:
            what = f"{checkpoint['path']} was trained on data with {key} {there}, {name} has {here}"
            raise ValueError(f"{what}. Give it data of its kind, or train one on this: --stage wm")


@contextmanager
def fitting(path, file: str):
    """A checkpoint that is not of this code's model is told by name: ValueError."""
    try:
        yield
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        what = f"{path} was trained by another version of {file}, or is damaged"
        what += "; train it again, or use the code that it was trained with"
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def load_world_model(checkpoint: dict, device: str) -> W.WorldModel:
    """The frozen world model of a checkpoint of either stage."""
    part = checkpoint if checkpoint["stage"] == "wm" else checkpoint["world_model"]
    with fitting(checkpoint["path"], "world_model.py"):
        world = W.WorldModel(W.WorldModelConfig(**part["config"])).to(device)
        world.load_state_dict(part["model"])
    return world.eval().requires_grad_(False)


def load_agent(path, device: str = "cpu", sample: bool = True) -> tuple[A.Policy, dict]:
    """runs/.../agent.pt -> the policy that acts, and the checkpoint's other entries."""
    checkpoint = load_checkpoint(Path(path), "agent", device)
    world = load_world_model(checkpoint, device)
    with fitting(path, "agent.py"):
        config, sizes = A.AgentConfig(**checkpoint["config"]), world.config
        agent = A.Agent(config, sizes.deterministic, sizes.latent).to(device)
        agent.load_state_dict(checkpoint.pop("model"))
        policy = A.Policy(world, agent, skip=checkpoint["meta"]["skip"], sample=sample)
    return policy, {k: x for k, x in checkpoint.items() if k not in ("world_model", "optimizer")}


def publish(checkpoint, path) -> None:
    """runs/.../agent.pt -> a file for others to evaluate and not to train on: half precision, no
    optimiser, a third of the size."""
    c = load_checkpoint(Path(checkpoint), "agent", "cpu")
    half = lambda model: {k: x.half() for k, x in model.items()}
    c["world_model"]["model"], c["model"] = half(c["world_model"]["model"]), half(c["model"])
    c["run"] |= {"data": RunConfig.data, "out": RunConfig.out}  # nobody else has these folders
    save_checkpoint(
        Path(path), {k: x for k, x in c.items() if k not in ("optimizer", "random", "path")}
    )


def identity(weights: dict[str, Tensor]) -> str:
    """A short name of exactly these weights (a state_dict), for the cache of their latents."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------- a run
class Losses(torch.nn.Module):
    """A module whose forward is its loss function, for DistributedDataParallel hooks on forward."""

    def __init__(self, module: torch.nn.Module, loss):
        super().__init__()
        self.module, self.forward = module, loss


class Run:
    """Device, folder, log and checkpoint of one stage: what both loops need around their losses."""

    def __init__(self, config: RunConfig, model_config, data: D.PlayData):
        self.config, self.model_config, self.data = config, model_config, data
        self.device = config.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = self.device
        self.rank, self.ranks = (int(os.environ.get(k, n)) for k, n in RANKS.items())
        if self.ranks > 1 and kind == "cuda":
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(self.device)
        if self.ranks > 1:  # under torchrun
            if kind == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():  # the others wait while rank 0 caches latents
                dist.init_process_group(
                    "nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6)
                )
        self.bf16 = config.precision == "bf16"
        if config.precision == "auto":
            faster = [bf16_is_faster(kind)]
            if self.ranks > 1:  # rank 0 decides
                dist.broadcast_object_list(faster)
            self.bf16 = faster[0]
        self.autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=self.bf16)
        self.out = Path(config.out)
        (self.out / "pictures").mkdir(parents=True, exist_ok=True)
        self.checkpoint_path = self.out / f"{config.stage}.pt"
        self.log_path = self.out / f"{config.stage}.jsonl"
        self.steps = config.steps or STEPS[config.preset][config.stage]
        self.names, self.figures, self.seconds, self.validated = [], [], 0.0, set()
        self.board = None
        torch.manual_seed(config.seed)
        if self.rank:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard" / config.stage)
        except ImportError:  # an optional extra
            pass
        settings = dataclasses.asdict(config) | dataclasses.asdict(model_config)
        print(json.dumps(settings, indent=1, ensure_ascii=False))
        products = "bf16" if self.bf16 else "fp32"
        how = f"{products} products, {self.steps} steps, {self.ranks} processes"
        print(f"device {self.device}, {how}")

    def part(self, n: int) -> slice:
        """This process's share of n rows; rank r has the r-th of equal parts."""
        if n % self.ranks:
            what = f"{n} rows cannot be shared by {self.ranks} processes evenly"
            raise ValueError(f"{what}: another --batch_size, or another number of processes")
        n //= self.ranks
        return slice(self.rank * n, self.rank * n + n)

    def shared(self, module: torch.nn.Module, loss):
        """`loss`, whose backward averages the gradients of `module` over all processes."""
        if self.config.compile:
            loss = torch.compile(loss, dynamic=False)
        if self.ranks == 1:
            return loss
        return DistributedDataParallel(Losses(module, loss), find_unused_parameters=True)

    def whole(self, x: Tensor) -> Tensor:
        """The rows of all processes, without gradients."""
        if self.ranks == 1:
            return x.clone()
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def latents(self, world: W.WorldModel, data: D.PlayData) -> D.Latents:
        key = identity(world.state_dict()) + "-bf16" * self.bf16
        return D.cache_latents(world, data, key, self.device, self.autocast)

    def first(self, function, *args):
        """Rank 0 does it, the others wait for it and then do it too: they find it done."""
        if self.rank == 0:
            out = function(*args)
        if self.ranks > 1:
            dist.barrier()
        return function(*args) if self.rank else out

    def resume(self, modules: dict, optimizers: dict) -> tuple[int, dict]:
        """Loads the last checkpoint if there is one. Returns the step to go on from, and it."""
        if not self.checkpoint_path.exists():
            if self.rank == 0:
                self.log_path.unlink(missing_ok=True)
            return 0, {}
        c = load_checkpoint(self.checkpoint_path, self.config.stage, "cpu")
        if {"optimizer", "random"} - c.keys():
            what = f"{self.checkpoint_path} was published, without its optimiser, or is damaged"
            sys.exit(f"{what}: it cannot be trained on. Give another --out.")
        now = dataclasses.asdict(self.config) | dataclasses.asdict(self.model_config)
        then = c["run"] | c["config"]
        changed = [k for k in now if k not in RESUMABLE and now[k] != then.get(k)]
        if changed:
            lines = "\n".join(f"  --{k}: {then.get(k)!r} there, {now[k]!r} here" for k in changed)
            sys.exit(
                f"{self.checkpoint_path} was trained with another configuration:\n{lines}\n"
                "Give the same options to go on with it, or another --out to begin anew."
            )
        here = self.data.meta | {"frames": len(self.data)}
        there = c["meta"] | {"frames": c.get("frames", len(self.data))}
        if there != here:
            sys.exit(
                f"{self.checkpoint_path} was trained on other data, {there}; "
                f"{self.config.data} is {here}. Give that data, or another --out."
            )
        for name, module in modules.items():
            try:
                module.load_state_dict(c[name])
            except RuntimeError as error:
                what = f"{self.checkpoint_path} does not fit this model or its world model"
                raise ValueError(f"{what}; give another --out: {error}") from error
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(c["optimizer"][name])
            for p, state in optimizer.state.items():  # fused ones pair them as they lie in memory
                moments = {k: x for k, x in state.items() if x.shape == p.shape}
                state.update({k: torch.empty_like(p).copy_(x) for k, x in moments.items()})
        torch.set_rng_state(c["random"]["cpu"])
        if self.device.startswith("cuda") and "cuda" in c["random"]:
            torch.cuda.set_rng_state(c["random"]["cuda"])
        self.seconds = c["seconds"]
        if self.rank:
            return c["step"], c
        # Records after the checkpoint belong to steps that will be done again.
        if self.log_path.exists():
            lines = self.log_path.read_text().splitlines(keepends=True)
            with D.naming(self.log_path, "Remove the damaged line"):
                records = [json.loads(x) for x in lines if x.endswith("\n")]
                records = [r for r in records if r["step"] <= c["step"]]
                self.validated = {r["step"] for r in records if r["kind"] == "validate"}
            text = "".join(json.dumps(r) + "\n" for r in records)
            D.write(self.log_path, lambda file: file.write(text.encode()))
        print(f"going on from step {c['step']} of {self.checkpoint_path}")
        return c["step"], c

    def save(self, step: int, modules: dict, optimizers: dict, **more) -> None:
        if self.rank:
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.startswith("cuda"):
            random["cuda"] = torch.cuda.get_rng_state()
        checkpoint = {
            "stage": self.config.stage, "step": step, "seconds": self.seconds,
            "config": dataclasses.asdict(self.model_config), "run": dataclasses.asdict(self.config),
            "meta": self.data.meta, "text_encoder": self.data.meta["text_encoder"],
            "frames": len(self.data),
            "optimizer": {k: o.state_dict() for k, o in optimizers.items()}, "random": random,
        }  # fmt: skip
        checkpoint |= {k: m.state_dict() for k, m in modules.items()} | more
        save_checkpoint(self.checkpoint_path, checkpoint)

    def add(self, figures: dict[str, Tensor]) -> None:
        """Collects one step's figures where they are: reading them would wait for the device."""
        self.names = [*figures]
        self.figures.append(torch.stack([x.float() for x in figures.values()]))

    def check(self, done: int) -> None:
        """The first figure since the last log that is not finite ends the run by name and step."""
        table = torch.stack(self.figures)  # (steps, figures)
        if len(bad := (~table.isfinite()).nonzero()):
            row, column = bad[0].tolist()
            sys.exit(
                f"{self.names[column]} is {float(table[row, column])} at step "
                f"{done - len(table) + row}. The last checkpoint is kept; try a lower learning "
                "rate, or --precision fp32."
            )

    def log(self, step: int, figures: dict | None = None) -> None:
        """Without `figures`: the means since the last call. One line, one JSONL record."""
        kind = "validate" if figures is not None else "train"
        if figures is None:
            mean = self.whole(torch.stack(self.figures).mean(0)[None]).mean(0)
            figures = dict(zip(self.names, mean.tolist(), strict=True))
            self.figures = []
        if self.rank:
            return
        record = {"step": step, "kind": kind, "hours": round(self.seconds / 3600, 4)}
        record |= {k: float(f"{float(v):.5g}") for k, v in figures.items()}
        with D.naming(self.log_path, D.MAKE_ROOM), self.log_path.open("a") as f:
            f.write(json.dumps(record) + "\n")
        tqdm.write("  ".join(f"{k} {v}" for k, v in record.items()), file=sys.stdout)
        for k, v in figures.items() if self.board else ():
            self.board.add_scalar(f"{kind}/{k}", v, step)

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """(H, W, 3) uint8, kept as pictures/name_step.png and shown in TensorBoard."""
        path = self.out / "pictures" / f"{name}_{step:07d}.png"
        png = imageio.imwrite("<bytes>", image, extension=".png")
        D.write(path, lambda file: file.write(png))
        if self.board:
            self.board.add_image(name, image, step, dataformats="HWC")

    def loop(self, start: int, update, validate, save) -> None:
        """update(step) -> figures, for every step; validation and checkpoints in between."""
        if self.ranks > 1:  # each has its own random numbers from here on
            torch.manual_seed(hash((self.config.seed, start, self.rank)) % 2**63)
        due = lambda done, every: done % every == 0 or done == self.steps

        def look(done: int) -> None:
            if due(done, self.config.validate_every) and self.rank == 0:
                # Fixed random numbers, and the training's own ones left where they were.
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(0)
                    validate(done)

        if start and start not in self.validated:  # it was stopped just there
            look(start)
        how = {"initial": start, "total": self.steps, "unit": "step", "disable": self.rank > 0}
        for step in tqdm(range(start, self.steps), **how):
            begun = time.monotonic()
            self.add(update(step))
            done = step + 1
            looks = due(done, self.config.validate_every)
            saves = due(done, self.config.checkpoint_every) or looks
            logs = due(done, self.config.log_every)
            if logs or saves:
                self.check(done)  # waits for the device: `seconds` are right after it
            self.seconds += time.monotonic() - begun
            if logs:
                self.log(done)
            if saves:
                save(done)  # first: a picture that cannot be written costs no steps
            look(done)


@functools.cache
def bf16_is_faster(device: str) -> bool:
    """Whether bf16 matrix products are faster than fp32 here. On a CPU that is measured: some that
    have instructions for them (Intel's without AMX) take twice as long as in fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()  # not in every torch
    if not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):
        for dtype, times in seconds.items():
            x = torch.ones(512, 512, dtype=dtype)
            begun = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - begun)
    return min(seconds[torch.bfloat16]) < min(seconds[torch.float32])


# ---------------------------------------------------------------------------- stage wm
def train_world_model(run: Run) -> None:
    """Phase one, Sec. IV-A: Eq. 2 by AdamW (Table III) over sequences of play."""
    c, data, device = run.model_config, run.data, run.device
    held_out = D.PlayData(run.config.data, "validation")
    world = W.WorldModel(c).to(device)
    if c.proprioception:
        world.robot_mean.copy_(torch.from_numpy(data.robot_obs.mean(0)))
        world.robot_std.copy_(torch.from_numpy(data.robot_obs.std(0)).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(
        world.parameters(), c.learning_rate, eps=c.adam_epsilon, weight_decay=c.weight_decay,
        fused=True,
    )  # fmt: skip
    modules, optimizers = {"model": world}, {"world": optimizer}
    start, checkpoint = run.resume(modules, optimizers)
    B, L = c.batch_size, c.sequence_length
    if device.startswith("cuda"):
        data.keep_on(device, torch.cuda.mem_get_info(device)[0], quiet=run.rank > 0)
    sequences, pieces = (
        D.Sequences(data, B * n, L // n, run.config.seed, c.carry_state, run.part(B * n))
        for n in (1, c.shorter)
    )
    validation = D.Sequences(held_out, min(B, len(held_out) // L), L, 0, carry=False)
    clips = diagnostics.eventful(held_out, min(55, held_out.longest))
    state = [x[run.part(B)].to(device) for x in checkpoint.get("state") or world.initial(B)]
    losses = run.shared(world, world.loss)

    read = lambda step: (pieces if step < run.steps / 2 else sequences).batch(step)  # [D26]
    batches = prefetched(read, start, run.steps, device)

    def update(step: int) -> dict:
        nonlocal state
        left = (run.steps - step) / max(1.0, c.anneal * run.steps)
        optimizer.param_groups[0]["lr"] = c.learning_rate * min(1.0, left)  # [D7]
        world.softness.fill_(max(0.0, 1 - (step + 1) / max(1.0, c.harden * run.steps)))  # [D25]
        batch = next(batches)
        if not c.carry_state:
            state = world.initial(batch["reset"].shape[1])
        world.train()
        with run.autocast():
            loss, terms, state = losses(batch, state)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(world.parameters(), c.gradient_clip)
        optimizer.step()
        return terms | {"gradient": norm}

    def validate(step: int) -> None:
        world.eval()
        figures = []
        for i in range(4):
            batch = D.to_device(validation.batch(i), device)
            with run.autocast():
                figures.append(world.loss(batch, world.initial(batch["reset"].shape[1]))[1])
        run.picture(
            "prediction", step, diagnostics.prediction_picture(world, D.to_device(clips, device))
        )
        run.log(step, {k: sum(float(f[k]) for f in figures) / len(figures) for k in figures[0]})

    def save(step: int) -> None:
        run.save(step, modules, optimizers, state=[run.whole(x) for x in state])

    run.loop(start, update, validate, save)
    world.eval().requires_grad_(False)
    if run.rank:
        return
    latents = [run.latents(world, x) for x in (data, held_out)]
    if data.meta["source"] != "robot":  # a real scene has no scene_obs
        pairs = zip(latents, (data, held_out), strict=True)
        figures = {"step": run.steps} | diagnostics.probe(world, *pairs, device)
        diagnostics.write_json(run.out / "probe.json", figures)
        print("probe of held-out latents (median errors; chance: the training split's median):")
        print(json.dumps(figures))
    print(
        f"\nworld model: {run.checkpoint_path}\nnext: python train.py --stage agent --preset "
        f"{run.config.preset} --data {run.config.data} --out {run.config.out}"
    )


# ---------------------------------------------------------------------------- stage agent
def rounded(world: W.WorldModel) -> W.WorldModel:
    """A copy whose products have bf16 weights already. Under autocast it computes the same: that
    rounds trained weights once a step, but frozen ones anew at every use."""
    world = copy.deepcopy(world)
    for module in world.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.GRUCell):
            module.bfloat16()
    return world


def train_agent(run: Run) -> None:
    """Phase two, Sec. IV-B: Eqs. 5 and 6 by Adam (Table IV) inside the frozen world model."""
    c, data, device = run.model_config, run.data, run.device
    held_out = D.PlayData(run.config.data, "validation")
    world_checkpoint = load_checkpoint(run.out / "wm.pt", "wm", "cpu")
    same_kind(world_checkpoint, data, run.config.data)
    D.same_text_encoder(world_checkpoint["text_encoder"], data.meta["text_encoder"], run.out)
    done, planned = world_checkpoint["step"], world_checkpoint["run"]["steps"]
    if done < (planned or STEPS[world_checkpoint["run"]["preset"]]["wm"]) and run.rank == 0:
        print(f"note: {run.out / 'wm.pt'} is of step {done}; its training was not finished")
    world = load_world_model(world_checkpoint, device)
    latents = [run.first(run.latents, world, x) for x in (data, held_out)]
    batches = D.WindowBatches(data, latents[0], c, world, run.config.seed, device, run.part)
    validation = D.WindowBatches(held_out, latents[1], c, world, 0, device)
    torch.manual_seed(run.config.seed)
    agent = A.Agent(c, world.config.deterministic, world.config.latent).to(device)
    actor_optimizer = torch.optim.Adam(agent.actor_parameters(), c.actor_lr, fused=True)
    critic_optimizer = torch.optim.AdamW(
        agent.critic.parameters(), c.critic_lr, weight_decay=c.critic_weight_decay, fused=True
    )
    modules = {"model": agent}
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    start, old = run.resume(modules, optimizers)
    if old and identity(old["world_model"]["model"]) != identity(world_checkpoint["model"]):
        sys.exit(
            f"{run.checkpoint_path} was trained in another world model than {run.out / 'wm.pt'}; "
            "remove it, or give another --out."
        )

    batches.world = rounded(world) if run.bf16 else world  # from here on under autocast only
    losses = run.shared(agent, functools.partial(agent.losses, batches.world))
    coming = prefetched(batches.read, start, run.steps, device)

    def update(step: int) -> dict:
        agent.train()
        if step % c.slow_critic_interval == 0:
            agent.update_slow_critic()  # [D18]
        with run.autocast():
            loss_actor, loss_critic, figures = losses(batches.states(next(coming)))
        actor_optimizer.zero_grad(), critic_optimizer.zero_grad()
        (loss_actor + loss_critic).backward()  # they share no parameter: see test_eq5, test_eq6
        left = min(1.0, (run.steps - step) / max(1.0, c.anneal * run.steps))  # [D7]
        for name, optimizer, rate in (
            ("actor", actor_optimizer, c.actor_lr), ("critic", critic_optimizer, c.critic_lr)
        ):  # fmt: skip
            group = optimizer.param_groups[0]
            group["lr"] = rate * left
            norm = torch.nn.utils.clip_grad_norm_(group["params"], c.gradient_clip)
            figures[f"gradient_{name}"] = norm
            optimizer.step()
        return figures

    def validate(step: int) -> None:
        agent.eval()
        figures = [agent.track(world, validation.batch(i, reset_start=1.0)) for i in range(4)]
        mean = {k: sum(float(f[k]) for f in figures) / len(figures) for k in figures[0]}
        span = mean["reward_expert"] - mean["reward_hold"]
        for plan in ("proposed", "recognised") if agent.with_plan else ("proposed",):
            mean[f"tracking_{plan}"] = (mean[f"reward_{plan}"] - mean["reward_hold"]) / span
        diagnostics.write_json(run.out / "tracking.json", {"step": step} | mean)  # the last one
        run.log(step, mean)

    def save(step: int) -> None:
        world_part = {k: world_checkpoint[k] for k in ("config", "model", "step", "seconds")}
        run.save(step, modules, optimizers, world_model=world_part)

    run.loop(start, update, validate, save)
    if run.rank:
        return
    source = data.meta["source"]
    env = "real --robot SETUP.json" if source == "robot" else source
    print(
        f"\nagent: {run.checkpoint_path}\n"
        f"next: python evaluate.py --env {env} --checkpoint {run.checkpoint_path}"
    )


# ---------------------------------------------------------------------------- command line
def prefetched(read, start: int, end: int, device: str):
    """read(step) for each step, on the device; the next is read while this one is trained on."""

    def pinned(step: int) -> dict[str, Tensor]:
        pin = lambda x: x.pin_memory() if "cuda" in device and x.device.type == "cpu" else x
        return {k: pin(x) for k, x in read(step).items()}

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(pinned, start)
        for step in range(start, end):
            batch = coming.result()
            if step + 1 < end:
                coming = reader.submit(pinned, step + 1)
            yield D.to_device(batch, device)


def boolean(text: str) -> bool:
    """ValueError, which argparse reports, for anything but true and false."""
    return bool(("false", "true").index(text.lower()))


def parse(arguments: list[str] | None = None) -> tuple[RunConfig, object]:
    """The command line, made from the dataclasses' fields. A typo is an error."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--stage", choices=("wm", "agent"), required=True)
    known.add_argument("--preset", choices=tuple(STEPS), default="paper")
    first, _ = known.parse_known_args(arguments)
    presets = W.PRESETS if first.stage == "wm" else A.PRESETS
    parser = argparse.ArgumentParser(parents=[known], allow_abbrev=False)
    model = presets[first.preset]
    fields = [(f, f.default) for f in dataclasses.fields(RunConfig)[2:]]
    fields += [(f, getattr(model, f.name)) for f in dataclasses.fields(model)]
    for field, default in fields:
        kind = boolean if field.type is bool else field.type
        parser.add_argument(f"--{field.name}", type=kind, default=default, metavar=str(default))
    options = vars(parser.parse_args(arguments))
    for name, allowed in (("precision", ("auto", "fp32", "bf16")), ("device", DEVICES)):
        if options[name] not in allowed:
            parser.error(f"--{name} {options[name]}: one of {', '.join(allowed)}")
    least = {"log_every": 1, "validate_every": 1, "checkpoint_every": 1, "steps": 0, "seed": 0}
    for name, n in least.items():
        if options[name] < n:
            parser.error(f"--{name} {options[name]}: at least {n}")
    pick = lambda cls: cls(**{f.name: options[f.name] for f in dataclasses.fields(cls)})
    return pick(RunConfig), pick(type(model))


def main(arguments: list[str] | None = None) -> None:
    config, model_config = parse(arguments)
    try:
        run = Run(config, model_config, D.PlayData(config.data, "training"))
        (train_world_model if config.stage == "wm" else train_agent)(run)
        if run.ranks > 1:  # the others wait for rank 0; leaving threads behind aborts a process
            dist.barrier()
            dist.destroy_process_group()
    except (ValueError, OSError, D.DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
