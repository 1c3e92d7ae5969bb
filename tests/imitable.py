"""The ceiling of a recording: how far does a network get that is told the true state?

    python tests/imitable.py PLAY [--frames N] [--seed S] [--chains 100] [--out FILE]

PLAY is a packed folder of data.py, or a recording of `teleop.py record --no-pictures`. A network of
3 x 512 units sees arm, table and task and clones the annotated spans; nothing is rendered. A policy
that learns from pictures loses by its world model, it hardly gains. Ten minutes on one core.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calvin
import evaluate
import sim

FAMILIES = {  # name: first words of its tasks, end of their last word
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
        play = dict(np.load(folder / "states.npz", allow_pickle=False))
    else:
        names = ("robot_obs", "scene_obs", "actions", "spans")
        play = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        play["tasks"] = np.array(json.loads((folder / "lang.json").read_text())["tasks"])
    inside = play["spans"][:, 1] <= (frames or len(play["actions"]))
    return play | {"spans": play["spans"][inside], "tasks": play["tasks"][inside]}


def features(robot, scene):
    """True state (N, 15), (N, 24) -> (N, 71): places, waves of angles, blocks from tcp."""
    tcp, waves = robot[:, :3], [np.sin(robot[:, 3:6]), np.cos(robot[:, 3:6])]
    parts = [tcp, *waves, robot[:, 6:7], robot[:, 14:], scene[:, :6]]
    for i in (6, 12, 18):
        at, angles = scene[:, i : i + 3], scene[:, i + 3 : i + 6]
        parts += [at, at - tcp, np.sin(angles), np.cos(angles)]
        parts += [np.sin(2 * angles), np.cos(2 * angles)]
    return np.concatenate(parts, 1).astype(np.float32)


def examples(play):
    """Frames of all spans -> states (n, 71), tasks (n, 34), actions (n, 7)."""
    # A span's last frame shows its success; the action there is another task's.
    rows = np.concatenate([np.arange(a, b - 1) for a, b in play["spans"]])
    tasks = np.repeat(play["tasks"], np.diff(play["spans"])[:, 0] - 1)
    one_hot = np.eye(len(sim.TASKS), dtype=np.float32)[[sim.TASKS.index(t) for t in tasks]]
    x = features(play["robot_obs"][rows], play["scene_obs"][rows])
    return [torch.tensor(part) for part in (x, one_hot, np.float32(play["actions"][rows]))]


class Clone(torch.nn.Module):
    """State and task -> arm (6,) before tanh, and the gripper's logit. As a policy, it is told the
    task by its one-hot in the place of a sentence's embedding."""

    def __init__(self, x, skip):
        super().__init__()
        self.skip, self.mean, self.std = skip, x.mean(0), x.std(0) + 1e-3
        layers = []
        for n in (x.shape[1] + len(sim.TASKS), 512, 512):
            layers += [torch.nn.Linear(n, 512), torch.nn.ELU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(512, 7))

    def forward(self, x, task):
        x = ((x - self.mean) / self.std).clamp(-5, 5)
        return self.net(torch.cat([x, task], -1))

    def reset(self):
        """Nothing is remembered."""

    @torch.no_grad()
    def act(self, obs, task):
        x = torch.tensor(features(obs["robot_obs"][None], obs["scene_obs"][None]))
        out = self(x, task[None])[0].double()
        return np.append(out[:6].tanh().numpy(), 1.0 if out[6] > 0 else -1.0)


def train(play, held_out, skip, steps):
    """The clone, and its errors on training and held-out spans."""
    data = examples(play)
    clone = Clone(data[0], skip)
    optimizer = torch.optim.AdamW(clone.parameters(), 1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (512,))
        x, task, a = (part[rows] for part in data)
        out = clone(x, task)
        grip = F.binary_cross_entropy_with_logits(out[:, 6], (a[:, 6] > 0).float())
        optimizer.zero_grad()
        (F.mse_loss(out[:, :6].tanh(), a[:, :6]) + 0.1 * grip).backward()
        optimizer.step()
        schedule.step()
    figures = {"frames_in_spans": len(data[0])}
    for name, part in (("train", play), ("held_out", held_out)):
        x, task, a = (tensor[:50_000] for tensor in examples(part))
        with torch.no_grad():
            out = clone(x, task)
        figures[f"arm_rms_{name}"] = float((out[:, :6].tanh() - a[:, :6]).square().mean().sqrt())
        figures[f"gripper_{name}"] = float(((out[:, 6] > 0) == (a[:, 6] > 0)).float().mean())
    return clone, figures


def run_chains(policy, numbers):
    """The benchmark's chains: [(chain, place in it, task, solved, block in the hand before)]."""
    env, rows = sim.PlayTable(render=False), []
    one_hots = dict(zip(sim.TASKS, torch.eye(len(sim.TASKS)), strict=True))
    for number in numbers:
        state, tasks = calvin.chain(number)
        env.reset(*calvin.start_pose(state))
        for place, task in enumerate(tasks):
            blocks = env.get_info()["scene_info"]["movable_objects"].values()
            in_hand = any(env.panda in {c[2] for c in block["contacts"]} for block in blocks)
            solved, _ = evaluate.attempt(env, sim.oracle, policy, one_hots, task)
            rows.append((number, place, task, solved, in_hand))
            if not solved:
                break
    env.close()
    return rows


def summary(rows):
    """Avg. Len. with its standard error, then who succeeded where."""
    lengths = np.array([sum(r[3] for r in rows if r[0] == n) for n in sorted({r[0] for r in rows})])
    groups = {"first": [r for r in rows if r[1] == 0], "later": [r for r in rows if r[1]]}
    groups["in hand"] = [r for r in rows if r[4]]
    for name, (kinds, end) in FAMILIES.items():
        words = [(r, r[2].split("_")) for r in rows]
        groups[name] = [r for r, w in words if w[0] in kinds.split() and w[-1].endswith(end)]
    shares = {name: f"{sum(r[3] for r in some)} of {len(some)}" for name, some in groups.items()}
    return {"avg_len": lengths.mean(), "se": lengths.std() / len(lengths) ** 0.5} | shares


@dataclass
class Options:
    play: tyro.conf.Positional[str]
    frames: int | None = None  # use only the first so many; None: all
    seed: int = 0  # of weights and batches
    steps: int = 8000
    chains: int = 100
    skip: int = 2  # simulator steps per frame
    out: Path | None = None  # JSON file to write


def main(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    began, play = time.time(), load(args.play, "training", args.frames)
    clone, figures = train(play, load(args.play, "validation"), args.skip, args.steps)
    result = vars(args) | {"spans": len(play["spans"])} | figures
    result |= summary(run_chains(clone, range(args.chains)))
    text = json.dumps(result | {"seconds": round(time.time() - began)}, indent=1, default=str)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
