"""CALVIN (Sec. V-A): its tasks, its 1000 chains, and its own simulator behind our interface.

Where calvin_env is not found, CALVIN_ENV names its clone; else the tests of it are skipped."""

import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import calvin
import evaluate as E
import sim
import teleop

# sha256 of what CALVIN's own code draws (numpy 2.4, with pyhash): see `digest` below.
BENCHMARK = "d710427c76f1b1c2accd3fabbc3fed33e233dd56473f19ca2ccdf1f59cddd97d"
CLONE = os.environ.get("CALVIN_ENV")
_kept = []  # of the process with the simulation: its only Table


# ------------------------------------------------------------------ the 34 tasks
ROBOT, TABLE, RED, BLUE, PINK = 0, 1, 2, 3, 4  # bodies of hand-made infos
LINKS = {"base_link": -1, "drawer_link": 3, "plank_link": 6}


def made(robot=(), red=(), blue=(), x=0, z=0.46, yaw=0, roll=0, speed=0, **states):
    """A hand-made info. robot, red, blue: what each touches, as (body, link)."""
    (cy, cr), (sy, sr) = np.cos(np.radians([yaw, roll]) / 2), np.sin(np.radians([yaw, roll]) / 2)
    pose = {"current_pos": (x, 0, z), "current_orn": (sr * cy, sr * sy, cr * sy, cr * cy)}
    pose |= {"current_lin_vel": (speed, 0, 0), "current_ang_vel": (0, 0, 0)}
    touched = {"robot": robot, "red": red, "blue": blue, "pink": ()}
    uids = dict(zip(touched, (ROBOT, RED, BLUE, PINK), strict=True))
    things = {
        name: {"uid": uids[name], "contacts": [(0, 9, body, -1, link) for body, link in pairs]}
        for name, pairs in touched.items()
    }
    doors = {"base__slide": states.get("slide", 0), "base__drawer": states.get("drawer", 0)}
    lights = {"lightbulb": states.get("bulb", 0), "led": states.get("led", 0)}
    return {
        "robot_info": things.pop("robot"),
        "scene_info": {
            "fixed_objects": {"table": {"uid": TABLE, "links": LINKS}},
            "movable_objects": {f"block_{name}": thing | pose for name, thing in things.items()},
            "doors": {name: {"current_state": value} for name, value in doors.items()},
            "lights": {name: {"logical_state": value} for name, value in lights.items()},
        },
    }


