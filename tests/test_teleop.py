"""Claims about the scripted operator and its recordings (teleop.py)."""

import hashlib
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice, pairwise
from multiprocessing import get_context

import numpy as np
import pytest

import sim
import teleop

SEED, FRAMES, VAL = 5, 330, 130


@pytest.fixture(scope="module")
def env():
    env = sim.PlayTable(render=False)
    yield env
    env.close()


def scene(slider=0.0, drawer=0.0, light=0, led=0):
    """Red and blue on the table, pink in the cabinet's open half, at the benchmark's places."""
    s = np.zeros(24)
    s[[0, 1, 3, 4, 5]] = slider, drawer, 0.088 * light, light, led
    s[6:9], s[12:15] = (0.05, -0.12, 0.46), (0.23, -0.12, 0.46)
    s[18:21] = (0.0703 if slider else -0.2408, 0.0924, 0.461)
    s[[11, 17, 23]] = np.pi / 2
    return s


def operator_at(env, state, yaw=1.5):
    """An operator whose hand is turned by yaw - 1.5 rad from neutral, above a given scene."""
    env.reset(sim.ROBOT_OBS0, state)
    env.target_euler = np.array([np.pi, 0, yaw])
    return teleop.Operator(env).refresh()


def test_the_gap_to_a_turned_block_is_that_to_its_outline(env):
    state = scene()
    state[11] = 0.6  # red, 0.056 x 0.04 m, at (0.05, -0.12)
    op = operator_at(env, state)
    u, v = np.array([np.cos(0.6), np.sin(0.6), 0]), np.array([-np.sin(0.6), np.cos(0.6), 0])
    for a, b, want in ((0.01, 0.01, 0), (0.058, 0, 0.03), (0, -0.06, 0.04), (0.058, 0.06, 0.05)):
        at = np.array([0.05, -0.12, 0.5]) + a * u + b * v
        assert op._gap("block_red", at) == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize("turn", [-1.27, 1.27])
@pytest.mark.parametrize("here", [-1.9, -0.7, 0.0, 1.9])
def test_a_block_is_taken_so_that_the_wrist_can_turn_it(env, here, turn):
    for yaw in np.arange(-1.5, 1.6, 0.3):
        state = scene()
        state[18:21], state[23] = (0.14, -0.1, 0.46), 1.5 + yaw
        state[6:9], state[12:15] = (-0.3, -0.1, 0.46), (0.3, -0.1, 0.46)  # out of the way
        op = operator_at(env, state, 1.5 + here)
        (taken, shift), *_ = op._grasps("block_pink", turn)
        off = taken - 1.5
        assert max(abs(off), abs(off + turn)) < 3.0 and abs(off - here) < np.pi
        assert abs(np.sin(off - yaw)) < 0.01 and not shift.any(), "across, in the middle"


def test_fingers_find_room_beside_a_neighbour(env):
    state = scene()
    state[18:21], state[23] = (0.1, -0.1, 0.46), 1.5
    state[6:9], state[12:15] = (-0.3, -0.1, 0.46), (0.045, -0.11, 0.46)  # blue at pink's side
    op = operator_at(env, state)
    blue = state[12:14]
    for turn in (0.0, 1.27):
        (yaw, shift), *_ = op._grasps("block_pink", turn)
        f = np.array([-np.sin(yaw), np.cos(yaw)])
        for side in (-1, 1):  # a finger's pad, 0.021 m wide and 0.014 m thick, the hand open
            finger = state[18:20] + shift[:2] + side * 0.047 * f
            clear = np.abs(finger - blue) - 0.02 - [0.007, 0.0105]
            assert clear.max() > 0, f"a finger stands on the blue block, turn {turn}"


def test_what_the_hand_has_just_turned_is_not_pushed_into_the_drawer(env):
    state = scene(drawer=0.22)
    state[12:15] = 0.0, 0.09, 0.461  # blue in the cabinet: red, in the hand, is the only one left
    op = operator_at(env, state)
    assert "push_into_drawer" in op.feasible()
    assert op.attempt("rotate_red_block_left")[0] and "block_red" in op.touched()
    assert "push_into_drawer" not in op.feasible()


