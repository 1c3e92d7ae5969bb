"""What deploy.py promises: recordings that train, rollouts that a person judges, Table II."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from franka import HAND, HOME, Double, Lost, act, doubled
from PIL import Image

import data as D
import deploy as P
import robot as R

ROOT = Path(__file__).resolve().parent.parent
C = R.RobotConfig()
DRAWER = "pull out the drawer"
ASK = P.ask


@pytest.fixture
def env():
    """The doubles at a recording's 30 Hz."""
    with contextlib.closing(doubled(R.recording(C))) as env:
        yield env


# ---------------------------------------------------------------------------- check
def test_the_check_shows_all_that_the_policy_sees_and_moves_nothing(env, tmp_path, capsys):
    env.keys += ["x", "y", "n"]
    P.check(env, tmp_path / "check.png")
    text = capsys.readouterr().out
    for word in ("320 x 240", "noise", "0.30 m/s, 0.75 rad/s", "check.png", "WILL MOVE"):
        assert word in text
    for name, value in dataclasses.asdict(env.config).items():
        assert f"{name}: {value}" in text
    picture = np.asarray(Image.open(tmp_path / "check.png"))
    for row, camera in zip(np.split(picture, 2), env.cameras.values(), strict=True):
        label, whole, policy = row[:28], row[60:252, 2:258], row[28:284, 522:778]
        recorded = R.resize_area(camera.frame[:, 40:280], 200)
        np.testing.assert_array_equal(policy[2::4, 2::4], R.resize_area(recorded, 64))
        np.testing.assert_allclose(whole.mean((0, 2))[:30], 0, atol=1)  # outside the crop
        assert whole[:, 40:216].mean() > 100 and label.std() > 10  # inside it; it has a text
    with pytest.raises(R.RobotError, match="said no"):
        P.check(env, tmp_path / "check.png")
    assert env.arm.calls == []


def test_the_check_refuses_an_arm_a_neutral_pose_or_a_camera_that_cannot_be_used(env, tmp_path):
    env.config = dataclasses.replace(env.config, box_high=(0.45, 0.4, 0.6))
    with pytest.raises(R.RobotError, match="outside the box"):
        P.check(env, tmp_path / "check.png")
    env.arm.q = HOME + 0.05
    with pytest.raises(R.RobotError, match="another arm"):
        P.check(env, tmp_path / "check.png")
    env.cameras["rgb_static"].read = lambda: (np.zeros((200, 200, 3), np.uint8), np.inf)
    with pytest.raises(R.RobotError, match="shows nothing"):
        P.check(env, tmp_path / "check.png")


