"""Both phases of LUMOS: `--stage wm` learns the world model, `--stage agent` practises inside it.

The only file where data, models, losses and optimisers meet. Phase one (Sec. IV-A) minimises Eq. 2
over sequences of play, then caches the latents of every frame and probes what they know. Phase two
(Sec. IV-B) minimises Eqs. 5 and 6 over imagined windows while the world model stays frozen.
Every field of the configuration is an option (`--batch_size 16`). The same command goes on with a
run that was stopped. OUT gets wm.pt and agent.pt, each one's predecessor (*_previous.pt) and log
(*.jsonl), pictures/, what the latents know (probe.json) and how well the agent follows play
(tracking.json).

examples:
    python train.py --stage wm    --preset sim --data data/play --out runs/sim
    python train.py --stage agent --preset sim --data data/play --out runs/sim
    torchrun --nproc-per-node 8 train.py --stage wm ...      the same batch, shared among 8 GPUs
"""

import copy
import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import time
import timeit
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

import agent as A
import baselines as B
import data as D
import diagnostics
import pages
import plan as P
import world_model as W


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a stage is run. The model's own numbers are Table III (wm) and Table IV (agent)."""

    stage: Literal["wm", "agent", "gcbc", "mcil", "hulc"]  # wm first, then agent; or a baseline
    preset: Literal["paper", "sim", "tiny"] = "paper"  # sizes; sim: the play table, tiny: tests
    data: str = "data/play"  # folder made by data.py pack
    out: str = "runs/lumos"  # folder of checkpoints, log and pictures
    wm: str = ""  # stage agent: the world model to practise in; empty: OUT/wm.pt
    begin: str = ""  # a file with this stage's first weights; empty: random ones
    steps: int = 0  # updates of the weights; 0: the preset's
    seed: int = 0  # of weights, batches and samples
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; auto: the faster
    graph: bool = True  # on CUDA, in one process: a step is recorded once and replayed
    log_every: int = 50  # steps between two records of the log
    validate_every: int = 500  # steps between two looks at held-out play
    checkpoint_every: int = 250  # steps between two checkpoints


# Steps of each stage; the paper does not say [D7].
STEPS = {
    "paper": {"wm": 2_000_000, "agent": 100_000, "baseline": 100_000},
    "sim": {"wm": 12_000, "agent": 20_000, "baseline": 20_000},
    "tiny": {"wm": 300, "agent": 200, "baseline": 200},
}
# What may change when a run goes on. Its schedules are shares of its steps [D7, D25].
RESUMABLE = "steps log_every validate_every checkpoint_every device precision graph out data wm"
RESUMABLE = (*RESUMABLE.split(), "begin", "learning_rate", "actor_lr", "critic_lr")
# Of how older world models were trained, the published one among them.
RETIRED = "gain", "sample_anneal"
# Types of a checkpoint's entries.
KINDS = {"config": dict, "model": dict, "meta": dict, "run": dict, "step": int}
KINDS |= {"seconds": int | float, "text_encoder": str | None}


# ---------------------------------------------------------------------------- checkpoints
def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """A plain dict. The checkpoint before it is kept, too, as NAME_previous.pt."""
    D.write(path, lambda file: torch.save(checkpoint, file), previous(path))


def previous(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_previous")


def check_device(device: str) -> None:
    """DataError: this machine does not have it, or this torch was built without it."""
    remedy = "Give --device cpu, or install a torch for it"
    with D.naming(f"--device {device} cannot be used here", remedy):
        torch.empty(0, device=device)


def load_checkpoint(path: Path, stage: str | None, device: str) -> dict:
    """A plain dict of a stage (None: any), and its path. Stage wm takes an agent's file, too, and
    gives the entries of the world model in it. ValueError, DataError: file and remedy."""
    command = f".venv/bin/python train.py --stage {stage or '|'.join(STAGES)}"
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; make it with: {command}")
    check_device(device)
    remedy = f"copy it anew, or remove it and train again: {command}"
    with D.naming(path, f"It is no checkpoint of train.py, or damaged; {remedy}"):
        if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        c = torch.load(path, map_location=device, weights_only=True)
    got = c.get("stage") if isinstance(c, dict) else type(c).__name__
    needed = {None: [*STAGES], "wm": ["wm", "agent"]}.get(stage, [stage])
    if got not in needed:
        raise ValueError(f"{path} holds stage {got!r}; this needs {' or '.join(needed)}")
    kinds = KINDS | ({"world_model": dict} if got == "agent" else {})
    wrong = [k for k in kinds if k not in c or not isinstance(c[k], kinds[k])]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}; {remedy}")
    with fitting(path, "train.py"):
        D.check_meta(c["meta"])
        replan = c.get("policy", {}).get("replan", 1)
        if not 0 <= c["step"] < 10**9 or not (isinstance(replan, int) and replan >= 1):
            raise ValueError(f"step {c['step']}, replan {replan}")
        STEPS[c["run"]["preset"]], c["run"]["steps"] + c["run"]["seed"]  # or an error
        weights = c["model"] | c.get("world_model", {"model": {}})["model"]
        bad = [name for name, x in weights.items() if not (x.float().abs() <= 1e6).all()]
    if bad:
        raise ValueError(f"{path}: {bad[0]} is not finite, or beyond 1e6; {remedy}")
    part = c["world_model"] if stage == "wm" and got == "agent" else {}
    return c | part | {"path": str(path)}