TOP, SHELF, TRAY, HAND = (TABLE, -1), (TABLE, 6), (TABLE, 3), (ROBOT, 9)
ON_TOP = made(red=[TOP])
HELD = made(robot=[(RED, -1)], red=[HAND])
STACK = {"red": [(BLUE, -1)], "blue": [(RED, -1), TOP]}
CASES = [  # task, start, end, done?
    ("rotate_red_block_left", ON_TOP, made(red=[TOP], yaw=61), True),
    ("rotate_red_block_left", ON_TOP, made(red=[TOP], yaw=59), False),
    ("rotate_red_block_right", ON_TOP, made(red=[TOP], yaw=-61), True),
    ("rotate_red_block_right", made(yaw=150), made(red=[TOP], yaw=-130), False),  # 80° to the left
    ("rotate_red_block_left", made(yaw=150), made(red=[TOP], yaw=-130), True),
    ("rotate_red_block_left", ON_TOP, made(red=[TOP], yaw=90, roll=40), False),
    ("rotate_red_block_left", ON_TOP, made(red=[HAND], yaw=90), False),  # still in the hand alone
    ("rotate_red_block_left", ON_TOP, made(red=[HAND, TOP], yaw=90), True),
    ("rotate_red_block_left", ON_TOP, made(red=[TOP], yaw=90, x=0.11), False),
    ("push_red_block_right", ON_TOP, made(red=[TOP], x=0.11), True),
    ("push_red_block_right", ON_TOP, made(red=[TOP], x=0.09), False),
    ("push_red_block_left", ON_TOP, made(red=[TOP], x=0.11), False),
    ("push_red_block_left", ON_TOP, made(red=[TOP, HAND], x=-0.11), True),
    ("push_red_block_right", ON_TOP, made(red=[HAND], x=0.11, z=0.5), False),
    ("push_red_block_right", made(red=[HAND]), made(red=[TOP], x=0.11), False),
    ("move_slider_left", made(slide=0.0), made(slide=0.16), True),
    ("move_slider_right", made(slide=0.28), made(slide=0.12), True),
    ("open_drawer", made(drawer=0.0), made(drawer=0.13), True),
    ("open_drawer", made(drawer=0.1), made(drawer=0.2), False),
    ("close_drawer", made(drawer=0.2), made(drawer=0.05), True),
    ("lift_red_block_table", ON_TOP, made(red=[HAND], z=0.52), True),
    ("lift_red_block_table", ON_TOP, made(red=[HAND, TOP], z=0.52), False),
    ("lift_red_block_slider", made(red=[SHELF]), made(red=[HAND], z=0.495), True),
    ("lift_red_block_slider", ON_TOP, made(red=[HAND], z=0.52), False),
    ("lift_red_block_drawer", made(red=[TRAY], z=0.36), made(red=[HAND]), True),
    ("lift_blue_block_table", ON_TOP, made(red=[HAND], z=0.52), False),
    ("place_in_slider", HELD, made(red=[SHELF]), True),
    ("place_in_slider", HELD, made(robot=[(RED, -1)], red=[SHELF, HAND]), False),
    ("place_in_drawer", HELD, made(red=[TRAY]), True),
    ("place_in_drawer", made(robot=[(RED, -1), TOP], red=[HAND]), made(red=[TRAY]), False),
    ("place_in_drawer", made(robot=[(RED, -1)], red=[HAND, TOP]), made(red=[TRAY]), False),
    ("place_in_drawer", made(robot=[(TABLE, 3)]), made(red=[TRAY]), False),
    ("stack_block", HELD, made(**STACK), True),
    ("stack_block", HELD, made(**STACK | {"red": [(BLUE, -1), HAND]}), False),
    ("stack_block", HELD, made(**STACK, speed=1.1), False),
    ("unstack_block", made(**STACK), HELD, True),
    ("unstack_block", made(**STACK | {"red": [(BLUE, -1), TOP]}), HELD, False),
    ("turn_on_lightbulb", made(bulb=0), made(bulb=1), True),
    ("turn_off_lightbulb", made(bulb=1), made(bulb=0), True),
    ("turn_on_led", made(bulb=0), made(bulb=1), False),
    ("turn_off_led", made(led=1), made(led=0), True),
    ("push_into_drawer", ON_TOP, made(red=[TRAY]), True),
    ("push_into_drawer", ON_TOP, made(red=[TRAY, HAND]), False),
    ("push_into_drawer", made(red=[TOP, HAND]), made(red=[TRAY]), False),
]


@pytest.mark.parametrize(("task", "start", "end", "done"), CASES)
def test_each_rule_of_the_34_tasks(task, start, end, done):
    assert calvin.oracle(start, end, task) is done


def test_the_34_tasks_come_in_the_order_of_calvins_table():
    kinds = [re.sub("_(red|blue|pink)_block", "", task) for task in calvin.TASKS]
    assert kinds[:12] == ["rotate_right", "rotate_left"] * 3 + ["push_right", "push_left"] * 3
    assert kinds[12:16] == ["move_slider_left", "move_slider_right", "open_drawer", "close_drawer"]
    assert kinds[16:25] == ["lift_table", "lift_slider", "lift_drawer"] * 3
    assert kinds[25:29] == ["place_in_slider", "place_in_drawer", "stack_block", "unstack_block"]
    assert kinds[29:31] == ["turn_on_lightbulb", "turn_off_lightbulb"]
    assert kinds[31:] == ["turn_on_led", "turn_off_led", "push_into_drawer"]
    colours = [c for c in ("red", "blue", "pink") for _ in range(2)]
    assert [task.split("_")[1] for task in calvin.TASKS[:12]] == colours * 2
    assert len(set(calvin.TASKS)) == 34


def test_an_unknown_task_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="open_drawer"):
        calvin.oracle(ON_TOP, ON_TOP, "open_the_drawer")


# ------------------------------------------------------------------ the benchmark's 1000 chains
@pytest.fixture(scope="module")
def chains():
    return [calvin.chain(n) for n in range(1000)]


def test_chains_and_initial_states_are_the_benchmarks_own(chains):
    digest = hashlib.sha256()
    for state, tasks in chains:
        poses = [np.round(x, 9).tolist() for x in calvin.start_pose(state)]
        digest.update((json.dumps([list(state), list(tasks), *poses]) + "\n").encode())
    assert digest.hexdigest() == BENCHMARK