# ---------------------------------------------------------------------------- play
@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Teleoperated play through the file, both splits: the recording and what was commanded."""
    folder, commands = tmp_path_factory.mktemp("played") / "play", {}
    env, rng = doubled(R.recording(C)), np.random.default_rng(5)
    for split, n in (("training", 100), ("validation", 90)):
        env.reset()
        seen, x = commands.setdefault(split, []), np.zeros(6)

        def device(obs, n=n, seen=seen, x=x):
            seen.append(env.T.copy())
            x[:] = 0.8 * x + rng.normal(0, 0.3, 6)
            hand = 1.0 if len(seen) < 40 else -1.0
            return None if len(seen) > n else np.append(np.clip(x, -1, 1), hand)

        assert P.record(env, folder, split, device) == n // 2
    env.close()
    return folder, commands


@pytest.fixture
def folder(played, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(played[0], tmp_path / "play"))


def test_recorded_play_is_packed_and_its_actions_are_differences_of_commanded_poses(
    played, tmp_path
):
    folder, commands = played
    D.pack(folder, tmp_path / "packed", lang_folder="none", procs=1)
    data = D.PlayData(tmp_path / "packed", "training")
    assert len(data) == 50 and data.rgb_static.shape == (50, 64, 64, 3)
    assert (data.meta["hz"], data.meta["action_scale"]) == (15, [0.02, 0.05])
    about = [data.meta.get(k) for k in ("source", "renderer", "frame")]
    assert about == ["robot", "camera", None]  # absent: the base frame
    kept = commands["training"][::2]
    for t in range(len(data)):  # App. E
        want = (kept[t + 1][:3, 3] - kept[t][:3, 3]) / 0.02
        np.testing.assert_allclose(data.actions[t, :3], np.clip(want, -1, 1), atol=1e-5)
    assert data.actions[0, 6] == 1 and data.actions[-1, 6] == -1
    frame = np.load(folder / "training/episode_0000010.npz")
    assert frame["rgb_static"].shape == (200, 200, 3)  # App. E
    np.testing.assert_allclose(frame["actions"][:3], kept[11][:3, 3])


def test_a_recorded_action_replayed_gives_the_same_commanded_poses():
    rng, T = np.random.default_rng(4), R.flange(HOME) @ HAND
    for frame in ("base", "tool"):
        c = dataclasses.replace(C, frame=frame)
        for _ in range(100):
            a = np.append(rng.uniform(-0.6, 0.6, 6), 1.0)
            out, _ = R.safe_target(c, T, a, T, HOME)
            np.testing.assert_allclose(P.relative_action(c, T, out, 1.0), a, atol=1e-6)


def test_frames_that_a_crash_left_behind_become_an_episode(folder):
    split = folder / "training"
    first = 1 + max(int(p.stem[8:]) for p in folder.glob("*/episode_*.npz"))
    for i in range(first, first + 25):
        (split / f"episode_{i:07d}.npz").write_bytes((split / "episode_0000000.npz").read_bytes())
    recorder = P.Recorder(folder, "training", R.recording(C))
    recorder.start()
    bounds = np.load(split / "ep_start_end_ids.npy").tolist()
    assert bounds == [[0, 49], [first, first + 24]] and recorder.next == first + 25
    other = R.recording(dataclasses.replace(C, action_scale=(0.01, 0.05)))
    with pytest.raises(R.RobotError, match="another recording"):
        P.Recorder(folder, "training", other).start()


def test_an_episode_shorter_than_a_window_leaves_nothing(env, tmp_path):
    actions = iter([act()] * 20)
    assert P.record(env, tmp_path / "play", "training", lambda obs: next(actions, None)) == 0
    assert not list(tmp_path.glob("play/*/episode_*.npz"))


def test_guided_by_hand_the_commanded_pose_is_the_measured_one_and_only_the_hand_moves(
    env, tmp_path
):
    state, looks = env.arm.state, []

    def guided():
        looks.append(1)
        env.arm.target[2, 3] -= 0.00002  # a person lowers the arm
        if len(looks) in (400, 2000):
            env.keys.append("g" if len(looks) == 400 else "n")
        return state()

    env.arm.state = guided
    assert P.record(env, tmp_path / "play", "training") >= 20 and set(env.arm.calls) == {"close"}
    frames = [np.load(p) for p in sorted(tmp_path.glob("play/training/episode_*.npz"))]
    assert frames[0]["rel_actions"][2] < 0 and frames[-1]["rel_actions"][6] == -1


def test_actions_beyond_one_are_clipped_and_counted(tmp_path):
    recorder, T = P.Recorder(tmp_path, "training", R.recording(C)), R.flange(HOME) @ HAND
    recorder.start()
    for x in (0.4, 0.42, 0.45, 0.46):  # m: an action of 1, one of 1.5, one of 0.5
        T[0, 3] = x
        for _ in range(2):
            recorder.add(T, 1.0, {"rgb_static": np.zeros((200, 200, 3), np.uint8)}, np.zeros(15))
    actions = [np.load(p)["rel_actions"][0] for p in sorted(tmp_path.glob("*/episode_*.npz"))]
    np.testing.assert_allclose(actions, [1, 1, 0.5], atol=1e-9)
    assert recorder.clipped == 1


def test_a_hand_that_holds_something_keeps_it_when_an_episode_begins(tmp_path):
    arm = Double()
    arm.width = 0.04
    env = doubled(R.recording(C), arm=arm)
    looks = iter(range(99))
    P.record(env, tmp_path / "play", "training", lambda obs: act()[:6] if next(looks) else None)
    assert env.get_obs()["robot_obs"][14] == -1
    env.close()
    assert set(arm.calls) == {"stop"}


def test_ctrl_c_in_a_recording_thinned_to_the_set_ups_rate_says_that_everything_is_kept(
    tmp_path, monkeypatch, capsys
):
    def interrupted(env, folder, split, thin):
        assert (env.config.hz, thin) == (60, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(R, "RealEnv", lambda c, dry_run, key: doubled(c))
    monkeypatch.setattr(P, "ask", lambda env, text, choices: choices[0])
    monkeypatch.setattr(P, "record", interrupted)
    monkeypatch.chdir(tmp_path)
    Path("setup.json").write_text('{"record_hz": 60}')
    with pytest.raises(SystemExit, match="130"):
        P.main(["record", "setup.json", "play", "training"])
    assert re.search("Ctrl-C.*kept.*same command", capsys.readouterr().out)


def test_annotated_play_has_its_language_and_trains_and_no_probe_asks_for_the_scene_that_it_lacks(
    folder, tmp_path
):
    import train

    spans = tmp_path / "spans.csv"
    spans.write_text("start,end,sentence,task\n"
                     "3,30,pull out the drawer,open_drawer\n10,40,Push the drawer  shut,\n"
                     "60,90,pull out the drawer,open_drawer\n")  # fmt: skip
    D.main(["annotate", str(folder), str(spans)])
    D.pack(folder, tmp_path / "packed", procs=1)
    data = D.PlayData(tmp_path / "packed", "training")
    np.testing.assert_array_equal(data.spans, [[3, 30], [10, 40]])
    assert data.tasks == ["open_drawer", "Push the drawer  shut"]
    np.testing.assert_allclose(data.span_emb[0], D.encode([DRAWER])[0])
    told = D.read_held_out(folder / f"validation/lang_{D.TEXT_ENCODER}")
    assert told["tasks"] == ["open_drawer", "Push the drawer  shut"]
    batch = D.Windows(data, 8, kind="lang").batch(0)
    assert set(batch["span"].tolist()) <= {0, 1}
    for stage in ("wm", "agent"):
        train.main(["--stage", stage, "--preset", "tiny", "--steps", "2", "--data",
                    str(tmp_path / "packed"), "--out", str(tmp_path / "run")])  # fmt: skip
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert "agent.pt" in files and "probe.json" not in files


def test_the_frame_of_relative_actions_travels_with_the_data(folder, tmp_path):
    for path in folder.glob("*/recording.json"):
        D.write_json(path, D.read_json(path, "") | {"frame": "tool"})
    D.pack(folder, tmp_path / "packed", lang_folder="none", procs=1)
    assert D.PlayData(tmp_path / "packed", "training").meta["frame"] == "tool"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("3,30,pull out the drawer,", "validation"),
        ("3,30,pull out the drawer,\n45,60,pull out the drawer,", "in no episode"),
        ("30,3,pull out the drawer,", "in no episode"),
        ("3,30,,", "mute"),
        ("three,30,pull,", "Columns"),
    ],
)
def test_a_span_that_cannot_be_is_an_error_that_names_the_file(folder, tmp_path, rows, match):
    (tmp_path / "spans.csv").write_text(f"start,end,sentence,task\n{rows}\n")
    with pytest.raises(SystemExit, match=rf"spans.csv.*{match}"):
        D.main(["annotate", str(folder), str(tmp_path / "spans.csv")])


# ---------------------------------------------------------------------------- rollouts
class Session:
    """`deploy.py rollouts` with the double, an operator's keys, and a policy that drifts; the
    operator's key of each instruction comes at its fourth step."""

    skip, world = 1, "of LUMOS"

    def __init__(self, folder):
        self.folder, self.out, self.made, self.steps = folder, folder / "out", [], -10
        self.setup = {"max_frame_age": 2.0}
        meta = {"hz": 15, "action_scale": [0.02, 0.05], "renderer": "camera"}
        self.checkpoint = {"path": "agent.pt", "meta": meta, "method": "lumos", "step": 5}
        self.checkpoint["text_encoder"] = D.TEXT_ENCODER
        tasks = {"a": {"sentence": DRAWER, "scene": "drawer shut"}}
        tasks["b"] = {"sentence": DRAWER, "scene": "in hand", "held": True}
        rows = [{"row": "Both", "paper": [60, 50, 70], "tasks": tasks}]
        chains = [{"scene": "as it is", "tasks": ["a", "b", "a", "b", "a"]}]
        self.tasks = {"rows": rows, "chains": chains}

    def environment(self, c, dry_run, key):
        self.made.append(doubled(c, dry_run=dry_run))
        return self.made[-1]

    def ask(self, env, text, choices):  # the keys that were to be pressed are used up in order
        assert self.answers and self.answers[0] in choices, (text, choices, self.answers)
        env.keys.append(self.answers.pop(0))
        return ASK(env, text, choices)

    def reset(self):
        self.steps, self.key = 0, self.during.pop(0) if self.during else None

    def act(self, obs, embedding):
        self.steps += 1
        if self.steps == 4 and self.key == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.steps == 4 and self.key:
            self.made[-1].keys.append(self.key)
        return act(0.1)

    def rollouts(self, answers, keys=(), rollouts=2, more=()):
        self.answers, self.during = list(answers), list(keys)
        setup, tasks = self.folder / "setup.json", self.folder / "tasks.json"
        D.write_json(setup, self.setup)
        D.write_json(tasks, self.tasks)
        options = ["--tasks", tasks, "--limit", 8, "--rollouts", rollouts]
        options += ["--out", self.out, "--checkpoint", "agent.pt"] if self.out else []
        return P.main(["rollouts", str(setup), *map(str, options), *more])


