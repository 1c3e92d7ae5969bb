"""Several processes under torchrun (gloo): the same batch, the same losses, one checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train

ROOT = Path(__file__).resolve().parent.parent
# Both stages with every random draw at one value, so that the share of rows does not matter.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import agent, train
torch.rand_like = lambda x: torch.full_like(x, 0.3)
torch.randn_like = torch.zeros_like
agent.P.sample_straight_through = lambda logits: logits.softmax(-1).flatten(-2)
agent.Agent.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # no dropout
train.main(sys.argv[2:])
"""
SAME = "--preset tiny --precision fp32 --log_every 1 --validate_every 100 --checkpoint_every 2"
SAME = [*SAME.split(), "--batch_size", "8"]

# Windows in which every batch has pairs for Eq. 8: those of the paper.
LONG = "--sequence_length 32 --min_window 20 --max_window 32".split()
ALIKE = {"wm": ["--zeta", "0"], "agent": ["--reset_start", "0", *LONG]}
NAMES = {
    "wm": ("loss", "kl", "gradient"),
    "agent": ("loss_actor", "loss_critic", "contrast", "gradient_actor", "gradient_critic"),
}


def run(n, packed, out, stage, *more) -> str:
    """Returns what was said on stderr."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *(launch if n > 1 else []), str(script), str(ROOT)]
    command += ["--stage", stage, *SAME, "--data", str(packed), "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def losses(out, stage, *names):
    lines = map(json.loads, (out / f"{stage}.jsonl").read_text().splitlines())
    return torch.tensor([[x[k] for k in names] for x in lines if x["kind"] == "train"])


@pytest.fixture(scope="module")
def alone(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel") / "alone"
    for stage, more in ALIKE.items():
        run(1, packed, out, stage, "--steps", "4", *more)
    return out


def test_n_processes_share_a_batch_and_learn_the_same(packed, alone, tmp_path):
    """Carried states, KL, both agent losses; Eq. 8's negatives come from all processes [D11]. A
    run goes on with another number of them. One of them makes the latents."""
    out = tmp_path / "out"
    for stage, more in ALIKE.items():
        for latents in Path(packed).glob("*/latents-*"):
            shutil.rmtree(latents)
        for n, steps in ((2, "2"), (4, "3"), (1, "4")):
            said = run(n, packed, out, stage, "--steps", steps, *more)
            if stage == "agent":
                assert said.count("latents of training:   0%") == (1 if n == 2 else 0)
        ours, theirs = (losses(x, stage, *NAMES[stage]) for x in (out, alone))
        assert len(ours) == 4  # rank 0 alone writes
        assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-4), (stage, ours, theirs)
    assert theirs[:, 2].min() > 0  # there were pairs to tell apart
    assert torch.load(out / "wm.pt", weights_only=True)["state"][0].shape[0] == 8


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    second = SimpleNamespace(rank=1, ranks=2)
    assert train.Run.shard(second, 8) == slice(4, 8)
    with pytest.raises(ValueError, match="7 rows cannot be shared by 2 processes"):
        train.Run.shard(second, 7)


def test_chains_are_shared_among_processes_and_reported_once(tmp_path):
    operator = [str(ROOT / "evaluate.py"), "--policy", "operator", "--chains", "5", "--limit", "60"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ways, results = {"one": [[], []], "two": [launch, []], "procs": [[], ["--procs", "2"]]}, []
    for name, (how, more) in ways.items():
        command = [sys.executable, *how, *operator, *more, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        assert done.stdout.count("Avg. Len.") == 1
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert results[0] == results[1] == results[2]
    alone = (tmp_path / "one/chains.jsonl").read_text().splitlines()
    for name in ("two", "procs"):
        logs = [tmp_path / name / file for file in ("chains.jsonl", "chains_1.jsonl")]
        mine, others = (log.read_text().splitlines() for log in logs)
        assert mine == [alone[0], *alone[1::2]] and others == [alone[0], *alone[2::2]]
