"""Claims about the reactive operator and its recordings (teleop.py)."""

import hashlib
import json
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import calvin
import data
import sim
import teleop

SEED, FRAMES, VAL, SKIP = 5, 330, 130, 2
LIFT = "lift_red_block_table"


@pytest.fixture(scope="module")
def env():
    env = sim.PlayTable(render=False)
    yield env
    env.close()


def scene(slider=0.0, drawer=0.0, light=0, led=0):
    """Red and blue on the table, pink in the cabinet's open half, at the benchmark's places."""
    s = calvin.SCENE_OBS0.copy()
    s[[0, 1, 3, 4, 5]] = slider, drawer, 0.088 * light, light, led
    s[17], s[18] = np.pi / 2, 0.0703 if slider else -0.2408
    return s


def seen_at(state, yaw=1.5, **more):
    """What is seen of a scene with the hand at the benchmark's start, turned to `yaw`."""
    robot = sim.ROBOT_OBS0.copy()
    robot[5] = yaw
    obs = {"robot_obs": robot, "scene_obs": state}
    return teleop.see(SimpleNamespace(target_pos=robot[:3]), obs)._replace(**more)


# ------------------------------------------------------------------------------------ the operator
def test_the_gap_to_a_turned_block_is_that_to_its_outline():
    state = scene()
    state[11] = 0.6  # red, 0.056 x 0.04 m, at (0.05, -0.12)
    u, v = np.array([np.cos(0.6), np.sin(0.6), 0]), np.array([-np.sin(0.6), np.cos(0.6), 0])
    for a, b, want in ((0.01, 0.01, 0), (0.058, 0, 0.03), (0, -0.06, 0.04), (0.058, 0.06, 0.05)):
        at = np.array([0.05, -0.12, 0.5]) + a * u + b * v
        assert teleop.gap(seen_at(state), "block_red", at) == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize("turn", [-1.27, 1.27])
@pytest.mark.parametrize("here", [-1.9, -0.7, 0.0, 1.9])
def test_a_block_is_taken_so_that_the_wrist_can_turn_it(here, turn):
    state = scene()
    state[6:9], state[12:15] = (-0.3, -0.1, 0.46), (0.3, -0.1, 0.46)  # out of the way
    for yaw in np.arange(-1.5, 1.6, 0.3):
        state[18:21], state[23] = (0.14, -0.1, 0.46), 1.5 + yaw
        off = teleop.grasp_yaw(seen_at(state, 1.5 + here), "block_pink", turn) - 1.5
        assert max(abs(off), abs(off + turn)) < 2.9
        assert abs(np.sin(off - yaw)) < 0.01, "across"
    state[18:24] = 0.14, -0.1, 0.5, 0.8, 0, 1.5  # one that lies askew can be taken, too
    assert np.isfinite(teleop.act("lift_pink_block_table", seen_at(state))).all()


def test_the_hand_keeps_from_its_goal_by_what_is_off_beside_it():
    """The one law: straight above it comes down, beside it it stays the higher the further off."""
    goal, heights = np.array([0.1, -0.1, 0.46]), []
    for beside in (0.0, 0.015, 0.03, 0.06):
        seen = seen_at(scene(), tcp=goal + np.array([beside, 0, 0.2]))
        pos, off, _ = teleop.funnel(seen, goal, teleop.UP, 0.1, seen.euler)
        assert off == pytest.approx(beside)
        heights.append(pos[2] - goal[2])
    assert heights[0] == 0 and np.all(np.diff(heights) > 0)
    assert heights[-1] == pytest.approx(0.1), "and no higher"


def test_an_action_depends_on_what_is_seen_alone_and_is_always_legal():
    rng = np.random.default_rng(0)
    for task in sim.TASKS * 10:
        state, tcp = teleop.random_scene(rng), rng.uniform(*teleop.ROOM)
        grip, width = int(rng.choice([-1, 1])), rng.uniform(0, 0.08)
        target = tcp + np.array([0.04, 0, 0])
        seen = seen_at(state, tcp=tcp, target=target, grip=grip, width=width)
        action = teleop.act(task, seen)
        assert np.array_equal(action, teleop.act(task, seen))
        assert np.abs(action).max() <= 1 and action[6] in (-1, 1)
        ahead = seen.target + action[:3] * sim.POS_SCALE * 2 - seen.tcp
        assert np.linalg.norm(ahead) < teleop.LEASH + 1e-9
    with pytest.raises(ValueError, match=r"unknown task.*open_drawer"):
        teleop.act("open_the_window", seen)