@pytest.fixture
def session(tmp_path, monkeypatch):
    import train

    session = Session(tmp_path)
    monkeypatch.setattr(train, "load_agent", lambda *_: (session, session.checkpoint))
    monkeypatch.setattr(R, "RealEnv", session.environment)
    monkeypatch.setattr(P, "ask", session.ask)
    return session


def lines(path: Path) -> list[dict]:
    return [json.loads(x) for x in path.read_text().splitlines()]


def outcomes(session, name: str) -> list[str]:
    """What the logs of a rollout and its repetitions end with."""
    logs = [lines(p)[-1] for p in sorted(session.out.glob(f"rollouts/{name}_*.jsonl"))]
    assert {x["event"] for x in logs} == {"outcome"}
    return [x["outcome"] for x in logs]


def test_rollouts_are_judged_recorded_and_resumed_and_the_table_is_table_iis(session, capsys):
    # a/00 is seen to succeed; a/01's time is over, and it is judged a success; enough.
    result = session.rollouts("yggsq", ["s", None])
    assert result["tasks"] == {"a": [2, 2], "b": [0, 0]} and result["chains"] == []
    # b/00, with the object in hand, is invalid, then judged failed.
    result = session.rollouts("ygcgcfq", ["r", None])
    assert result["tasks"] == {"a": [2, 2], "b": [0, 1]}
    row = next(x for x in capsys.readouterr().out.splitlines()[::-1] if x.startswith("Both"))
    assert row.split() == ["Both", "3", "66.7%", "-", "60.0%", "50.0%", "70.0%"]
    records = lines(session.out / "rollouts.jsonl")[1:]
    assert [r["chain"] for r in records] == ["a/00", "a/01", "b/00"]
    names = {p.name for p in (session.out / "rollouts").iterdir()}
    for stem in ("a_00_0", "a_01_0", "b_00_0", "b_00_1"):  # also of the one that was invalid
        assert {f"{stem}.jsonl", f"{stem}.gif", f"{stem}_start.npz"} <= names
    assert outcomes(session, "b_00") == ["repeat", "failed"]
    assert "close" in session.made[-1].arm.calls


