"""What a GPU will be asked to do, as far as a CPU can tell: the script, and CUDA graphs."""

import contextlib
import dataclasses
import json
from unittest import mock

import gpu
import pytest
import torch
import torch.nn.functional as F
from conftest import AGENT, OFTEN, WM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
import world_model as W

# Rates that fp32 has exactly, for a graph reads them from tensors.
RATES = {"wm": ["--learning_rate", str(2**-10)]}
RATES["agent"] = ["--actor_lr", str(2**-10), "--critic_lr", str(2**-10)]
PIECES = "--batch_size 2 --carry_state false --length_curriculum 2".split()


def run(stage, packed, trained, out, *more):
    options = [*WM, *PIECES] if stage == "wm" else [*AGENT, "--wm", f"{trained}/wm.pt"]
    options += [*OFTEN, *RATES[stage], "--data", packed, "--out", str(out), *more]
    train.main(options)
    return torch.load(out / f"{stage}.pt", weights_only=True)["model"]


def test_the_script_goes_through_all_of_its_parts_on_a_cpu(packed, tmp_path, monkeypatch):
    few = dataclasses.replace(W.PRESETS["tiny"], batch_size=2)
    monkeypatch.setitem(W.PRESETS, "tiny", few)
    how = f"--device cpu --preset tiny --seconds 0 --train 1 --limit 3600 --play {packed}"
    code = gpu.main([*how.split(), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_cpu.json").read_text())["findings"]
    assert code == 0, [f for f in found.items() if not f[1].get("ok", True)]
    assert found.keys() > {
        "world model, bf16 against the CPU", "kept frames are the disk's", "machine",
        "wm: a graph's run is the plain one", "agent: resumed, it is the same", "policy, plain",
        "world model, kernel 9", "agent, as trained", "train agent: action_mse falls",
    }  # fmt: skip


# ------------------------------------------------------------------ CUDA graphs
class Graph:
    """Stands for a CUDA graph: `replay` does again what was recorded, and writes its results to
    the same places. A recording on CUDA computes nothing; here it is the first replay."""

    recorded = 0

    def record(self, update):
        self.update, self.fresh, Graph.recorded = update, True, Graph.recorded + 1

    def replay(self):
        if not self.fresh:
            again = self.update.update(*self.update.arguments)
            for old, new in zip(*map(tree_leaves, (self.update.result, again)), strict=True):
                old.copy_(new)
        self.fresh = False


@pytest.mark.parametrize("stage", ["wm", "agent"])
def test_a_recorded_step_trains_as_a_plain_one(stage, packed, trained, quick_probe, tmp_path,
                                               monkeypatch):  # fmt: skip
    """With every argument copied to a fixed place, results overwritten, two lengths of sequences,
    validation and a copy of the critic in between, and a run that goes on."""
    more = ["--steps", "10", "--validate_every", "4"]
    more += ["--slow_critic_interval", "3"] if stage == "agent" else []
    plain = run(stage, packed, trained, tmp_path / "plain", *more)
    updates = []

    @contextlib.contextmanager
    def record(graph, stream, capture_error_mode):
        yield
        graph.record(updates[-1])

    for name in ("Stream", "current_stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def captured(self, update):
        updates.append(train.Captured(update, "cpu"))
        return updates[-1]

    monkeypatch.setattr(train.Run, "captured", captured)
    monkeypatch.setattr(train.Captured, "WARM_UP", 2)
    monkeypatch.setattr(Graph, "recorded", 0)
    graph = run(stage, packed, trained, tmp_path / "graph", *more, "--checkpoint_every", "7")
    assert Graph.recorded == (2 if stage == "wm" else 1)  # pieces, then whole sequences
    assert all(torch.equal(x, graph[k]) for k, x in plain.items())
    (tmp_path / "resumed").mkdir()
    previous = tmp_path / "graph" / f"{stage}_previous.pt"
    previous.rename(tmp_path / "resumed" / f"{stage}.pt")
    resumed = run(stage, packed, trained, tmp_path / "resumed", *more)
    assert all(torch.equal(x, resumed[k]) for k, x in plain.items())


class NoNumbers(TorchDispatchMode):
    """Refuses what a CUDA graph could not record: a number that is read, a shape that depends on
    data, a constant that would come from the host."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        boolean = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in self.REFUSED and not boolean, f"{name} cannot be in a CUDA graph"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["wm", "agent"])
def test_a_step_asks_for_no_number(stage, packed, trained, quick_probe, tmp_path, monkeypatch):
    """The whole one: loss, gradients, clip, optimiser."""
    calls = []

    def one_hot(index, classes):  # the library's reads numbers, but not on CUDA
        return (index[..., None] == torch.arange(classes)).long()

    def captured(self, update):
        def refusing(*arguments):
            calls.append(1)
            with monkeypatch.context() as patch, NoNumbers():
                patch.setattr(F, "one_hot", one_hot)
                return update(*arguments)

        return refusing

    monkeypatch.setattr(train.Run, "captured", captured)
    run(stage, packed, trained, tmp_path, "--steps", "2")
    assert len(calls) == 2
    with pytest.raises(AssertionError, match="local_scalar"), NoNumbers():
        torch.ones(1).item()