def test_a_burst_lets_go_of_a_block_beside_where_it_should_be():
    """Who believes the hand elsewhere believes its block there, too."""
    state, beside = scene(), np.array([0.03, -0.02, 0.0])
    state[12:15] = (0.2, -0.1, 0.46)  # blue, and red held just above a place 3.6 cm beside it
    state[6:9] = state[12:15] - beside + [0, 0, 0.044]
    seen = seen_at(state, tcp=state[6:9], target=state[6:9], euler=teleop.DOWN, width=0.05, grip=-1)
    assert teleop.held(seen) == "block_red" and teleop.act("stack_block", seen)[6] == teleop.CLOSE
    off, player = np.append(beside, [0, 0, 0]), SimpleNamespace(seen=seen, skip=SKIP)
    burst = teleop.Recorder.stray(player, "stack_block", teleop.BLOCKS, "belief", off)
    assert burst[6] == teleop.OPEN


@pytest.mark.parametrize("block, x, towards", [("red", 0.2, -1), ("blue", 0.08, 1)])
def test_the_largest_block_is_stacked_on_wherever_the_hand_is(block, x, towards):
    """Pink is, though another is nearer; an empty hand leaves it, too."""
    state, i, hand = scene(), teleop.BLOCKS.index(f"block_{block}"), np.array([x, -0.1, 0.56])
    state[18:21] = (0.14, -0.1, 0.46)  # pink, between red at 0.05 and blue at 0.23
    state[6 + 6 * i : 9 + 6 * i] = hand
    seen = seen_at(state, tcp=hand, target=hand, euler=teleop.DOWN, width=0.05, grip=-1)
    assert teleop.held(seen) == f"block_{block}"
    assert towards * (teleop.stack(seen)[0][0] - x) > 0.01
    above_pink = np.array([0.13, -0.1, 0.52])
    seen = seen_at(scene(), tcp=above_pink, target=above_pink, grip=1, width=0.08)
    seen.at["block_pink"] = np.array([0.14, -0.1, 0.46])
    assert teleop.stack(seen)[0][0] < 0.13, "towards red, the nearer of the others"


def test_stacking_is_also_told_from_where_the_block_has_fallen(env):
    tasks = ("stack_block", LIFT, LIFT.replace("red", "blue"))
    rng = np.random.default_rng(1)
    play = teleop.Recorder(env, sim.oracle, None, 0, 1500, rng, SKIP, pictures=False, tasks=tasks)
    part, states = play.play()
    first = [t for task, t, _ in part["spans"] if task == "stack_block"]
    heights, grip = states["scene_obs"][:, 8::6], states["robot_obs"][:, 14]
    fallen = [t for t in first if grip[t] == teleop.OPEN and heights[t].max() < 0.485]
    assert 2 <= len(fallen) <= len(first) - 2, "from an empty hand, and from one that holds a block"
    let_go = np.flatnonzero(np.diff(grip) == teleop.OPEN - teleop.CLOSE)  # rows of the action
    beside = [t for t in let_go if t - 1 in part["disturbed"] and heights[t].max() > 0.485]
    assert beside and set(beside) <= set(part["disturbed"]), "the one that lets go, too"


def test_what_the_hand_held_at_the_start_is_not_pushed_into_the_drawer(env):
    """CALVIN's rule does not count it, so the operator takes another block, or none."""
    seen = seen_at(scene(drawer=0.22))
    to_red, to_blue = (teleop.act("push_into_drawer", seen, [b])[0] for b in teleop.BLOCKS[:2])
    assert to_red > 0.05 and to_blue > to_red, "red lies at x = 0.05 m, blue at 0.23"
    assert teleop.act("push_into_drawer", seen, [])[:2] == pytest.approx([0, 0], abs=1e-6)
    assert "push_into_drawer" not in teleop.feasible(seen, [])
    env.reset(sim.ROBOT_OBS0, scene(drawer=0.22))
    assert teleop.attempt(env, sim.oracle, LIFT)[0]
    assert "block_red" not in teleop.free_blocks(env.get_info())