def test_chains_of_five_count_what_was_solved_in_a_row(session):
    result = session.rollouts("yg", ["s", "s", "f"], rollouts=0)
    assert result["chains"] == [2] and result["tasks"]["a"] == [0, 0]


@pytest.mark.parametrize(
    "wrong", [{"hz": 30}, {"action_scale": [0.01, 0.05]}, {"renderer": "tiny"}, {"frame": "tool"}]
)
def test_a_policy_of_another_rate_or_scale_is_refused_before_anything_moves(session, wrong):
    session.checkpoint["meta"] |= wrong
    with pytest.raises(SystemExit, match=next(iter(wrong))):
        session.rollouts("")
    assert session.made == []


@pytest.mark.parametrize(
    ("key", "answers", "outcome", "counts"),
    [
        ("f", "ygq", "failed", [0, 1]),
        ("a", "yg", "abort", None),
        ("r", "yggq", "repeat", [1, 1]),
        (None, "ygfq", "failed: homing: blocked", [0, 1]),  # judged by the operator
    ],
)
def test_a_rollout_that_ends_before_its_first_step_has_its_outcome(
    session, monkeypatch, key, answers, outcome, counts
):
    def home(self, q, check):  # the operator presses the key while the arm is homing
        if key is None:
            raise Lost("blocked")
        if not session.out.joinpath("rollouts/a_00_1.jsonl").exists():
            session.made[-1].keys.append(key)
        check()

    monkeypatch.setattr(Double, "home", home)
    result = session.rollouts(answers, ["s"])
    assert result.get("tasks", {}).get("a") == counts
    assert outcomes(session, "a_00")[0] == outcome
    assert not session.out.joinpath("rollouts/a_00_0.gif").exists()


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(session, capsys):
    with pytest.raises(SystemExit, match="130"):
        session.rollouts("ygg", ["s", "ctrl-c"])
    text = capsys.readouterr().out
    assert re.search("Ctrl-C.*same command", text)
    assert "33.3%" not in text and "100.0%" in text
    assert outcomes(session, "a_01") == ["interrupted"]
    assert session.rollouts("ygq", ["s"])["tasks"]["a"] == [2, 2]


