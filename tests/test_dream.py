"""The dream: one look, then imagination alone; and a judge that is itself judged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import write_packed

import agent as A
import data as D
import dream
import evaluate
import sim
import train
import world_model as W


@pytest.fixture
def policy():
    torch.manual_seed(0)
    world = W.WorldModel(W.PRESETS["tiny"])
    return A.Policy(world, A.Agent(A.PRESETS["tiny"], 64, world.config.latent), skip=2)


OBS = {
    "rgb_obs": {f"rgb_{k}": np.zeros((64, 64, 3), np.uint8) for k in ("static", "gripper")},
    "robot_obs": np.zeros(15),
}


def test_the_dream_is_seen_once_and_imagined_from_then_on(policy, monkeypatch):
    looks, imagined, asked = [], [], []
    see, imagine = policy.world.filter, policy.world.imagine_step
    monkeypatch.setattr(policy.world, "filter", lambda *x: looks.append(x) or see(*x))
    monkeypatch.setattr(policy.world, "imagine_step", lambda *x: imagined.append(x) or imagine(*x))

    def done(start, now):
        asked.append((start, now))
        return "b" if len(asked) == 6 else "a"

    judge = SimpleNamespace(done=done)
    assert dream.attempt(policy, judge, OBS, np.zeros(384), "b", limit=20)
    assert len(looks) == 1 and len(imagined) == len(asked) == 6
    assert all(torch.equal(start, asked[0][0]) for start, _ in asked)  # the attempt's first latent
    h, z, a = imagined[3]  # a step goes on from the latent and the action of the one before
    assert torch.equal(torch.cat([h, z], -1), asked[2][1]) and a.shape == (1, 7)
    assert abs(a[0, 6].item()) == 1  # the threshold of run time [D12]
    assert not dream.attempt(policy, judge, OBS, np.zeros(384), "b", limit=20)
    assert len(asked) == 6 + 10  # 20 simulator steps: the effects of 10 actions


def test_the_judge_learns_what_the_last_frames_of_spans_show_was_done(policy, tmp_path):
    """Spans that end in five frames to the left or to the right, after rest; others held out."""
    write_packed(tmp_path / "play", frames=32 * 200)
    for split in ("training", "validation"):
        folder, rng = tmp_path / "play" / split, np.random.default_rng(len(split))
        sides, actions = rng.integers(0, 2, 200), np.zeros((200, 32, 7), np.float32)
        actions[:, -6:, 0] = 2 * sides[:, None] - 1
        np.save(folder / "actions.npy", actions.reshape(-1, 7))
        np.save(folder / "spans.npy", 32 * np.arange(200)[:, None] + [0, 32])
        np.save(folder / "episodes.npy", np.array([[0, 32 * 200]]))
        tasks = [("left", "right")[s] for s in sides]
        (folder / "lang.json").write_text(json.dumps({"sentences": tasks, "tasks": tasks}))
    judge = dream.train_judge(policy.world, D.PlayData(tmp_path / "play", "training"))
    held_out = D.PlayData(tmp_path / "play", "validation")
    s, lengths = dream.latents_of_spans(policy.world, held_out, held_out.spans)
    s = s.float()
    assert s.shape == (200, 32, policy.world.config.latent) and (lengths == 32).all()
    ends = [judge.done(x[None, 0], x[None, -1]) for x in s]
    early = [judge.done(x[None, 0], x[None, 20]) for x in s]
    best = [judge.tasks[judge(x[None, 0], x[None, -1])[0, 1:].argmax()] for x in s]
    right = lambda said: np.mean([a == b for a, b in zip(said, held_out.tasks, strict=True)])
    silent = np.mean([x is None for x in ends])
    assert right(best) > 0.9 and right(ends) > 0.75  # of 200 spans it learns to be that sure,
    assert right(ends) + silent > 0.97  # and then it is right
    assert np.mean([x is None for x in early]) > 0.9


def test_quiet_stretches_hold_no_success():
    """Two episodes; spans end at rows 40, 70 and 130, and 8 rows before that all is still to do."""
    play = SimpleNamespace(
        spans=np.array([[20, 40], [50, 70], [110, 130]]), episodes=np.array([[0, 100], [100, 200]])
    )
    wanted = [[0, 20], [20, 32], [40, 60], [60, 62], [100, 120], [120, 122]]
    assert dream.quiet_stretches(play, 8).tolist() == wanted


def test_a_judge_is_believed_where_precision_and_recall_are_at_least_nine_tenths():
    attempts = [{"task": "a", "dream": i < 6, "sim": i < 9, "truth": ["a"] * (i < 9)
                 + ["b"] * (i < 5), "judged": ["a"] * (i < 10) + ["b"] * (i < 3)}
                for i in range(12)]  # fmt: skip
    result = dream.summarise([{"attempts": attempts[:7]}, {"attempts": attempts[7:]}])
    assert result["dream"] == {"a": [6, 9, 12]}
    assert result["judge"]["a"] == {"done": 9, "precision": 0.9, "recall": 1.0}
    assert result["judge"]["b"] == {"done": 5, "precision": 1.0, "recall": 0.6}
    assert dream.trusted(result["judge"]["a"]) and not dream.trusted(result["judge"]["b"])
    few = result["judge"]["a"] | {"done": 4}
    assert not dream.trusted(few) and not dream.trusted(few | {"done": 9, "recall": None})
    assert "50.0%" in dream.table(result)
    result["judge"]["a"]["precision"] = 0.89
    assert "not judged" in dream.table(result) and "50.0%" not in dream.table(result)


def test_a_chain_in_both_worlds(tmp_path, monkeypatch, capsys):
    """A tiny run from end to end: judge, dream, simulator, results; it goes on where it was."""
    write_packed(tmp_path / "play")
    run = ["--data", str(tmp_path / "play"), "--out", str(tmp_path / "run"), "--preset", "tiny"]
    for stage in ("wm", "agent"):
        train.main(["--stage", stage, "--steps", "1", *run])
    for split in ("training", "validation"):
        lang = {"sentences": ["x"] * 3, "tasks": list(sim.TASKS[:3])}
        (tmp_path / "play" / split / "lang.json").write_text(json.dumps(lang))
    monkeypatch.setattr(dream, "STEPS", 2)
    command = ["--env", "dream", "--checkpoint", str(tmp_path / "run/agent.pt"), "--limit", "6"]
    result = evaluate.main([*command, "--chains", "2", "--out", str(tmp_path / "out")])
    assert sum(n for _, _, n in result["dream"].values()) == 2
    assert "precision" in capsys.readouterr().out
    monkeypatch.setattr(dream, "train_judge", None)  # the judge is kept
    again = evaluate.main([*command, "--chains", "3", "--out", str(tmp_path / "out")])
    assert sum(n for _, _, n in again["dream"].values()) == 3