@pytest.mark.parametrize("x", [-0.06, 0.34])  # where pushing to the left or right leaves a block
def test_a_block_beside_the_drawer_is_pushed_in_front_of_it_first(env, x):
    state = scene(drawer=0.22)
    state[6:12] = x, -0.12, 0.46, 0, 0, 1.57
    state[12:15] = 0.07, 0.092, 0.461  # the blue one is in the cabinet, as the pink one
    env.reset(sim.ROBOT_OBS0, state)
    free = teleop.free_blocks(env.get_info())
    assert "push_into_drawer" in teleop.feasible(teleop.see(env, env.get_obs()), free)
    assert teleop.attempt(env, sim.oracle, "push_into_drawer", 128)[0]


def test_a_stack_beside_the_way_stays_where_it_is(env):
    state = scene()
    state[6:9], state[11] = (0.113, -0.108, 0.46), 1.9
    state[18:21], state[23] = (0.113, -0.108, 0.5), 1.9
    state[12:15], state[17] = (0.21, -0.099, 0.46), 1.57
    env.reset(sim.ROBOT_OBS0, state)
    assert teleop.attempt(env, sim.oracle, "rotate_blue_block_right", 64)[0]
    assert np.linalg.norm(env.get_obs()["scene_obs"][18:21] - state[18:21]) < 0.01


FAMILIES = {  # one task of each family: scene, then tasks that must come first
    "rotate_red_block_left": [{}], "push_blue_block_left": [{}], "open_drawer": [{}],
    "push_into_drawer": [{"drawer": 0.22}], "close_drawer": [{"drawer": 0.22}],
    "move_slider_left": [{}], "move_slider_right": [{"slider": 0.28}],
    "turn_on_lightbulb": [{}], "turn_off_lightbulb": [{"light": 1}], "turn_on_led": [{}],
    LIFT: [{}], "lift_pink_block_slider": [{}],
    "lift_red_block_drawer": [{"drawer": 0.22}, LIFT, "place_in_drawer"],
    "place_in_slider": [{"slider": 0.28}, "lift_blue_block_table"],
    "place_in_drawer": [{"drawer": 0.22}, LIFT],
    "stack_block": [{}, LIFT], "unstack_block": [{}, LIFT, "stack_block"],
}  # fmt: skip


@pytest.mark.parametrize("task", FAMILIES)
def test_each_family_is_solved_within_a_span(env, task):
    state, *before = FAMILIES[task]
    env.reset(sim.ROBOT_OBS0, scene(**state))
    for first in before:
        assert teleop.attempt(env, sim.oracle, first)[0], f"{first}, which must come before {task}"
    start = env.get_info()
    assert task in teleop.feasible(teleop.see(env, env.get_obs()), teleop.free_blocks(start))
    solved, steps = teleop.attempt(env, sim.oracle, task)
    assert solved and steps <= 64
    assert sim.oracle(start, env.get_info(), task)


@pytest.mark.parametrize("task", [LIFT, "open_drawer", "turn_on_led"])
def test_a_hand_that_is_pushed_aside_comes_back(env, task):
    """Four actions in another direction, ten steps before the skill would have ended."""
    env.reset(sim.ROBOT_OBS0, scene())
    _, steps = teleop.attempt(env, sim.oracle, task)
    env.reset(sim.ROBOT_OBS0, scene())
    start = env.get_info()
    assert not teleop.attempt(env, sim.oracle, task, steps - 10)[0]
    grip = env.get_obs()["robot_obs"][14]
    for _ in range(8):
        *_, info = env.step([0.6, -0.6, 0.2, 0, 0, 0.5, grip], render=False)
    assert not sim.oracle(start, info, task)

    def from_the_start(_, info, task):
        return sim.oracle(start, info, task)

    assert teleop.attempt(env, from_the_start, task, 90)[0]


