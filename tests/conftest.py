"""Makes the flat modules importable from tests/, and every test start from the same numbers; a
small packed set and a run of both stages on it, for all tests that need one."""

import functools
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# A shell's background job ignores Ctrl-C, and so would the commands that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
WM = ["--stage", "wm", "--preset", "tiny", "--precision", "fp32", "--log_every", "2"]
AGENT = ["--stage", "agent", "--preset", "tiny", "--precision", "fp32", "--log_every", "2"]
OFTEN = ["--validate_every", "100", "--checkpoint_every", "2"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def write_packed(root: Path, frames: int = 160, seed: int = 0) -> None:
    """A packed set whose picture is a dot moved by the first two action numbers."""
    import data
    import sim

    for split in ("training", "validation"):
        rng = np.random.default_rng([seed, split == "training"])
        folder = root / split
        folder.mkdir(parents=True)
        a = rng.uniform(-1, 1, (frames, 7)).astype(np.float32)
        a[:, 6] = np.sign(a[:, 6])
        at = np.clip(np.cumsum(a[:, :2] * 3, 0) + 32, 4, 60)
        images = np.zeros((frames, 64, 64, 3), np.uint8)
        for i, (x, y) in enumerate(at.astype(int)):
            images[i, y - 4 : y + 4, x - 4 : x + 4] = 255
        robot = np.zeros((frames, 15), np.float32)
        robot[:, :2], robot[1:, 14] = at / 64, a[:-1, 6]
        scene = rng.normal(size=(frames, 24)).astype(np.float32)
        arrays = {
            "rgb_static": images, "rgb_gripper": images[:, ::-1], "actions": a,
            "robot_obs": robot, "scene_obs": scene,
            "episodes": np.array([[0, frames // 2], [frames // 2, frames]]),
            "spans": np.array([[10, 42], [90, 122], [30, 62]]),
            "disturbed": np.zeros(frames, bool),
            "span_emb": rng.normal(size=(3, 384)).astype(np.float32),
        }  # fmt: skip
        for name, x in arrays.items():
            np.save(folder / f"{name}.npy", x)
        lang = {"sentences": ["go left", "go right", "go up"], "tasks": ["a", "b", "c"]}
        (folder / "lang.json").write_text(json.dumps(lang))
    meta = {
        "format": 1, "source": "sim", "renderer": sim.LOOK, "hz": 15, "skip": 2,
        "action_scale": [0.02, 0.05], "text_encoder": data.TEXT_ENCODER,
    }  # fmt: skip
    (root / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="session")
def quick_probe():
    """The probe learns for 20 steps, where its figures do not matter."""
    import diagnostics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "probe", functools.partial(diagnostics.probe, steps=20))
        yield


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("packed") / "play"
    write_packed(root)
    return str(root)


@pytest.fixture(scope="session")
def trained(packed, quick_probe, tmp_path_factory) -> str:
    """A run with both stages done: four steps of each."""
    import train

    out = str(tmp_path_factory.mktemp("run"))
    for stage in (WM, AGENT):
        train.main([*stage, *OFTEN, "--data", packed, "--out", out, "--steps", "4"])
    return out