def test_single_tasks_alone_and_an_abort_when_asked(session):
    alone = ["--chains", "0"]
    assert session.rollouts("yggq", ["s", "s"], more=alone)["tasks"]["a"] == [2, 2]
    session.rollouts("yga", more=alone)  # "c closes them, a abort"
    session.rollouts("ygca", [None], more=alone)  # "The time is over: ... a abort"
    assert outcomes(session, "b_00") == ["abort", "abort"]


def test_what_fails_before_the_first_motion_leaves_no_record_behind(session, monkeypatch):
    def unreachable(*_, **__):
        raise R.RobotError("no arm at 1.2.3.4")

    with monkeypatch.context() as patch:
        patch.setattr(R, "RealEnv", unreachable)
        with pytest.raises(SystemExit, match="no arm"):
            session.rollouts("")
    with pytest.raises(SystemExit, match="said no"):
        session.rollouts("n")
    assert set(session.made[-1].arm.calls) <= {"stop"}
    session.setup = {"max_state_age": 1.0}
    assert session.rollouts("ygq", ["s"])["tasks"]["a"] == [1, 1]
    session.setup = {"max_state_age": 0.5}
    only = r"another evaluation: robot.max_state_age was 1.0 and is 0.5 .*Give another"
    with pytest.raises(SystemExit, match=only):
        session.rollouts("")


def test_a_dry_run_sends_nothing_and_has_a_folder_and_a_column_of_its_own(session, tmp_path):
    session.out, checkpoint = None, str(tmp_path / "agent.pt")
    heads = []
    for more, name in (["--dry-run"], "evaluate_real_dry_run"), ([], "evaluate_real"):
        result = session.rollouts("ygq", ["s"], more=[*more, "--checkpoint", checkpoint])
        assert (tmp_path / name / "results.json").exists()
        heads.append(P.table(result).splitlines()[1])
    assert set(session.made[0].arm.calls) == {"stop"} and session.made[0].T is not None
    assert "send" in session.made[1].arm.calls
    assert "dry run" in heads[0] and "real" not in heads[0] and "real" in heads[1]