def test_192_states_start_1000_chains_40_of_them_six_and_the_rest_five(chains):
    states = calvin.start_states()
    assert len(set(states)) == 192
    counts = Counter(state for state, _ in chains)
    assert [counts[state] for state in states] == [6] * 40 + [5] * 152


def test_every_task_of_a_chain_is_possible_after_those_before_it(chains):
    """Against a little world of its own: blocks, what the hand holds, doors and lights."""
    kinds = Counter()
    for state, tasks in chains:
        where = {c: getattr(state, f"{c}_block") for c in ("red", "blue", "pink")}
        on = {"led": state.led == 1, "lightbulb": state.lightbulb == 1}
        slider, drawer, hand, tower = state.slider, state.drawer == "open", None, None
        for task in tasks:
            first, *_, last = words = task.split("_")
            colour = next((c for c in where if c in words), None)
            alone = [c for c in where if where[c] == "table"]
            kinds[first] += 1
            assert not hand or first in ("place", "stack")
            if first == "lift":
                assert where[colour].startswith(last)
                assert last != "slider" or where[colour] != f"slider_{slider}"  # not behind it
                assert last != "drawer" or drawer
                where[colour], hand = "hand", colour
            elif first == "place":
                assert hand and (drawer or last == "slider")
                where[hand], hand = "drawer" if last == "drawer" else f"slider_{slider}", None
            elif task == "stack_block":
                assert hand and len(alone) == 1
                tower, hand = (hand, alone[0]), None
                where |= dict.fromkeys(tower, "tower")
            elif task == "unstack_block":
                assert tower
                where |= dict.fromkeys(tower, "table")
            elif task == "push_into_drawer":
                assert drawer and len(alone) == 1
                where[alone[0]] = "drawer"
            elif colour:
                assert where[colour] == "table"
            elif first == "move":
                assert slider != last
                slider = last
            elif first in ("open", "close"):
                assert drawer == (first == "close")
                drawer = not drawer
            else:
                assert on[last] == (words[1] == "off")
                on[last] = not on[last]
    assert sum(kinds.values()) == 5000 and len(kinds) == 10


def test_five_tasks_are_of_five_categories_out_of_eleven(chains):
    assert {len({calvin.category(task) for task in tasks}) for _, tasks in chains} == {5}
    assert len({calvin.category(task) for task in calvin.TASKS}) == 11


def test_scene_obs_sets_the_scene_in_which_the_first_task_can_be_done(chains):
    env = sim.PlayTable(render=False)
    for state, tasks in chains[:100]:
        robot_obs, scene_obs = calvin.start_pose(state)
        obs = env.reset(robot_obs, scene_obs)
        np.testing.assert_allclose(obs["scene_obs"], scene_obs, atol=2e-5)
        assert tasks[0] in teleop.Operator(env).feasible()
    env.close()


# ------------------------------------------------------------------ CALVIN's own simulator
def test_its_absence_says_what_to_install_and_how_to_say_where_it_is(tmp_path):
    command = ["--policy", "operator", "--env", "calvin", "--calvin-env", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"not a clone of calvin_env(.|\n)*install --no-deps -e"):
        E.main([*command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="pip install --no-deps -e calvin_env"):
        teleop.main(["rates", *command[2:]])


@pytest.fixture(scope="module")
def there():
    """function(f, *args): f in a process of its own, for calvin_env wants to be alone in one."""
    try:
        calvin.home(CLONE)
        calvin.needed("calvin_env.envs.play_table_env")
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda f, *args: pool.submit(f, *args).result()


def table(scene=calvin.SCENE, render=False):
    for other in _kept:
        other.close()
    _kept[:] = [calvin.Table(scene, render=render, path=CLONE)]
    return _kept[0], calvin.make_oracle(CLONE)


def _rollouts():
    """The same 40 actions from chain 0's start: twice, with other play in between."""
    env, _ = table()
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 7))
    actions[:, 2], actions[:, 6] = -0.4, 1  # down, among the blocks
    out = []
    for number in (0, 7, 0):
        obs = env.reset(*calvin.start_pose(calvin.chain(number)[0]))
        out.append([obs, *(env.step(a)[0] for a in actions)])
    return [[np.concatenate([o["robot_obs"], o["scene_obs"]]) for o in roll] for roll in out]


