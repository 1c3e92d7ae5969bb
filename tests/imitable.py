"""The ceiling of a recording: how far does a network get that is told the true state?

    python tests/imitable.py PLAY [--frames N] [--seed S] [--chains 100] [--out FILE]

PLAY is a packed folder of data.py, or a recording of `teleop.py record --no-pictures`. A network of
3 x 512 units sees arm, table and task and clones the annotated spans; nothing is rendered. A policy
that learns from pictures can lose by its world model, but hardly gain. Ten minutes on one core.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calvin
import evaluate
import sim

FAMILIES = {
    "lift, table": ("lift", "table"), "lift, cabinet": ("lift", "slider"),
    "lift, drawer": ("lift", "drawer"), "turn": ("rotate", ""), "push": ("push", "t"),
    "into drawer": ("push", "drawer"), "place": ("place", ""), "stack": ("stack", ""),
    "unstack": ("unstack", ""), "door": ("move", ""), "drawer": ("open close", ""),
    "lights": ("turn", ""),
}  # fmt: skip


def load(folder, split, frames=None):
    """States and spans of a split: dict of robot_obs, scene_obs, actions (N, .), spans, tasks."""
    folder = Path(folder) / split
    if (folder / "states.npz").exists():
        with np.load(folder / "states.npz", allow_pickle=False) as file:
            play = dict(file)
    else:
        names = ("robot_obs", "scene_obs", "actions", "spans")
        play = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        play["tasks"] = np.array(json.loads((folder / "lang.json").read_text())["tasks"])
    inside = play["spans"][:, 1] <= (frames or len(play["actions"]))
    return play | {"spans": play["spans"][inside], "tasks": play["tasks"][inside]}


def features(robot_obs, scene_obs):
    """True state (N, 15), (N, 24) -> (N, 68): places, angles as sine and cosine, blocks from tcp."""
    tcp, euler = robot_obs[:, :3], robot_obs[:, 3:6]
    parts = [
        tcp,
        np.sin(euler),
        np.cos(euler),
        robot_obs[:, 6:7],
        robot_obs[:, 14:],
        scene_obs[:, :6],
    ]
    for i in (6, 12, 18):
        at, angles = scene_obs[:, i : i + 3], scene_obs[:, i + 3 : i + 6]
        parts += [
            at,
            at - tcp,
            np.sin(angles),
            np.cos(angles),
            np.sin(2 * angles),
            np.cos(2 * angles),
        ]
    return np.concatenate(parts, 1).astype(np.float32)


def examples(play):
    """Frames of all spans -> inputs (n, 68 + 34), actions (n, 7)."""
    rows = np.concatenate([np.arange(a, b - 1) for a, b in play["spans"]])
    tasks = np.repeat(play["tasks"], np.diff(play["spans"])[:, 0] - 1)
    one_hot = np.eye(len(sim.TASKS), dtype=np.float32)[[sim.TASKS.index(t) for t in tasks]]
    x = features(play["robot_obs"][rows], play["scene_obs"][rows])
    return x, one_hot, np.asarray(play["actions"][rows], np.float32)


class Clone(torch.nn.Module):
    """State and task -> arm (6,) in [-1, 1] and the gripper's logit."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("mean", torch.tensor(x.mean(0)))
        self.register_buffer("std", torch.tensor(x.std(0)) + 1e-3)
        sizes = [x.shape[1] + len(sim.TASKS), 512, 512, 512]
        layers = [m for i, o in pairwise(sizes) for m in (torch.nn.Linear(i, o), torch.nn.ELU())]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(512, 7))

    def forward(self, x, task):
        x = ((x - self.mean) / self.std).clamp(-5, 5)
        return self.net(torch.cat([x, task], -1))


def train(play, held_out, steps, seed):
    """Cloned from the spans: squared error of the arm, cross-entropy of the gripper."""
    torch.manual_seed(seed)
    data = [torch.tensor(x) for x in examples(play)]
    clone = Clone(data[0].numpy())
    optimizer = torch.optim.AdamW(clone.parameters(), 1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, task, a = (part[i] for i in [torch.randint(len(data[0]), (512,))] for part in data)
        out = clone(x, task)
        loss = F.mse_loss(out[:, :6].tanh(), a[:, :6])
        loss = loss + 0.1 * F.binary_cross_entropy_with_logits(out[:, 6], (a[:, 6] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = {}
        for name, part in (("train", play), ("held_out", held_out)):
            x, task, a = (torch.tensor(x[:50_000]) for x in examples(part))
            out = clone(x, task)
            error[f"arm_rms_{name}"] = float((out[:, :6].tanh() - a[:, :6]).square().mean().sqrt())
            error[f"gripper_{name}"] = float(((out[:, 6] > 0) == (a[:, 6] > 0)).float().mean())
    return clone.eval(), error | {"frames_in_spans": len(data[0])}


class Policy:
    """The clone as evaluate.attempt drives it; the embedding is the task's one-hot."""

    def __init__(self, clone, skip):
        self.clone, self.skip = clone, skip

    def reset(self):
        pass

    @torch.no_grad()
    def act(self, obs, task):
        x = torch.tensor(features(obs["robot_obs"][None], obs["scene_obs"][None]))
        out = self.clone(x, task[None])[0]
        return np.append(out[:6].tanh().double().numpy(), 1.0 if out[6] > 0 else -1.0)


def run_chains(policy, numbers):
    """Attempts of the benchmark's chains: [(chain, place in it, task, solved, block in hand)]."""
    env, rows = sim.PlayTable(render=False), []
    one_hots = dict(zip(sim.TASKS, torch.eye(len(sim.TASKS)), strict=True))
    for number in numbers:
        state, tasks = calvin.chain(number)
        env.reset(*calvin.start_pose(state))
        for place, task in enumerate(tasks):
            blocks, robot = env.get_info()["scene_info"]["movable_objects"], env.panda
            in_hand = any({c[2] for c in b["contacts"]} >= {robot} for b in blocks.values())
            solved, _ = evaluate.attempt(env, sim.oracle, policy, one_hots, task)
            rows.append((number, place, task, solved, in_hand))
            if not solved:
                break
    env.close()
    return rows


def summary(rows):
    lengths = {}
    for number, _, _, solved, _ in rows:
        lengths[number] = lengths.get(number, 0) + solved
    lengths = np.array(list(lengths.values()))

    def share(some):
        return f"{sum(row[3] for row in some)} of {len(some)}"

    table = {"avg_len": lengths.mean(), "se": lengths.std() / len(lengths) ** 0.5}
    table |= {
        "first": share([r for r in rows if r[1] == 0]),
        "later": share([r for r in rows if r[1]]),
    }
    table["block in hand"] = share([r for r in rows if r[4]])
    for name, (kinds, last) in FAMILIES.items():
        words = [(r, r[2].split("_")) for r in rows]
        hit = [r for r, w in words if w[0] in kinds.split() and w[-1].endswith(last)]
        table[name] = share(hit)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("play")
    parser.add_argument("--frames", type=int, help="use only the first so many; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--skip", type=int, default=2, help="simulator steps per frame")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    play, held_out = load(args.play, "training", args.frames), load(args.play, "validation")
    clone, error = train(play, held_out, args.steps, args.seed)
    took = time.time() - began
    table = summary(run_chains(Policy(clone, args.skip), range(args.chains)))
    result = vars(args) | {"spans": len(play["spans"])} | error | table
    result |= {"train_seconds": round(took), "seconds": round(time.time() - began)}
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