def same_kind(checkpoint: dict, meta: dict, name) -> None:
    """ValueError unless data or a set-up, of this meta, is of the kind that a checkpoint knows."""
    then, now = ({"frame": "base"} | x for x in (checkpoint["meta"], meta))
    for key in ("hz", "action_scale", "renderer", "frame"):
        there, here = then.get(key), now.get(key)
        if there != here:
            what = f"{checkpoint['path']} was trained on data with {key} {there}, {name} has {here}"
            raise ValueError(f"{what}. Give it data of its kind, or train one on this: --stage wm")


def fitting(path, file: str):
    """Context: DataError, with its name, for a checkpoint that is not of this code's model."""
    what = f"It was trained by another version of {file}, or is damaged"
    return D.naming(path, f"{what}; train it again, or use the code that it was trained with")


def load_world_model(checkpoint: dict, device: str) -> W.WorldModel:
    """The frozen world model of a checkpoint, as load_checkpoint gives it for stage wm."""
    with fitting(checkpoint["path"], "world_model.py"):
        config = {k: x for k, x in checkpoint["config"].items() if k not in RETIRED}
        sim = "spatial_latents" in config
        config = (W.SimWorldModelConfig if sim else W.WorldModelConfig)(**config)
        world = W.make_world_model(config).to(device)
        world.load_state_dict(checkpoint["model"])
    return world.eval().requires_grad_(False)


def load_agent(path, device: str = "cpu", sample: bool = True, **policy):
    """An agent's or a baseline's file -> the policy that acts, and the checkpoint's other entries,
    with its `method`.

    policy: `replan` and `reset_on_replan` where they should not be the checkpoint's.
    """
    c = load_checkpoint(Path(path), None, device)
    if c["stage"] == "wm":
        raise ValueError(f"{path} holds stage 'wm', which does not act; give it --stage agent's")
    weights, skip = c.pop("model"), c["meta"]["skip"]
    if c["stage"] == "agent":
        world = load_world_model(c | c["world_model"], device)
        with fitting(path, "agent.py"):
            agent = A.Agent(A.AgentConfig(**c["config"]), world.config.latent).to(device)
            del agent.critic, agent.slow_critic  # acting needs neither
            agent.load_state_dict({k: x for k, x in weights.items() if "critic" not in k})
            acts = A.Policy(world, agent, skip, sample, **c["policy"] | policy)
    else:
        if "reset_on_replan" in policy:
            raise ValueError(f"{path} is a baseline: --reset_on_replan is for LUMOS alone")
        with fitting(path, "baselines.py"):
            model = B.Baseline(B.BaselineConfig(**c["config"])).to(device)
            model.load_state_dict(weights)
            acts = B.BaselinePolicy(model, skip, **c["policy"] | policy)
    c["method"] = c["config"].get("method", c["stage"])  # as Table I names it
    return acts, {k: x for k, x in c.items() if k not in ("world_model", "optimizer")}


def publish(checkpoint, path) -> None:
    """agent.pt -> a file for others to evaluate, not to train on: half precision, no critics, no
    optimiser."""
    c = load_checkpoint(Path(checkpoint), "agent", "cpu")
    for part in (c, c["world_model"]):
        part["model"] = {k: x.half() for k, x in part["model"].items() if "critic" not in k}
    c["run"] |= {k: getattr(RunConfig, k) for k in ("data", "out", "wm", "begin")}
    c = {k: x for k, x in c.items() if k not in ("optimizer", "random", "path")}
    D.write(Path(path), lambda file: torch.save(c, file))