def test_blocks_in_the_cabinet_begin_in_front_of_its_back_wall():
    """The wall is at y = 0.16 m, a block up to 0.08 m long and turned."""
    rng, deepest = np.random.default_rng(0), 0
    for _ in range(300):
        seen = seen_at(teleop.random_scene(rng))
        for b in teleop.lying(seen, "left", "right"):
            deepest = max(deepest, seen.at[b][1] + teleop.half_size(seen, b, 1))
    assert 0.15 < deepest < 0.16


def test_every_task_can_be_prepared_and_is_then_called_feasible(env):
    rng = np.random.default_rng(0)
    for task in sim.TASKS:
        state = teleop.random_scene(rng, task)
        assert state.shape == (24,) and set(state[4:6]) <= {0, 1}
        seen = teleop.see(env, env.reset(sim.ROBOT_OBS0, state))
        feasible = teleop.feasible(seen, teleop.free_blocks(env.get_info()))
        in_hand = task.startswith("place") or task == "stack_block"
        assert any(t.startswith("lift") if in_hand else t == task for t in feasible), task


# ------------------------------------------------------------------------------------ recording
def digest(folder):
    """{relative path: hash} of all files of a recording."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("play") / "rec"
    teleop.record(folder, FRAMES, VAL, procs=2, seed=SEED, skip=SKIP)
    return folder


def frames(folder, split="training"):
    files = sorted((folder / split).glob("episode_*.npz"))
    return [dict(np.load(f, allow_pickle=False)) for f in files]


def language(folder, split="training", name="auto_lang_ann"):
    return np.load(folder / split / data.LANGUAGE / f"{name}.npy", allow_pickle=True).item()


def test_a_recording_has_calvins_layout_in_episodes_each_of_a_scene_of_its_own(recording):
    about = json.loads((recording / "training" / "recording.json").read_text())
    assert (about["hz"], about["source"], about["action_scale"]) == (15, "sim", [0.02, 0.05])
    shapes = {"actions": (7,), "rel_actions": (7,), "robot_obs": (15,), "scene_obs": (24,)}
    shapes |= {"rgb_static": (64, 64, 3), "rgb_gripper": (64, 64, 3)}
    for split, n in (("training", FRAMES), ("validation", VAL)):
        f, ends = frames(recording, split), np.load(recording / split / "ep_start_end_ids.npy")
        assert len(f) == n and all(frame.keys() == shapes.keys() for frame in f)
        for k, v in [item for frame in f for item in frame.items()]:
            assert v.shape == shapes[k] and v.dtype == (np.uint8 if "rgb" in k else np.float64)
        # The episodes' bounds are inclusive, and cover every frame once.
        assert np.array_equal(np.concatenate([np.arange(a, b + 1) for a, b in ends]), np.arange(n))
        lengths, (shortest, longest) = ends @ (-1, 1) + 1, np.array(teleop.EPISODE) // SKIP
        assert np.array_equal(np.load(recording / split / "ep_lens.npy"), lengths)
        assert shortest <= lengths.min() and lengths.max() < longest + shortest + 150 // SKIP
        assert len(np.unique([f[a]["scene_obs"] for a, _ in ends], axis=0)) == len(ends)
        text = (recording / split / "statistics.yaml").read_text()
        keys = ("robot_obs", "scene_obs", "mean", "std", "act_min_bound", "act_max_bound")
        assert all(f"{key}:" in text for key in keys)
        mean = json.loads(text.split("scene_obs:")[1].split("mean: ")[1].splitlines()[0])
        np.testing.assert_allclose(mean, np.mean([x["scene_obs"] for x in f], axis=0), atol=1e-9)


def test_replaying_the_actions_from_an_episodes_first_frame_reproduces_it_and_its_spans(
    recording, env
):
    """In a span nothing is disturbed: there the hand turns as the operator would turn it."""
    f, ann, own = frames(recording), language(recording), []
    marked = np.load(recording / "training/disturbed.npy")
    assert marked.shape == (FRAMES,) and 0 < marked.mean() < 0.5
    astray = np.abs([x["rel_actions"][:6] for x, burst in zip(f, marked, strict=False) if burst])
    assert (astray.max(0) > 0.1).all()  # a world model must see what each of the six does
    spans = list(zip(ann["info"]["indx"], ann["language"]["task"], strict=True))
    episodes = np.load(recording / "training/ep_start_end_ids.npy")
    assert spans and len(episodes) > 1, "choose another seed"
    for a, b in episodes:
        obs = env.reset(f[a]["robot_obs"], f[a]["scene_obs"])
        infos = {a: env.get_info()}
        for t in range(a, b):
            action, after = f[t]["rel_actions"], f[t + 1]
            assert np.abs(action).max() <= 1 and action[6] in (-1, 1)
            for task in [task for (start, end), task in spans if start <= t < end - 1]:
                act = teleop.act(task, teleop.see(env, obs), skip=SKIP)
                own.append(np.allclose(act, action))
            for _ in range(SKIP):
                obs, _, _, infos[t + 1] = env.step(action, render=False)
            np.testing.assert_array_equal(obs["scene_obs"], after["scene_obs"])
            np.testing.assert_array_equal(obs["robot_obs"], after["robot_obs"])
            # The absolute action is the pose of the next frame.
            np.testing.assert_array_equal(f[t]["actions"][:6], after["robot_obs"][:6])
            assert f[t]["actions"][6] == action[6] == after["robot_obs"][14]
        for (start, end), task in [span for span in spans if a <= span[0][0] <= b]:
            assert end - 1 <= b and 0 < end - start <= 64 // SKIP  # as CALVIN's, without the end
            assert sim.oracle(infos[start], infos[end - 1], task)
            assert not sim.oracle(infos[start], infos[start], task)
            assert not marked[start : end - 1].any()
    assert np.mean(own) > 0.9


def test_what_is_hardest_is_told_twice_as_often_as_long_as_there_is_enough_of_it(tmp_path):
    tasks = ["stack_block", "open_drawer", "close_drawer"]
    parts = [{"spans": [(task, t, t + 9) for t in range(10) for task in tasks]}]
    for wanted, stacks in ((8, 4), (30, 10)):
        told = teleop.annotations(tmp_path, parts, wanted, seed=0)[1]
        assert len(told) == wanted and told.count("stack_block") == stacks
        assert told.count("open_drawer") == told.count("close_drawer")


def test_sentences_are_training_phrasings_in_training_and_the_held_out_one_in_validation(recording):
    for split in ("training", "validation"):
        lang, held_out = language(recording, split)["language"], split == "validation"
        assert lang["emb"].shape == (len(lang["ann"]), 1, 384) and lang["emb"].dtype == np.float32
        for sentence, task in zip(lang["ann"], lang["task"], strict=True):
            first, *others = calvin.sentences()[task]
            assert sentence in ([first] if held_out else others) and first not in others
    asked = language(recording, "validation", "embeddings")
    assert set(asked) == set(sim.TASKS)
    for task, row in asked.items():
        assert row["ann"] == calvin.sentences()[task][:1] and row["emb"].shape == (1, 1, 384)


def test_resume_after_a_crash_gives_the_same_files_and_a_finished_block_is_not_redone(
    recording, tmp_path
):
    broken, first = tmp_path / "rec", "training/episode_0000000.npz"
    shutil.copytree(recording, broken)
    place = broken / "validation"
    (place / "parts/00000.json").unlink()  # as if killed before the block was finished,
    for i in range(40, VAL):
        (place / f"episode_{i:07d}.npz").unlink()
    (place / "part_episode_0000040.npz").write_bytes(b"half a fra")  # in the middle of a frame
    mark = (broken / first).stat().st_mtime_ns
    teleop.record(broken, FRAMES, VAL, procs=1, seed=SEED, skip=SKIP)  # with other processes
    assert digest(broken) == digest(recording)
    assert (broken / first).stat().st_mtime_ns == mark


def test_another_recording_in_the_folder_or_an_impossible_number_is_refused(
    recording, tmp_path, monkeypatch
):
    others = {"seed": SEED + 1}, {"pictures": False}, {"tasks": ("open_drawer",)}
    for other in ({"seed": SEED} | other for other in others):
        with pytest.raises(data.DataError, match="Choose another folder"):
            teleop.record(recording, FRAMES, VAL, skip=SKIP, **other)
    with monkeypatch.context() as changed:
        changed.setattr(teleop, "__file__", __file__)  # another version of the operator
        with pytest.raises(data.DataError, match=r"recorder \d+, not \d+. Choose another folder"):
            teleop.record(recording, FRAMES, VAL, skip=SKIP, seed=SEED)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "thesis.txt").write_text("do not touch")
    with pytest.raises(data.DataError, match="Choose another folder"):
        teleop.record(tmp_path, FRAMES, VAL)
    with pytest.raises(ValueError, match="too few"):
        teleop.record(tmp_path / "new", 10, VAL)
    for option in ("--procs", "--n"):
        with pytest.raises(SystemExit, match=f"{option} 0: at least 1"):
            teleop.main(["rates", option, "0"])


class Leaking:
    """In the place of teleop.Where: a simulator that EGL draws."""

    env, renderer = "sim", "egl"

    def make(self, cameras):
        return "table", "oracle"


def _process(env, oracle, k):
    return os.getpid(), (env, oracle)


def test_under_egl_a_process_does_eight_jobs_and_not_more():
    jobs = [(k,) for k in range(17)]
    for cameras, wanted in ((True, [1, 8, 8]), (False, [17])):
        done = Counter(teleop.in_parallel(_process, jobs, 1, Leaking(), cameras))
        assert sorted(done.values()) == wanted and {made for _, made in done} == {
            ("table", "oracle")
        }


def test_a_recording_killed_at_its_very_beginning_goes_on_and_two_at_once_are_refused(tmp_path):
    place = tmp_path / "training"
    place.mkdir()
    (place / "part_recording.json").write_text("{")
    teleop.claim(place, {"hz": 30}, 100, 0, True, sim.TASKS)
    assert json.loads((place / "recording.json").read_text())["frames"] == 100
    with data.locked(tmp_path), pytest.raises(data.DataError, match="in use by process"):
        teleop.record(tmp_path, 100, 100)
    (place / "parts/00000.json").write_text('{"episodes": [[0, 1]], "crc": 0}')
    with pytest.raises(data.DataError, match=r"00000\.json: its checksum .*Remove that file"):
        teleop._part(place / "parts/00000.json")


def test_only_the_tasks_that_are_given_are_practised(tmp_path):
    few = ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led")
    teleop.record(tmp_path, 500, 100, procs=1, seed=1, skip=2, pictures=False, tasks=few)
    assert set(language(tmp_path)["language"]["task"]) == set(few)
    with pytest.raises(ValueError, match=r"unknown task 'open_door'.*open_drawer"):
        teleop.record(tmp_path / "new", 500, 100, tasks=("open_door",))


def test_the_same_seed_gives_the_same_play_in_any_process_with_pictures_or_without(
    recording, tmp_path
):
    for seed in (SEED, SEED + 1):
        folder = tmp_path / str(seed)
        teleop.record(folder, FRAMES, VAL, SKIP, pictures=False, procs=1, seed=seed)
        play = np.load(folder / "training/states.npz")
        for key, here in (("robot_obs", "robot_obs"), ("actions", "rel_actions")):
            there = np.array([f[here] for f in frames(recording)])
            assert np.array_equal(play[key], there) == (seed == SEED)
        assert np.array_equal(play["spans"], language(recording)["info"]["indx"]) == (seed == SEED)


@pytest.mark.parametrize(
    "seen_from, begin, span",
    [(0, 80, 80), (60, 80, 80), (60, 20, 69), (75, 20, 75), (101, 20, None)],
)
def test_a_span_has_64_steps_at_most_and_the_oracle_agrees_with_it(env, seen_from, begin, span):
    """As CALVIN's spans; of a skill of which the oracle saw too little there is none."""

    def oracle(start, end, task):  # of frame numbers
        return start >= seen_from

    rng = np.random.default_rng(0)
    play = teleop.Recorder(env, oracle, None, 0, 1000, rng, SKIP, pictures=False)
    play.infos, play.t = {t: t for t in range(101)}, 100
    assert play.annotate("open_drawer", begin) == (span is not None)
    assert play.spans == ([("open_drawer", span, 100)] if span else [])