def test_a_block_that_lies_askew_has_grasps_too(env):
    state = scene()
    state[18:24] = 0.14, -0.1, 0.5, 0.8, 0, 1.5  # pink, rolled by 46 degrees
    op = operator_at(env, state)
    assert all(np.isfinite(shift).all() for _, shift in op._grasps("block_pink"))


def test_a_stack_beside_the_way_stays_where_it_is(env):
    state = scene()
    state[6:9], state[11] = (0.113, -0.108, 0.46), 1.9
    state[18:21], state[23] = (0.113, -0.108, 0.5), 1.9
    state[12:15], state[17] = (0.21, -0.099, 0.46), 1.57
    op = operator_at(env, state)
    assert op.attempt("rotate_blue_block_right", 64)[0]
    assert np.linalg.norm(op.block("block_pink")[0] - state[18:21]) < 0.01


# One task of each family: (task, scene, tasks that must come first).
FAMILIES = [
    ("rotate_red_block_left", scene(), []),
    ("push_blue_block_left", scene(), []),
    ("move_slider_left", scene(), []),
    ("move_slider_right", scene(slider=0.28), []),
    ("open_drawer", scene(), []),
    ("close_drawer", scene(drawer=0.22), []),
    ("lift_red_block_table", scene(), []),
    ("lift_pink_block_slider", scene(), []),
    ("lift_red_block_drawer", scene(drawer=0.22), ["lift_red_block_table", "place_in_drawer"]),
    ("place_in_slider", scene(slider=0.28), ["lift_blue_block_table"]),
    ("place_in_drawer", scene(drawer=0.22), ["lift_red_block_table"]),
    ("stack_block", scene(), ["lift_red_block_table"]),
    ("unstack_block", scene(), ["lift_red_block_table", "stack_block"]),
    ("turn_on_lightbulb", scene(), []),
    ("turn_off_lightbulb", scene(light=1), []),
    ("turn_on_led", scene(), []),
    ("push_into_drawer", scene(drawer=0.22), []),
]