def identity(weights: dict[str, Tensor]) -> str:
    """A short name of exactly these weights (a state_dict), for the cache of their latents."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------- a run
class Losses(torch.nn.Module):
    """A module whose forward is its loss function: DistributedDataParallel only hooks forward."""

    def __init__(self, module: torch.nn.Module, loss):
        super().__init__()
        self.module, self.forward = module, loss


class Captured:
    """An update of the weights as a CUDA graph: its kernels, some 10,000, are launched as one.

    The first calls run as they are, because libraries and optimisers allocate then. The next one is
    recorded, and from then on replayed. A record reads tensors and numbers where they were copied
    to, and overwrites its last results; where a shape changes, all begins anew.
    """

    WARM_UP = 3

    def __init__(self, update, device: str):
        self.update, self.device, self.shapes = update, device, None
        self.stream = torch.cuda.Stream(device)

    def __call__(self, *arguments):
        given, structure = tree_flatten(arguments)
        shapes = [x.shape if isinstance(x, Tensor) else () for x in given]
        if shapes != self.shapes:
            torch.cuda.synchronize()
            self.fixed = [torch.as_tensor(x, device=self.device).clone() for x in given]
            self.arguments = tree_unflatten(self.fixed, structure)
            self.shapes, self.calls, self.graph, self.result = shapes, 0, None, None
        for fixed, x in zip(self.fixed, given, strict=True):
            if isinstance(x, Tensor):
                fixed.copy_(x)
            else:
                fixed.fill_(x)  # without a copy from the host, which would wait
        self.calls += 1
        if self.calls <= self.WARM_UP:  # on the stream of the record, as autograd wants it
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.update(*self.arguments)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:  # thread_local: the next batch is being read by another thread
            self.graph, how = torch.cuda.CUDAGraph(), {"capture_error_mode": "thread_local"}
            remedy = "A step could not be recorded: repeat the command with --graph false"
            with D.naming("CUDA graph", remedy):
                with torch.cuda.graph(self.graph, stream=self.stream, **how):
                    self.result = self.update(*self.arguments)
        self.graph.replay()
        return self.result


class Run:
    """Device, processes, folder, log and checkpoints of one stage: all but its losses."""

    def __init__(self, config: RunConfig, model_config):
        self.config, self.model_config, self.out = config, model_config, Path(config.out)
        self.settings = dataclasses.asdict(config) | dataclasses.asdict(model_config)
        self.data = D.PlayData(config.data, "training")
        self.held_out = D.PlayData(config.data, "validation")
        self.checkpoint_path = self.out / f"{config.stage}.pt"
        steps = STEPS[config.preset]
        self.steps = config.steps or steps.get(config.stage, steps["baseline"])
        self.figures, self.interrupted = [], False
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = config.device != "cpu" and (config.device == "cuda" or torch.cuda.is_available())
        self.device = kind = "cuda" if cuda else "cpu"
        bf16 = [config.precision == "bf16" or (config.precision == "auto" and bf16_is_faster(kind))]
        if self.ranks > 1:  # torchrun started several of these
            self.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
            if cuda:
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():  # the others wait while one of them caches latents
                backend = "nccl" if cuda else "gloo"
                dist.init_process_group(backend, timeout=timedelta(hours=6))
            dist.broadcast_object_list(bf16)  # rank 0 decides
        check_device(self.device)
        self.bf16 = bf16[0]
        self.precision = torch.autocast(kind, torch.bfloat16, self.bf16)
        self.log = diagnostics.Log(self.out, config.stage, self.rank == 0)
        torch.manual_seed(config.seed)
        if self.rank == 0:
            print(json.dumps(self.settings, indent=1, ensure_ascii=False))
            how = f"{'bf16' if self.bf16 else 'fp32'} products, {self.ranks} processes"
            print(f"{self.steps} steps on {self.device}, {how}")
            if self.device == "cpu" and config.preset == "paper":
                print("note: preset paper is for GPUs; a step takes half a minute here")

    # ------------------------------------------------------------------ several processes
    def shard(self, n: int) -> slice:
        """This process's share of n rows; rank r has the r-th of equal parts."""
        if n % self.ranks:
            what = f"{n} rows cannot be shared by {self.ranks} processes evenly"
            raise ValueError(f"{what}: give another --batch_size, or start another number of them")
        n //= self.ranks
        return slice(self.rank * n, self.rank * n + n)

    def parallel(self, module: torch.nn.Module, loss):
        """`loss`, whose backward averages the gradients of `module` over all processes."""
        if self.ranks == 1:
            return loss
        return DistributedDataParallel(Losses(module, loss), find_unused_parameters=True)

    def captured(self, update):
        """`update`, which must ask for no number, as a CUDA graph where that can be."""
        if "cuda" in self.device and self.ranks == 1 and self.config.graph:
            return Captured(update, self.device)
        return update

    # ------------------------------------------------------------------ steps
    def progress(self, start: int):
        """Steps from `start` on; at the last number, self.steps, only validation is left to do."""
        handler = signal.getsignal(signal.SIGINT)
        if self.ranks == 1:
            signal.signal(signal.SIGINT, self.interrupt)
        else:  # each has its own random numbers from here on
            torch.manual_seed(hash((self.config.seed, start, self.rank)) % 2**63)
        how = {"initial": start, "total": self.steps, "unit": "step", "disable": self.rank > 0}
        try:
            yield from tqdm(range(start, self.steps + 1), **how)
        finally:
            signal.signal(signal.SIGINT, handler)

    def interrupt(self, *_) -> None:
        """Ctrl-C: this step is still made, and saved. A second Ctrl-C ends at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(self, step: int, every: int) -> bool:
        return step > 0 and (step % every == 0 or step == self.steps)

    def validates(self, step: int) -> bool:
        """Rank 0 alone does; a resumed run does not repeat it."""
        due = self.due(step, self.config.validate_every)
        return due and self.rank == 0 and step not in self.log.validated

    def saves(self, done: int) -> bool:
        every = self.config.checkpoint_every, self.config.validate_every
        return self.interrupted or any(self.due(done, n) for n in every)

    def seconds(self) -> float:
        """How long this run has taken until now, also before it was resumed."""
        return time.monotonic() - self.began

    def validated(self, step: int, figures: dict) -> None:
        self.log.write("validate", step, figures, self.seconds())
        self.report()

    def report(self) -> None:
        known = {"steps": self.steps, "processes": self.ranks, "bf16": self.bf16}
        if self.rank == 0:
            known = self.settings | known | {"device": self.device}
            pages.report(self.out, self.config.stage, known)

    @contextmanager
    def aside(self, module: torch.nn.Module):
        """Validation: evaluation mode, no gradients, random numbers of its own."""
        module.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            yield
        module.train()

    def record(self, done: int, figures: dict[str, Tensor]) -> None:
        """Keeps a step's figures on the device, for reading them would wait for it; now and then
        checks them, and logs their means."""
        self.figures.append(torch.stack([x.float().to(self.device) for x in figures.values()]))
        logs = self.due(done, self.config.log_every)
        if logs or self.saves(done):
            table = torch.stack(self.figures)  # (steps, figures)
            bad = (~table.isfinite()).nonzero().tolist()
            if bad:
                row, column = bad[0]
                what = f"{[*figures][column]} is {float(table[row, column])}"
                what += f" at step {done - len(table) + row}. The last checkpoint is kept"
                raise ValueError(f"{what}; try a lower learning rate, or --precision fp32.")
        if logs:
            mean = P.all_gather(table.mean(0)[None]).mean(0)
            means = dict(zip(figures, mean.tolist(), strict=True))
            self.log.write("train", done, means, self.seconds())
            self.figures = []

    def latents(self, world: W.WorldModel) -> list[D.Latents]:
        """Those of both splits in this precision. One process makes them, the others wait."""
        key = identity(world.state_dict()) + ("-bf16" if self.bf16 else "")
        return [D.cache_latents(world, x, key, self.precision) for x in (self.data, self.held_out)]

    # ------------------------------------------------------------------ checkpoints
    def checkpoint_of(self, stage: str, path: Path) -> dict:
        """Another run's. ValueError: its data are not of this data's kind. A note: its world model
        is unfinished."""
        c = load_checkpoint(path, stage, "cpu")
        same_kind(c, self.data.meta, self.config.data)
        if c["stage"] == "wm":
            planned = c["run"]["steps"] or STEPS[c["run"]["preset"]]["wm"]
            if c["step"] < planned and self.rank == 0:
                print(f"note: {path} is of step {c['step']}; its training was not finished")
        return c

    def save(self, step: int, model: torch.nn.Module, optimizers: dict, **more) -> None:
        if self.rank:
            return
        random = {"cpu": torch.get_rng_state()}
        if "cuda" in self.device:
            random["cuda"] = torch.cuda.get_rng_state()
        checkpoint = {
            "stage": self.config.stage, "step": step, "seconds": self.seconds(),
            "config": dataclasses.asdict(self.model_config), "run": dataclasses.asdict(self.config),
            "meta": self.data.meta, "text_encoder": self.data.meta["text_encoder"],
            "frames": len(self.data), "random": random,
            "model": model.state_dict(),
            "optimizer": {k: o.state_dict() for k, o in optimizers.items()},
        }  # fmt: skip
        save_checkpoint(self.checkpoint_path, checkpoint | more)
        if self.interrupted:
            raise KeyboardInterrupt(f"{self.checkpoint_path} holds step {step}")

    def resume(self, model: torch.nn.Module, optimizers: dict) -> tuple[int, dict]:
        """Loads the last checkpoint if there is one. Returns the step to go on from, and it."""
        c = self.last_checkpoint()
        self.began = time.monotonic() - c.get("seconds", 0.0)
        if c:
            self.refuse_another(c)
            begin = c["run"].get("begin", "")  # it stays what these weights began with
            if self.config.begin not in ("", begin) and self.rank == 0:
                print(f"note: --begin is for new runs; {c['path']} goes on with its own weights")
            self.config = dataclasses.replace(self.config, begin=begin)
        self.log.cut(c.get("step", 0))  # of what comes after, for those steps are done again
        if not c:
            if self.config.begin:
                self.load_first_weights(model)
            return 0, {}
        with fitting(c["path"], "its model, or in another world model"):
            model.load_state_dict(c["model"])
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(c["optimizer"][name])
                for p, state in optimizer.state.items():  # moments in the parameters' layout
                    moments = {k: x for k, x in state.items() if x.shape == p.shape}
                    state.update({k: torch.empty_like(p).copy_(x) for k, x in moments.items()})
            torch.set_rng_state(c["random"]["cpu"])
            if "cuda" in self.device and "cuda" in c["random"]:
                torch.cuda.set_rng_state(c["random"]["cuda"])
        if self.rank == 0:
            print(f"going on from step {c['step']} of {c['path']}")
        return c["step"], c

    def load_first_weights(self, model: torch.nn.Module) -> None:
        """Those of --begin."""
        c = self.checkpoint_of(self.config.stage, Path(self.config.begin))
        if self.config.stage != "wm":  # which sees no sentences
            D.same_text_encoder(c["text_encoder"], self.data.meta["text_encoder"], c["path"])
        own = model.state_dict()
        # Published agents have no critic: theirs begins with random weights.
        missing = {k for k in own.keys() - c["model"].keys() if "critic" not in k}
        other = [k for k, x in c["model"].items() if k not in own or own[k].shape != x.shape]
        if missing or other:
            what = f"{c['path']} holds a model of another size or method"
            raise ValueError(f"{what}: give the options that it was trained with")
        model.load_state_dict(own | c["model"])

    def last_checkpoint(self) -> dict:
        """The last one; the one before it where that is damaged; or nothing."""
        paths = [p for p in (self.checkpoint_path, previous(self.checkpoint_path)) if p.exists()]
        for path in paths:
            try:
                return load_checkpoint(path, self.config.stage, "cpu")
            except (ValueError, D.DataError) as error:
                if path == paths[-1]:
                    raise
                print(f"note: {error}; going back to {paths[-1]}")
        return {}

    def refuse_another(self, c: dict) -> None:
        """ValueError where a checkpoint cannot go on with this configuration or this data."""
        path = c["path"]
        if {"optimizer", "random"} - c.keys():
            what = f"{path} was published without its optimiser, or is damaged"
            raise ValueError(f"{what}: it cannot be trained on. Give another --out.")
        here = self.settings | self.data.meta | {"frames": len(self.data)}
        there = c["run"] | c["config"] | c["meta"] | {"frames": c.get("frames")}
        names = [k for k in here | c["meta"] if k not in RESUMABLE]
        changed = [k for k in names if there.get(k) != here.get(k)]
        if changed:
            lines = [f"  {k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in changed]
            what = f"{path} was trained with another configuration or on other data"
            remedy = "Give the same to go on with it, or another --out."
            raise ValueError("\n".join([f"{what}:", *lines, remedy]))


def bf16_is_faster(device: str) -> bool:
    """Whether bf16 matrix products are faster than fp32 here. On a CPU that is measured: some that
    have instructions for them (Intel's without AMX) take twice as long as in fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()  # not in every torch
    if not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False

    seconds = {}
    for dtype in 10 * (torch.float32, torch.bfloat16):  # in turns: the machine may be busy
        x = torch.ones(512, 512, dtype=dtype)
        took = timeit.timeit(lambda: x @ x, number=1)  # noqa: B023
        seconds[dtype] = min(took, seconds.get(dtype, took))
    return seconds[torch.bfloat16] < seconds[torch.float32]


def prefetched(batches, device: str):
    """Batches (tuples of dicts) on the device; a thread reads the next one during each step."""

    def read() -> tuple[dict, ...] | None:
        batch = next(batches, None)
        if batch is None or device == "cpu":
            return batch
        return tuple({k: x if x.is_cuda else x.pin_memory() for k, x in b.items()} for b in batch)

    with ThreadPoolExecutor(1) as reader:
        batch = read()
        while batch is not None:
            coming = reader.submit(read)
            yield tuple(D.to_device(x, device) for x in batch)
            batch = coming.result()


def left(step: int, steps: int, share: float) -> float:
    """1, and in the last `share` of the steps a line from 1 to 0."""
    return min(1.0, (steps - step) / max(1.0, share * steps))


def take_step(optimizer: torch.optim.Optimizer, rate: float | Tensor, clip: float) -> Tensor:
    """Clips the gradients and moves the weights at a learning rate. Returns their norm ()."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    group["capturable"] = isinstance(rate, Tensor) and torch.cuda.is_current_stream_capturing()
    norm = torch.nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()
    return norm


# ---------------------------------------------------------------------------- stage wm
def world_model_update(run: Run, world: W.WorldModel, optimizer):
    """update(batch, state, rate) -> Eq. 2's terms, the last state: one step."""
    c, losses = run.model_config, run.parallel(world, world.loss)

    def update(batch: dict, state: W.State, rate) -> tuple[dict, W.State]:
        # Eq. 2, over B sequences of L frames, and its gradient
        with run.precision:
            loss, terms, state = losses(batch, state)
        optimizer.zero_grad()
        loss.backward()
        return terms | {"gradient": take_step(optimizer, rate, c.gradient_clip)}, state

    return run.captured(update)


def train_world_model(run: Run) -> None:
    """Phase one, Sec. IV-A: Eq. 2 by AdamW (Table III) over sequences of play."""
    c, data, device = run.model_config, run.data, run.device
    world = W.make_world_model(c).to(device)
    mean, std = data.robot_obs.mean(0), data.robot_obs.std(0)
    world.set_statistics(torch.from_numpy(mean), torch.from_numpy(std).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(
        world.parameters(), c.learning_rate, eps=c.adam_epsilon, weight_decay=c.weight_decay,
        fused=True,
    )  # fmt: skip
    start, checkpoint = run.resume(world, {"world": optimizer})

    # Sequences; in the first half of the steps, n times as many, n times shorter [D25].
    B, L, n = c.batch_size, c.sequence_length, c.length_curriculum
    if "cuda" in device:
        data.keep_on(device, torch.cuda.mem_get_info(device)[0])
    whole = D.Sequences(data, B, L, run.config.seed, c.carry_state, run.shard(B))
    pieces = D.Sequences(data, B * n, L // n, run.config.seed, c.carry_state, run.shard(B * n))
    order = ((pieces if step < run.steps / 2 else whole, step) for step in range(start, run.steps))
    batches = prefetched(((sequences.batch(step),) for sequences, step in order), device)
    held_out = D.Sequences(run.held_out, min(B, len(run.held_out) // L), L, 0, carry=False)
    clips = diagnostics.eventful(run.held_out, min(55, run.held_out.longest))

    with fitting(checkpoint.get("path"), "train.py"):
        state = [x[run.shard(B)].to(device) for x in checkpoint.get("state") or world.initial(B)]
    update = world_model_update(run, world, optimizer)
    world.train()
    for step in run.progress(start):
        if run.validates(step):
            figures = []
            with run.aside(world):
                for i in range(4):
                    batch = D.to_device(held_out.batch(i), device)
                    fresh = world.initial(batch["reset"].shape[1])
                    with run.precision:
                        figures.append(world.loss(batch, fresh)[1])
                batch = D.to_device(clips, device)
                guess = world.predict(batch, diagnostics.CONTEXT)
                picture = diagnostics.prediction_picture(batch, *guess, data.meta["hz"])
            diagnostics.write_images(run.out / f"pictures/prediction_{step:07d}.png", picture)
            run.validated(step, diagnostics.mean(figures))
        if step == run.steps:
            break

        rate = c.learning_rate * left(step, run.steps, c.anneal)  # it falls to 0 [D25]
        (batch,) = next(batches)
        if not c.carry_state:
            state = world.initial(batch["reset"].shape[1])
        figures, state = update(batch, state, rate)

        run.record(step + 1, figures)
        if run.saves(step + 1):
            carried = [P.all_gather(x) for x in state]
            run.save(step + 1, world, {"world": optimizer}, state=carried)

    # What the agent needs: the latents of every frame. And do they know the scene?
    world.eval().requires_grad_(False)
    if run.rank:
        return
    latents = run.latents(world)
    if data.meta["source"] != "robot":  # a real scene has no scene_obs
        probe = diagnostics.probe(world, (latents[0], data), (latents[1], run.held_out))
        D.write_json(run.out / "probe.json", {"step": run.steps} | probe)
        print(f"probe of held-out latents (median errors; chance: the training split's): {probe}")
    options = f"--preset {run.config.preset} --data {run.config.data} --out {run.config.out}"
    print(f"next: .venv/bin/python train.py --stage agent {options}")


# ---------------------------------------------------------------------------- stage agent
def rounded(world: W.WorldModel) -> W.WorldModel:
    """A copy whose products have bf16 weights already. Under autocast it computes the same: that
    rounds trained weights once a step, but frozen ones anew at every use."""
    world = copy.deepcopy(world)
    for module in world.modules():
        if type(module) in (torch.nn.Linear, torch.nn.GRUCell):  # subclasses stay in fp32
            module.bfloat16()
    return world


def agent_update(run: Run, agent: A.Agent, windows: D.WindowBatches, optimizers: dict):
    """update(play, language, rates) -> figures: one step, from two of `windows.read`'s."""
    c, losses = run.model_config, run.parallel(agent, agent.losses)

    def update(play: dict, language: dict, rates: dict) -> dict:
        # Eqs. 3 to 6, over play windows and windows with a sentence, and their gradients
        with run.precision:
            play, language = windows.states(play), windows.states(language)
            loss_actor, loss_critic, figures = losses(windows.world, play, language)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        (loss_actor + loss_critic).backward()  # they share no parameter: see test_eq5, test_eq6
        for name, optimizer in optimizers.items():
            figures[f"gradient_{name}"] = take_step(optimizer, rates[name], c.gradient_clip)
        return figures

    return run.captured(update)


def train_agent(run: Run) -> None:
    """Phase two, Sec. IV-B: Eqs. 5 and 6 by Adam (Table IV) inside the frozen world model."""
    c, data, device = run.model_config, run.data, run.device
    wm = run.checkpoint_of("wm", Path(run.config.wm or run.out / "wm.pt"))
    world = load_world_model(wm, device)
    latents = run.latents(world)

    torch.manual_seed(run.config.seed)
    agent = A.Agent(c, world.config.latent).to(device)
    actor_optimizer = torch.optim.Adam(agent.actor_parameters(), c.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), c.critic_lr, fused=True)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    start, old = run.resume(agent, optimizers)
    if old and identity(old["world_model"]["model"]) != identity(wm["model"]):
        what = f"{old['path']} was trained in another world model than {wm['path']}"
        raise ValueError(f"{what}; remove it, or give another --out.")

    windows = D.WindowBatches(data, latents[0], world, c, run.config.seed, run.shard)
    windows.world = rounded(world) if run.bf16 else world  # under autocast only
    held_out = D.WindowBatches(run.held_out, latents[1], world, c, 0)
    batches = prefetched((windows.read(step) for step in range(start, run.steps)), device)
    update = agent_update(run, agent, windows, optimizers)
    agent.train()
    for step in run.progress(start):
        if run.validates(step):
            with run.aside(agent):
                figures = diagnostics.track(agent, world, held_out)
            D.write_json(run.out / "tracking.json", {"step": step} | figures)
            run.validated(step, figures)
        if step == run.steps:
            break

        if step % c.slow_critic_interval == 0:
            agent.update_slow_critic()  # [D18]
        share = left(step, run.steps, c.anneal)  # [D25]
        rates = {"actor": c.actor_lr * share, "critic": c.critic_lr * share}
        run.record(step + 1, update(*next(batches), rates))
        if run.saves(step + 1):
            part = {k: wm[k] for k in ("config", "model", "step", "seconds")}
            policy = A.POLICY_PRESETS[run.config.preset]
            run.save(step + 1, agent, optimizers, world_model=part, policy=policy)
    if run.rank == 0:
        source = data.meta["source"]
        env = "real --robot SETUP.json" if source == "robot" else source
        options = f"--env {env} --checkpoint {run.checkpoint_path}"
        print(f"next: .venv/bin/python evaluate.py {options}")


# ---------------------------------------------------------------------------- the baselines
def train_baseline(run: Run) -> None:
    """GCBC, MCIL and HULC (Sec. V-A, App. C) by Adam, from images: no world model, no reward."""
    c, device = run.model_config, run.device
    model = B.Baseline(c).to(device)
    optimizer = torch.optim.Adam(model.parameters(), c.lr, fused=True)
    start, _ = run.resume(model, {"model": optimizer})
    windows = D.play_and_language(run.data, c, run.config.seed, run.shard)
    held_out = D.play_and_language(run.held_out, c, 0)
    steps = range(start, run.steps)
    batches = prefetched((tuple(D.with_images(w, i) for w in windows) for i in steps), device)
    loss_of = run.parallel(model, model.loss)
    model.train()
    for step in run.progress(start):
        if run.validates(step):
            figures = []
            with run.aside(model), run.precision:
                for i in range(4):
                    both = (D.to_device(D.with_images(w, i), device) for w in held_out)
                    figures.append(model.loss(*both)[1])
            run.validated(step, diagnostics.mean(figures))
        if step == run.steps:
            break

        optimizer.param_groups[0]["lr"] = c.lr * left(step, run.steps, c.anneal)
        play, language = next(batches)
        with run.precision:
            loss, figures = loss_of(play, language)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        run.record(step + 1, figures)
        if run.saves(step + 1):
            policy = B.POLICY_PRESETS[run.config.preset]
            run.save(step + 1, model, {"model": optimizer}, policy=policy)


# ---------------------------------------------------------------------------- command line
# Of each stage: the presets of its model, and its loop.
STAGES = {"wm": (W.PRESETS, train_world_model), "agent": (A.PRESETS, train_agent)}
for name, switches in B.METHODS.items():
    presets = {k: dataclasses.replace(c, **switches) for k, c in B.PRESETS.items()}
    STAGES[name] = presets, train_baseline


def parse(arguments: list[str] | None = None) -> tuple[RunConfig, object]:
    """The command line, made from the dataclasses' fields. A typo is an error."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    words = [re.sub("(^|=)(true|false)$", lambda found: found[0].title(), x) for x in arguments]
    # Stage and preset come first: they say which model's fields are options, and their defaults.
    plain = [x for x in words if x not in ("-h", "--help")]
    example = {} if plain == words else {"default": RunConfig("wm")}  # --help needs no --stage
    run, _ = tyro.cli(RunConfig, args=plain, return_unknown_args=True, **example)
    model = STAGES[run.stage][0][run.preset]
    fields = [(k, tyro.conf.OmitArgPrefixes[type(x)]) for k, x in (("run", run), ("model", model))]
    both = dataclasses.make_dataclass("Options", fields)
    options = tyro.cli(
        both, args=words, default=both(run, model), description=__doc__, use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )  # fmt: skip
    for name, value in (vars(options.run) | vars(options.model)).items():
        number = type(value) is int or name.endswith(("lr", "learning_rate"))
        zero = name in ("steps", "seed", "shift")  # may be 0; shift: of a baseline's images
        if number and (value < 0 or (value == 0 and not zero)):
            raise ValueError(f"--{name} {value}: {'0 or more' if zero else 'above 0'}")
    if options.run.wm and run.stage != "agent":
        raise ValueError("--wm is where stage agent practises; first weights: --begin FILE")
    return options.run, options.model


def main(arguments: list[str] | None = None) -> None:
    with D.command("train.py"):
        config, model_config = parse(arguments)
        first = int(os.environ.get("RANK", 0)) == 0
        with D.locked(Path(config.out)) if first else nullcontext():
            run = Run(config, model_config)
            STAGES[config.stage][1](run)
            run.report()
            if first:
                print(f"{config.stage}: {run.checkpoint_path}; to look at: {run.out}/report.html")
            if run.ranks > 1:  # the others wait for rank 0; leaving threads behind aborts a process
                dist.barrier()
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