def test_a_task_file_that_cannot_be_is_named(session):
    good = session.tasks
    for wrong, match in (
        ({"rows": good["rows"]}, "'chains'"),
        ([], "tabletop.json"),
        (good | {"chains": [{"scene": "", "tasks": ["c"]}]}, "'c'"),
        (good | {"chains": [{"scene": None, "tasks": ["a"]}]}, "NoneType"),
    ):
        session.tasks = wrong
        with pytest.raises(SystemExit, match=rf"tasks.json.*{match}"):
            session.rollouts("")


def test_rollouts_are_dreamed_again_from_their_first_pictures_and_judged(
    session, monkeypatch, capsys
):
    session.rollouts("yggsq", ["s", None])  # two rollouts of a
    seen, picture = [], np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)

    def dream(policy, obs, embedding, limit):
        seen.append((obs, embedding, limit))
        return picture, picture

    monkeypatch.setitem(sys.modules, "diagnostics", types.SimpleNamespace(dream=dream))
    monkeypatch.setattr(R, "RealEnv", None)  # no robot

    def dreams(keys):
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
        row = session.rollouts("", more=["--dream"])["rows"][0]
        return row["real"], row["dream"]

    assert dreams("x\ns\nq\n") == ([2, 2], [1, 1])
    assert "1 rollouts are left" in capsys.readouterr().out
    start = np.load(session.out / "rollouts/a_00_0_start.npz")
    for k in ("rgb_static", "rgb_gripper"):
        np.testing.assert_array_equal(seen[0][0]["rgb_obs"][k], start[k])
    np.testing.assert_array_equal(seen[0][0]["robot_obs"], start["robot_obs"])
    np.testing.assert_array_equal(seen[0][1], D.encode([DRAWER])[0])
    assert seen[0][2] == 8  # --limit
    assert Image.open(session.out / "rollouts/a_00_0_dream.gif").n_frames == 9
    assert dreams("f\n") == ([2, 2], [1, 2])  # goes on with the second
    assert dreams("") == ([2, 2], [1, 2])
    monkeypatch.delattr(Session, "world")
    with pytest.raises(SystemExit, match="no world model to dream in"):
        dreams("f\n")
    assert "50.0%" in capsys.readouterr().out


# ---------------------------------------------------------------------------- the paper's tasks
def test_the_task_file_is_the_papers_22_tasks_in_14_rows_and_20_chains():
    setup = json.loads((ROOT / "assets/tabletop.json").read_text())
    tasks = [t for row in setup["rows"] for t in row["tasks"]]
    assert len(setup["rows"]) == 14 and len(tasks) == len(set(tasks)) == 22
    averages = np.mean([row["paper"] for row in setup["rows"]], axis=0)  # Table II: over its rows
    np.testing.assert_allclose(averages, [67.68, 63.39, 75.89], atol=0.01)
    assert setup["paper_chains"] == [2.05, 1.90]  # its last row
    sentences = {x["sentence"] for row in setup["rows"] for x in row["tasks"].values()}
    assert sentences <= set(D.embedding_table())  # no text encoder needed
    chains = [tuple(c["tasks"]) for c in setup["chains"]]
    assert len(set(chains)) == 20 and all(len(c) == 5 for c in chains)
    for chain in chains:  # lifted things are placed before the next is lifted
        assert set(chain) <= set(tasks)
        for lift, place in zip(chain[::2], chain[1::2], strict=False):
            assert lift.split("_")[:2] == ["lift", place.split("_")[1]]
            assert place.startswith("place")


def test_the_play_tables_embeddings_are_what_they_were_before_the_robots_were_added():
    """Checkpoints are trained on these bits. A new sentence goes behind them."""
    with np.load(ROOT / "assets/embeddings.npz") as z:
        rows = z["embeddings"][:442]
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    assert digest == "3b1deb80af9a12b880a9b76553fb114905009e75ba660302d84e0366c0547e8f"