@pytest.mark.parametrize("task, state, before", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_each_family_is_solved_within_a_span_through_the_seven_numbers(env, task, state, before):
    env.reset(sim.ROBOT_OBS0, state)
    actions = []
    op = teleop.Operator(env, on_step=lambda a, obs, info: actions.append(a))
    for first in before:
        assert op.attempt(first)[0], f"{first} failed, which must come before {task}"
    assert task in op.feasible()
    del actions[:]
    start = env.get_info()
    success, steps = op.attempt(task)
    assert success and steps == len(actions) <= 64
    assert sim.oracle(start, env.get_info(), task)
    actions = np.array(actions)
    assert np.abs(actions).max() <= 1 and set(actions[:, 6]) <= {-1.0, 1.0}


def test_a_try_that_goes_astray_is_mended_or_followed_by_one_that_does_not(env):
    """8 frames towards a place 1 to 6 cm beside the button, or with open fingers towards it, or
    both; then the rest of the way to the right place, or a new try from there."""
    seen_flips, tries = set(), set()
    for seed in range(12):
        ends, grips = [], []
        for astray in (0, 8):
            env.reset(sim.ROBOT_OBS0, scene())
            op, seen, grip = teleop.Operator(env, np.random.default_rng(seed)), [], []
            op.on_step = lambda action, obs, info, seen=seen, grip=grip, op=op: (
                seen.append(op.target()[0]), grip.append(action[6])
            )  # fmt: skip
            op.refresh().style(astray=astray)
            skill, begun = op._skill, []
            op._skill = lambda task, skill=skill, begun=begun: begun.append(task) or skill(task)
            assert op.attempt("turn_on_led") == (True, len(seen))
            assert (op.tries, op.began) == (0, astray)
            tries.add((astray, len(begun)))
            ends.append(seen[7]), grips.append(grip)
        beside, flipped = np.linalg.norm(ends[1] - ends[0]), grips[1][7] != grips[0][7]
        # A hand that is to turn, too, is not yet as far.
        assert 0.008 < beside < 0.15 or (beside < 1e-6 and flipped)
        assert set(grips[1][:8]) == {grips[1][0]} and set(grips[1][8:]) == {-1}
        seen_flips.add((bool(flipped), bool(beside > 0.008)))
    assert seen_flips == {(False, True), (True, True), (True, False)}
    assert tries == {(0, 1), (8, 1), (8, 2)}


def test_a_way_without_a_step_does_not_end_a_try_after_one_that_went_astray(env, monkeypatch):
    """The corrected try may begin at a way-point where the hand is already."""
    env.reset(sim.ROBOT_OBS0, scene())
    op = teleop.Operator(env, np.random.default_rng(0))
    op.refresh().style(astray=4)
    skill = op._skill
    here = lambda task: chain([teleop.Way(*op.target(), 1)], skill(task))
    monkeypatch.setattr(op, "_skill", here)
    assert op.attempt("turn_on_led")[0] and op.began == 4


def test_the_motion_that_succeeded_can_be_completed(env):
    """What a policy imitates must not stop where the oracle's threshold is: 5 cm for a lift."""
    env.reset(sim.ROBOT_OBS0, scene())
    op = teleop.Operator(env)
    start, rest = env.get_info(), np.array(op.refresh().block("block_red")[0])
    assert op.attempt("lift_red_block_table")[0]
    assert op.block("block_red")[0][2] - rest[2] < 0.065
    op.run(islice(op.rest, 1), teleop.SETTLE)
    assert op.block("block_red")[0][2] - rest[2] > 0.075
    assert sim.oracle(start, env.get_info(), "lift_red_block_table")


def test_an_unknown_task_is_an_error_that_names_the_choices(env):
    with pytest.raises(ValueError, match=r"unknown task.*open_drawer"):
        teleop.Operator(env.reset() and env).attempt("open_the_window")


def test_every_task_can_be_prepared_and_is_then_called_feasible(env):
    rng = np.random.default_rng(0)
    for task in sim.TASKS:
        state = teleop.random_scene(rng, task)
        assert state.shape == (24,) and set(state[4:6]) <= {0, 1}
        env.reset(sim.ROBOT_OBS0, state)
        op = teleop.Operator(env, rng)
        if task.startswith("place") or task == "stack_block":
            assert any(t.startswith("lift") for t in op.feasible()), task
        else:
            assert task in op.feasible(), task


# ------------------------------------------------------------------------------------ recording
def digest(folder):
    """{relative path: hash} of all files of a recording."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("play") / "rec"
    teleop.record(folder, FRAMES, VAL, procs=2, seed=SEED)
    return folder


def frames(folder, split="training"):
    files = sorted((folder / split).glob("episode_*.npz"))
    return [dict(np.load(f, allow_pickle=False)) for f in files]


def language(folder, split="training"):
    return np.load(folder / split / teleop.LANG / "auto_lang_ann.npy", allow_pickle=True).item()


def test_a_recording_has_calvins_layout(recording):
    about = json.loads((recording / "training" / "recording.json").read_text())
    assert (about["hz"], about["source"], about["action_scale"]) == (30, "sim", [0.02, 0.05])
    shapes = {
        "actions": (7,), "rel_actions": (7,), "robot_obs": (15,), "scene_obs": (24,),
        "rgb_static": (64, 64, 3), "rgb_gripper": (64, 64, 3),
    }  # fmt: skip
    for split, n in (("training", FRAMES), ("validation", VAL)):
        all_frames = frames(recording, split)
        assert len(all_frames) == n
        for f in all_frames:
            assert {k: v.shape for k, v in f.items()} == shapes
            assert all(
                v.dtype == (np.uint8 if k.startswith("rgb") else np.float64) for k, v in f.items()
            )
        bounds = np.load(
            recording / split / "ep_start_end_ids.npy"
        )  # inclusive, covering every frame once
        assert np.array_equal(
            np.concatenate([np.arange(a, b + 1) for a, b in bounds]), np.arange(n)
        )
        assert np.array_equal(
            np.load(recording / split / "ep_lens.npy"), bounds[:, 1] - bounds[:, 0] + 1
        )
        text = (recording / split / "statistics.yaml").read_text()
        assert all(
            k in text
            for k in (
                "robot_obs:",
                "scene_obs:",
                "mean:",
                "std:",
                "act_min_bound:",
                "act_max_bound:",
            )
        )
        mean = json.loads(text.split("scene_obs:")[1].split("mean: ")[1].splitlines()[0])
        np.testing.assert_allclose(
            mean, np.mean([f["scene_obs"] for f in all_frames], axis=0), atol=1e-9
        )


def test_actions_are_the_pose_of_the_next_frame_and_the_commanded_numbers(recording):
    f = frames(recording)
    last = {int(b) for _, b in np.load(recording / "training" / "ep_start_end_ids.npy")}
    for t in range(FRAMES - 1):
        assert np.abs(f[t]["rel_actions"]).max() <= 1 and f[t]["rel_actions"][6] in (-1, 1)
        if t not in last:
            np.testing.assert_array_equal(f[t]["actions"][:6], f[t + 1]["robot_obs"][:6])
            assert f[t]["actions"][6] == f[t]["rel_actions"][6] == f[t + 1]["robot_obs"][14]


def test_replaying_the_actions_from_the_first_frame_reproduces_the_scene_and_the_oracles_spans(
    recording, env
):
    f, ann = frames(recording), language(recording)
    spans = list(zip(ann["info"]["indx"], ann["language"]["task"], strict=True))
    assert spans, "no skill succeeded in this recording: choose another seed"
    for a, b in np.load(recording / "training" / "ep_start_end_ids.npy"):
        env.reset(f[a]["robot_obs"], f[a]["scene_obs"])
        infos = {a: env.get_info()}
        for t in range(a, b):
            obs, _, _, infos[t + 1] = env.step(f[t]["rel_actions"], render=False)
            np.testing.assert_array_equal(obs["scene_obs"], f[t + 1]["scene_obs"])
            np.testing.assert_array_equal(obs["robot_obs"], f[t + 1]["robot_obs"])
        for (start, end), task in spans:
            if a <= start <= b:
                assert end - 1 <= b and 0 < end - start <= 64  # as CALVIN's, without the end
                assert sim.oracle(infos[start], infos[end - 1], task)
                assert not sim.oracle(infos[start], infos[start], task)


def test_sentences_are_training_phrasings_in_training_and_the_held_out_one_in_validation(recording):
    sentences = json.loads((teleop.ASSETS / "sentences.json").read_text())["tasks"]
    assert tuple(sorted(sentences)) == tuple(sorted(sim.TASKS))
    for split, key in (("training", "train"), ("validation", "validation")):
        lang = language(recording, split)["language"]
        assert lang["emb"].shape == (len(lang["ann"]), 1, 384) and lang["emb"].dtype == np.float32
        assert all(s in sentences[t][key] for s, t in zip(lang["ann"], lang["task"], strict=True))
    held_out = np.load(
        recording / "validation" / teleop.LANG / "embeddings.npy", allow_pickle=True
    ).item()
    assert set(held_out) == set(sim.TASKS)
    for task, row in held_out.items():
        assert row["ann"] == sentences[task]["validation"] and row["emb"].shape == (1, 1, 384)
        assert not set(row["ann"]) & set(sentences[task]["train"])


def test_resume_after_a_crash_gives_the_same_files_and_a_finished_block_is_not_redone(
    recording, tmp_path
):
    broken = tmp_path / "rec"
    shutil.copytree(recording, broken)
    place = broken / "validation"
    (place / "parts" / "00000.json").unlink()  # as if killed before the block was finished,
    for i in range(40, VAL):
        (place / f"episode_{i:07d}.npz").unlink()
    (place / "episode_0000040.npz.tmp").write_bytes(
        b"half a fra"
    )  # in the middle of writing a frame
    mark = (broken / "training" / "episode_0000000.npz").stat().st_mtime_ns
    teleop.record(broken, FRAMES, VAL, procs=1, seed=SEED)  # and with another number of processes
    assert digest(broken) == digest(recording)
    assert (broken / "training" / "episode_0000000.npz").stat().st_mtime_ns == mark


def test_another_recording_in_the_folder_is_an_error_with_a_remedy(recording, tmp_path):
    with pytest.raises(FileExistsError, match="choose another folder"):
        teleop.record(recording, FRAMES, VAL, seed=SEED + 1)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "thesis.txt").write_text("do not touch")
    with pytest.raises(FileExistsError, match="choose another folder"):
        teleop.record(tmp_path, FRAMES, VAL)
    with pytest.raises(ValueError, match="too few"):
        teleop.record(tmp_path / "new", 10, VAL)


@pytest.mark.parametrize("option", ["--procs", "--n"])
def test_an_impossible_number_is_refused_by_name(option, capsys):
    with pytest.raises(SystemExit):
        teleop.main(["rates", option, "0"])
    assert f"{option} 0: at least 1" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    def fill(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"x\.npz: No space left on device\. Free some space"):
        teleop.write(tmp_path / "x.npz", fill)
    assert not list(tmp_path.iterdir())


def _state(seed):
    """A short piece of play in a process of its own."""
    env = sim.PlayTable(render=False)
    rng = np.random.default_rng(seed)
    env.reset(sim.ROBOT_OBS0, teleop.random_scene(rng))
    op = teleop.Operator(env, rng)
    op.style(vary=1.0, noise=0.3)
    for _ in range(3):
        op.attempt(str(rng.choice(op.feasible())), 60)
    return env.get_obs()["scene_obs"].tolist(), op.steps


def test_same_seed_same_play_in_any_process_and_another_seed_other_play():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        there = pool.submit(_state, 1)
        other = pool.submit(_state, 2)
        assert _state(1) == there.result() != other.result()


@pytest.fixture
def span(env, tmp_path, monkeypatch):
    """span(oracle, last): what is annotated of a skill from `start` to 100 of `last` frames."""
    monkeypatch.setattr(teleop, "_count", lambda: None)

    def play(oracle, last, start=70):
        recorder = teleop.Recorder(env, tmp_path, 0, 1000, np.random.default_rng(0), oracle)
        recorder.obs = obs = {"robot_obs": np.zeros(15), "scene_obs": np.zeros(24), "rgb_obs": {}}
        for t in range(1, last):
            recorder.on_step(np.zeros(7), obs, t)
            if t == 100:
                recorder.settling = recorder.annotate("open_drawer", start)
            if t == 104:
                recorder.settling = False
        return recorder.spans

    return play


def test_a_span_begins_with_its_skill_and_ends_where_its_motion_does(span):
    """The oracle here agrees from frame 30 on, until frame 106, or two frames after the success."""
    assert span(lambda a, b, task: a >= 30 and b <= 106, 120) == [["open_drawer", 70, 104]]
    assert span(lambda a, b, task: a >= 30 and b <= 102, 120) == [["open_drawer", 70, 102]]


def test_a_span_has_64_frames_at_most(span):
    assert span(lambda a, b, task: True, 101, start=20) == [["open_drawer", 37, 100]]
    assert span(lambda a, b, task: True, 130, start=20) == [["open_drawer", 41, 104]]


def test_a_skill_of_which_the_oracle_saw_too_little_is_no_span(span):
    assert span(lambda a, b, task: a < 37, 130, start=20) == []


@pytest.mark.parametrize("astray", [0, 30])
def test_a_segments_span_grows_while_its_motion_is_completed_and_not_in_the_retreat(
    astray, env, tmp_path, monkeypatch
):
    """Success after 10 frames, 3 more of the same motion, then a retreat of 20. Success before the
    hand, sent astray for 30 frames, was to see its mistake is no example of anything."""
    monkeypatch.setattr(teleop, "_count", lambda: None)
    recorder = teleop.Recorder(env, tmp_path, 0, 1000, np.random.default_rng(3), lambda *_: True)
    recorder.obs = obs = {"robot_obs": np.zeros(15), "scene_obs": np.zeros(24), "rgb_obs": {}}
    recorder.infos[0], op, tried = None, recorder.op, []

    def act(frames):
        for _ in range(frames):
            recorder.on_step(np.zeros(7), obs, None)

    def attempt(task, most):
        tried.append(task)
        act(10)
        op.began, op.astray, op.rest = 4, astray, iter([3, 20])
        return True, 10

    monkeypatch.setattr(op, "attempt", attempt)
    monkeypatch.setattr(op, "run", lambda ways, most: [act(w) for w in ways])
    for name, value in (("feasible", ["open_drawer"]), ("held", None), ("refresh", op)):
        monkeypatch.setattr(op, name, lambda value=value: value)
    monkeypatch.setattr(op, "home", lambda: ())
    while not tried:
        start = recorder.t
        recorder.segment()
    assert recorder.spans == ([] if astray else [["open_drawer", start + 4, start + 13]])
    assert not recorder.settling and (astray or recorder.t - start in (13, 33))


def test_a_frame_of_two_steps_is_what_packing_makes_of_two_frames(tmp_path, monkeypatch):
    """The same play at 30 and at 15 Hz: every second picture, mean actions, the last gripper."""
    monkeypatch.setattr(teleop, "_count", lambda: None)
    steps, parts, env = 300, {}, sim.PlayTable()
    for skip in (1, 2):
        folder, rng = tmp_path / str(skip), np.random.default_rng(5)
        folder.mkdir()
        parts[skip] = teleop.Recorder(env, folder, 0, steps // skip, rng, skip=skip).play()
    env.close()
    load = lambda skip, i: np.load(tmp_path / str(skip) / f"episode_{i:07d}.npz")
    assert not (tmp_path / f"2/episode_{steps // 2:07d}.npz").exists()
    for i in range(steps // 2):
        frame, first, second = load(2, i), load(1, 2 * i), load(1, 2 * i + 1)
        for k in ("rgb_static", "rgb_gripper", "robot_obs", "scene_obs"):
            assert (frame[k] == first[k]).all(), (i, k)
        assert (frame["actions"] == second["actions"]).all()
        mean = (first["rel_actions"] + second["rel_actions"]) / 2
        assert np.allclose(frame["rel_actions"][:6], mean[:6])
        assert frame["rel_actions"][6] == second["rel_actions"][6]
    assert [parts[skip]["episodes"] for skip in (1, 2)] == [[(0, 299)], [(0, 149)]]
    kept = 2 * np.arange(steps // 2)  # as data.py's plan_split keeps them
    rows = [(t, *np.searchsorted(kept, (a, b + 1))) for t, a, b in parts[1]["spans"]]
    assert rows and [(t, a, b + 1) for t, a, b in parts[2]["spans"]] == rows


@pytest.mark.parametrize("skip", [1, 2])
def test_play_is_cut_into_episodes_each_of_a_scene_of_its_own(skip, env, tmp_path, monkeypatch):
    """Also where one ends within a frame, whose steps so far are then left out."""
    monkeypatch.setattr(teleop, "_count", lambda: None)
    at, drawn = [], []  # the time before each step, and whether its end is drawn

    def segment(recorder):  # 21 steps of nothing
        recorder.obs.setdefault("rgb_obs", {})  # this env draws nothing
        for _ in range(21):
            at.append(recorder.t)
            drawn.append(recorder.op.render)
            recorder.on_step(np.full(7, recorder.t), recorder.op.obs | {"rgb_obs": {}}, None)
        recorder.spans.append(["nothing", recorder.t - 1, recorder.t])  # its last step
        return False

    monkeypatch.setattr(teleop.Recorder, "segment", segment)
    monkeypatch.setattr(teleop.Operator, "run", lambda op, ways, most: None)
    monkeypatch.setattr(teleop, "EPISODE", (50, 150))
    recorder = teleop.Recorder(env, tmp_path, 0, 600 // skip, np.random.default_rng(0), skip=skip)
    part = recorder.play()
    episodes = part["episodes"]
    assert episodes[0][0] == 0 and episodes[-1][1] == 600 // skip - 1
    assert all(b == c - 1 for (_, b), (c, _) in pairwise(episodes))
    assert all(50 // skip <= b - a + 1 < (150 + 21 + 50) / skip for a, b in episodes)
    assert drawn == [(t + 1) % skip == 0 for t in at]  # a frame's first picture, and no other
    again = [b for a, b in pairwise(at) if b <= a]  # an episode ended within a frame
    assert all(t % skip == 0 for t in again) and bool(again) == (skip > 1)
    for i in range(600 // skip):  # what was commanded in the steps left out is in no frame
        frame = np.load(tmp_path / f"episode_{i:07d}.npz")
        assert frame["rel_actions"][0] == i * skip + (skip - 1) / 2
    begins, spans = {a for a, _ in episodes}, {a for _, a, _ in part["spans"]}
    assert spans and not spans & begins  # nor do they begin a span
    starts = [np.load(tmp_path / f"episode_{a:07d}.npz")["scene_obs"] for a, _ in episodes]
    assert len(np.unique(starts, axis=0)) == len(episodes)