def test_a_reset_restores_the_state_and_repeats_bit_for_bit(there):
    first, other, again = map(np.array, there(_rollouts))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    # After a reset calvin_env makes one physics step.
    start = np.concatenate(calvin.start_pose(calvin.chain(0)[0]))
    np.testing.assert_allclose(first[0], start, atol=5e-3)


def _solve(task):
    """The operator does one task: (its verdict, calvin_env's, the twin's, another task's)."""
    env, oracle = table()
    env.reset(*calvin.start_pose(calvin.start_states()[0]))
    start = env.get_info()
    done, _ = teleop.Operator(env, oracle=oracle).attempt(task)
    end = env.get_info()
    ours, other = calvin.oracle(start, end, task), oracle(start, end, "close_drawer")
    return done, oracle(start, end, task), ours, other


@pytest.mark.parametrize("task", ["open_drawer", "turn_on_led"])
def test_the_operator_solves_a_task_and_both_oracles_agree(there, task):
    assert there(_solve, task) == (True, True, True, False)


def _tasks_and_images():
    env, oracle = table(render=True)
    info = env.get_info()
    answers = [oracle(info, info, task) for task in calvin.TASKS]
    obs, *_ = env.step([0, 0, 0, 0, 0, 0, 1], render=False)
    try:
        calvin.Table(path=CLONE)
    except RuntimeError as error:
        return answers, str(error), list(obs), env.get_obs()["rgb_obs"]


def test_it_knows_the_34_tasks_renders_at_its_own_sizes_and_refuses_a_second_simulation(there):
    answers, message, unseen, images = there(_tasks_and_images)
    assert answers == [False] * 34 and "use another" in message
    assert unseen == ["robot_obs", "scene_obs"]
    assert {k: (x.shape, x.dtype) for k, x in images.items()} == {
        "rgb_static": ((200, 200, 3), np.uint8), "rgb_gripper": ((84, 84, 3), np.uint8),
    }  # fmt: skip
    assert all(x.std() > 10 for x in images.values())


def _configurations(folder):
    """Of a dataset with a tactile camera: the cameras of its Tables; an error."""
    config = calvin.configuration(calvin.home(CLONE), calvin.SCENE)
    config.cameras.tactile = {"_target_": "tacto.Sensor", "name": "tactile"}
    (folder / "validation/.hydra").mkdir(parents=True)
    text = calvin.needed("omegaconf").OmegaConf.to_yaml(config)
    (folder / "validation/.hydra/merged_config.yaml").write_text(text)
    scenes = (folder, folder / "validation", folder / "training")
    (folder / "training").mkdir()
    cameras = {tuple(sorted(table(x, render=True)[0].get_obs()["rgb_obs"])) for x in scenes}
    try:
        calvin.configuration(calvin.home(CLONE), "moon")
    except ValueError as error:
        return cameras, str(error)


def test_a_datasets_configuration_is_read_without_the_tactile_camera(there, tmp_path):
    cameras, message = there(_configurations, tmp_path)
    assert cameras == {("rgb_gripper", "rgb_static")} and "calvin_scene_D" in message


def _found(folder):
    """calvin_env's root, where only a clone in the project's folder tells it."""
    calvin.__file__ = str(folder / "calvin.py")
    return calvin.home()


def test_a_clone_in_the_projects_folder_is_found_although_it_hides_the_package(there, tmp_path):
    root = there(calvin.home, CLONE)
    (tmp_path / "calvin_env").symlink_to(root)
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        assert alone.submit(_found, tmp_path).result() == Path(root).resolve()


def test_a_recording_from_it_is_calvins_format_and_says_where_it_is_from(there, tmp_path):
    more = ["--calvin-env", CLONE] if CLONE else []
    command = ["record", str(tmp_path), "--frames", "64", "--val-frames", "64", "--procs", "1"]
    teleop.main([*command, "--env", "calvin", *more])
    about = json.loads((tmp_path / "training" / "recording.json").read_text())
    assert (about["source"], about["renderer"], about["scene"]) == ("calvin", "tiny", calvin.SCENE)
    files = sorted((tmp_path / "training").glob("episode_*.npz"))
    with np.load(files[-1]) as frame:
        assert len(files) == 64 and frame["rgb_static"].shape == (200, 200, 3)
        assert frame["scene_obs"].shape == (24,) and np.abs(frame["rel_actions"]).max() <= 1
