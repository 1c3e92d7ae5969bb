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

    class Judge:
        tasks = ("a", "b")

        def __call__(self, start, now):  # sure of "b" from the fifth look on
            asked.append((start, now))
            return torch.tensor([[9.0, 9.0 if len(asked) > 4 else -9.0]])

    assert dream.attempt(policy, Judge(), OBS, np.zeros(384), "b", limit=20)  # 3 of 5: 0.6
    assert len(looks) == 1 and len(imagined) == len(asked) - 1 == 6
    assert all(torch.equal(start, asked[0][0]) for start, _ in asked)  # the attempt's first latent
    h, z, a = imagined[3]  # a step goes on from the latent and the action of the one before
    assert torch.equal(torch.cat([h, z], -1), asked[3][1]) and a.shape == (1, 7)
    assert abs(a[0, 6].item()) == 1  # the threshold of run time [D12]
    asked.clear()
    assert dream.attempt(policy, Judge(), OBS, np.zeros(384), "a", limit=20)
    assert len(asked) == 5  # however sure it is
    asked.clear()
    assert not dream.attempt(policy, Judge(), OBS, np.zeros(384), "c", limit=20)
    assert len(asked) == 1 + 10  # 20 simulator steps: the effects of 10 actions


def test_a_watched_success_is_looked_at_for_a_while(monkeypatch):
    """The task is done at the third look, and undone at the fifth."""
    monkeypatch.setattr(dream, "BEHIND", 4)
    judge = lambda start, now: torch.tensor([[9.0, -9.0]])
    judge.tasks = ["a", "b"]
    policy = SimpleNamespace(state=None)
    watched = dream.Watched(lambda start, info, task: task == "b" and 3 <= info < 5, policy, judge)
    said = []
    for look in range(1, 8):
        policy.state = (torch.zeros(1, 2), torch.zeros(1, 3))
        said += [watched(0, look, "b"), watched(0, look, "b")]  # two steps of a look
    assert said == [False] * 12 + [True] * 2 and watched.solved
    assert watched.truth == {"b"} and watched.verdict.done == {"a"}


class Restored:
    """An environment that only knows where the hand is: x of the robot_obs that it was given."""

    def reset(self, robot_obs, scene_obs):
        self.x = robot_obs[0]

    def get_info(self):
        return self.x


def went(start, now, task):
    return now - start > 0.5 if task == "right" else start - now > 0.5


@pytest.fixture
def walk(tmp_path):
    """Play in which the hand steps to one of five places, 0.4 apart, every eight frames."""
    write_packed(tmp_path / "play", frames=4000)
    for split in ("training", "validation"):
        folder, rng = tmp_path / "play" / split, np.random.default_rng(len(split))
        robot = np.load(folder / "robot_obs.npy")
        robot[:, 0] = 0.4 * rng.integers(0, 5, 500).repeat(8)
        np.save(folder / "robot_obs.npy", robot)
        np.save(folder / "spans.npy", 40 * np.arange(99)[:, None] + [5, 37])
    return [D.PlayData(tmp_path / "play", split) for split in ("training", "validation")]


def test_stretches_stay_in_their_episodes_and_every_pair_has_the_oracles_labels(walk):
    tasks, rng = ["left", "right"], np.random.default_rng(0)
    rows, labels = dream.labelled_stretches(walk[0], Restored(), went, tasks, rng, 300)
    assert rows.shape == (300, 4) and labels.shape == (300, 6, 2)
    assert (np.diff(rows) >= 0).all() and (rows // 2000 == rows[:, :1] // 2000).all()
    x = walk[0].robot_obs[:, 0]
    for p, (a, b) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        for k, task in enumerate(tasks):
            wanted = [went(x[r[a]], x[r[b]], task) for r in rows]
            assert labels[:, p, k].tolist() == wanted
    assert 0.1 < labels.mean() < 0.5


def test_the_judge_learns_what_the_oracle_says_was_done(policy, walk, monkeypatch):
    """From random latents, in which proprioception is; on held-out play."""
    for name, n in (("STRETCHES", 500), ("CLIPS", 300), ("STEPS", 400)):
        monkeypatch.setattr(dream, name, n)
    judge = dream.train_judge(policy.world, walk[0], Restored(), went, ["left", "right"])
    start, now = np.random.default_rng(1).integers(0, 4000, (2, 300))
    s, after = (
        dream.latents_of_spans(policy.world, walk[1], rows[:, None] + [0, 1])[:, 0].float()
        for rows in (start, now)
    )
    x = walk[1].robot_obs[:, 0]
    truth = [
        {t for t in judge.tasks if went(x[a], x[b], t)} for a, b in zip(start, now, strict=True)
    ]
    sure = judge(s, after) > 0
    said = [{t for t, yes in zip(judge.tasks, row, strict=True) if yes} for row in sure]
    both, right = (sum(len(a & b) for a, b in zip(truth, y, strict=True)) for y in (truth, said))
    assert right / sum(map(len, said)) > 0.95 and right / both > 0.9


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
        for name, x in (("robot_obs", sim.ROBOT_OBS0), ("scene_obs", sim.SCENE_OBS0)):
            np.save(tmp_path / "play" / split / f"{name}.npy", np.float32([x] * 160))
    for name in ("STRETCHES", "CLIPS", "STEPS"):
        monkeypatch.setattr(dream, name, 2)
    command = ["--env", "dream", "--checkpoint", str(tmp_path / "run/agent.pt"), "--limit", "6"]
    result = evaluate.main([*command, "--chains", "2", "--out", str(tmp_path / "out")])
    assert sum(n for _, _, n in result["dream"].values()) == 2
    assert "precision" in capsys.readouterr().out
    monkeypatch.setattr(dream, "train_judge", None)  # the judge is kept
    again = evaluate.main([*command, "--chains", "3", "--out", str(tmp_path / "out")])
    assert sum(n for _, _, n in again["dream"].values()) == 3
