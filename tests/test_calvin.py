"""CALVIN (Sec. V-A): its tasks, its 1000 chains, and its own simulator behind our interface.

Where calvin_env is not found, CALVIN_ENV names its clone; else the tests of it are skipped. CALVIN
names a clone of mees/calvin, whose own evaluation one test runs."""

import ast
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import calvin
import evaluate as E
import sim
import teleop

# sha256 of what CALVIN's own code draws (numpy 2.4, with pyhash): see the test below.
BENCHMARK = "d710427c76f1b1c2accd3fabbc3fed33e233dd56473f19ca2ccdf1f59cddd97d"
CLONE, CALVIN = os.environ.get("CALVIN_ENV"), os.environ.get("CALVIN")


# ------------------------------------------------------------------ the 34 tasks
ROBOT, TABLE, RED, BLUE, PINK = 0, 1, 2, 3, 4  # bodies of hand-made infos
LINKS = {"base_link": -1, "drawer_link": 3, "plank_link": 6}


def made(robot=(), red=(), blue=(), x=0, z=0.46, yaw=0, roll=0, speed=0, door=0, light=0):
    """A hand-made info. robot, red, blue: what each touches, as (body, link)."""
    (cy, cr), (sy, sr) = np.cos(np.radians([yaw, roll]) / 2), np.sin(np.radians([yaw, roll]) / 2)
    pose = {"current_pos": (x, 0, z), "current_orn": (sr * cy, sr * sy, cr * sy, cr * cy)}
    pose |= {"current_lin_vel": (speed, 0, 0), "current_ang_vel": (0, 0, 0)}

    def thing(uid, touched):
        return {"uid": uid, "contacts": [(0, 9, body, -1, link) for body, link in touched]}

    blocks = {"block_red": (RED, red), "block_blue": (BLUE, blue), "block_pink": (PINK, ())}
    scene = {"movable_objects": {name: thing(*x) | pose for name, x in blocks.items()}}
    scene["fixed_objects"] = {"table": {"uid": TABLE, "links": LINKS}}
    scene["doors"] = {name: {"current_state": door} for name in ("base__slide", "base__drawer")}
    scene["lights"] = {name: {"logical_state": light} for name in ("lightbulb", "led")}
    return {"robot_info": thing(ROBOT, robot), "scene_info": scene}


TOP, SHELF, TRAY, HAND = (TABLE, -1), (TABLE, 6), (TABLE, 3), (ROBOT, 9)
ON_TOP = made(red=[TOP])
HELD = made(robot=[(RED, -1)], red=[HAND])
STACK = {"red": [(BLUE, -1)], "blue": [(RED, -1), TOP]}
TURNED = "rotate_red_block_left"
CASES = [  # task, start, ends at which it is done, ends at which it is not
    (TURNED, ON_TOP, [made(red=[TOP], yaw=61), made(red=[HAND, TOP], yaw=90)], [
        made(red=[TOP], yaw=59), made(red=[TOP], yaw=90, roll=40), made(red=[TOP], yaw=90, x=0.11),
        made(red=[HAND], yaw=90)]),  # still in the hand alone
    (TURNED, made(yaw=150), [made(red=[TOP], yaw=-130)], []),  # 80° to the left
    ("rotate_red_block_right", ON_TOP, [made(red=[TOP], yaw=-61)], [made(red=[TOP], yaw=61)]),
    ("rotate_red_block_right", made(yaw=150), [], [made(red=[TOP], yaw=-130)]),
    ("push_red_block_right", ON_TOP, [made(red=[TOP], x=0.11)], [
        made(red=[TOP], x=0.09), made(red=[HAND], x=0.11, z=0.5)]),
    ("push_red_block_right", made(red=[HAND]), [], [made(red=[TOP], x=0.11)]),
    ("push_red_block_left", ON_TOP, [made(red=[TOP, HAND], x=-0.11)], [made(red=[TOP], x=0.11)]),
    ("move_slider_left", made(door=0.0), [made(door=0.16)], [made(door=0.14)]),
    ("move_slider_right", made(door=0.28), [made(door=0.12)], [made(door=0.14)]),
    ("open_drawer", made(door=0.1), [made(door=0.23)], [made(door=0.2)]),
    ("close_drawer", made(door=0.2), [made(door=0.05)], [made(door=0.3)]),
    ("lift_red_block_table", ON_TOP, [made(red=[HAND], z=0.52)], [
        made(red=[HAND], z=0.5), made(red=[HAND, TOP], z=0.52)]),
    ("lift_red_block_slider", made(red=[SHELF]), [made(red=[HAND], z=0.495)], []),
    ("lift_red_block_slider", ON_TOP, [], [made(red=[HAND], z=0.52)]),
    ("lift_red_block_drawer", made(red=[TRAY], z=0.36), [made(red=[HAND])], []),
    ("lift_blue_block_table", ON_TOP, [], [made(red=[HAND], z=0.52)]),
    ("place_in_slider", HELD, [made(red=[SHELF])], [made(robot=[(RED, -1)], red=[SHELF, HAND])]),
    ("place_in_drawer", HELD, [made(red=[TRAY])], []),
    ("place_in_drawer", made(robot=[(RED, -1), TOP], red=[HAND]), [], [made(red=[TRAY])]),
    ("place_in_drawer", made(robot=[(RED, -1)], red=[HAND, TOP]), [], [made(red=[TRAY])]),
    ("place_in_drawer", made(robot=[(TABLE, 3)]), [], [made(red=[TRAY])]),
    ("stack_block", HELD, [made(**STACK)], [
        made(**STACK | {"red": [(BLUE, -1), HAND]}), made(**STACK, speed=1.1)]),
    ("unstack_block", made(**STACK), [HELD], []),
    ("unstack_block", made(**STACK | {"red": [(BLUE, -1), TOP]}), [], [HELD]),
    *[(f"turn_on_{x}", made(), [made(light=1)], [made()]) for x in ("lightbulb", "led")],
    *[(f"turn_off_{x}", made(light=1), [made()], [made(light=1)]) for x in ("lightbulb", "led")],
    ("push_into_drawer", ON_TOP, [made(red=[TRAY])], [made(red=[TRAY, HAND])]),
    ("push_into_drawer", made(red=[TOP, HAND]), [], [made(red=[TRAY])]),
]  # fmt: skip


@pytest.mark.parametrize(("task", "start", "done", "not_done"), CASES)
def test_each_rule_of_the_34_tasks(task, start, done, not_done):
    assert all(calvin.oracle(start, end, task) is True for end in done)
    assert not any(calvin.oracle(start, end, task) for end in not_done)


def test_a_light_or_a_door_says_nothing_about_the_other():
    start, end = made(), made()
    end["scene_info"]["lights"]["lightbulb"] = {"logical_state": 1}
    end["scene_info"]["doors"]["base__slide"] = {"current_state": 0.2}
    done = [task for task in calvin.TASKS if calvin.oracle(start, end, task)]
    assert done == ["move_slider_left", "turn_on_lightbulb"]


def test_an_unknown_task_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="open_drawer"):
        calvin.oracle(ON_TOP, ON_TOP, "open_the_drawer")


# ------------------------------------------------------------------ the benchmark's 1000 chains
def test_tasks_chains_and_initial_states_are_the_benchmarks_own_and_can_be_begun():
    """The digest pins the order of the tasks, the 192 states, and how the chains are drawn."""
    digest, env = hashlib.sha256(), sim.PlayTable(render=False)
    for number in range(1000):
        state, tasks = calvin.chain(number)
        robot_obs, scene_obs = calvin.start_pose(state)
        poses = [np.round(x, 9).tolist() for x in (robot_obs, scene_obs)]
        digest.update((json.dumps([list(state), list(tasks), *poses]) + "\n").encode())
        if number < 100:
            obs = env.reset(robot_obs, scene_obs)
            np.testing.assert_allclose(obs["scene_obs"], scene_obs, atol=2e-5)
            assert tasks[0] in teleop.feasible(teleop.see(env, env.get_obs()), teleop.BLOCKS)
    env.close()
    assert digest.hexdigest() == BENCHMARK and len(calvin.TASKS) == 34


def test_chains_among_fewer_tasks_begin_where_the_benchmarks_do_and_are_possible():
    few = tuple(t for t in calvin.TASKS if t.startswith(("open", "close", "move", "turn")))
    for number in range(50):
        state, tasks = calvin.chain(number, few)
        assert state == calvin.chain(number)[0]
        assert len(tasks) == 5 and set(tasks) <= set(few) and calvin.possible(state, tasks)
    wrongs = {("dance",): "unknown task", few[:4]: "needs five", few[:1] * 5: "comes twice"}
    wrongs[few[:2] + calvin.TASKS[:3]] = "hardly any five"
    for wrong, why in wrongs.items():
        with pytest.raises(ValueError, match=why):
            calvin.chain(0, wrong)


def of_file(path, *names, **given):
    """What a file defines by these names. The rest is not run, for its imports ask for a lot;
    `given` is what the names need of it."""
    tree = ast.parse(path.read_text())
    first_words = [getattr(x, "name", ast.unparse(x).split()[0]) for x in tree.body]
    tree.body = [x for x, word in zip(tree.body, first_words, strict=True) if word in names]
    exec(compile(tree, path, "exec"), given)
    return given


class AsTheirModel:
    """The operator as a model for CALVIN. steps: how many it made of each instruction."""

    def __init__(self, env, task_of):
        self.env, self.task_of, self.steps = env, task_of, []

    def reset(self):
        self.free = teleop.free_blocks(self.env.get_info())
        self.steps.append(0)

    def step(self, obs, sentence):
        if self.steps[-1] % 2 == 0:  # it holds each action for two steps
            seen = teleop.see(self.env, obs)
            self.action = teleop.act(self.task_of[sentence], seen, self.free)
        self.steps[-1] += 1
        return self.action


def test_calvins_own_loop_and_oracle_count_the_same_steps_as_ours_in_20_chains(chains=20):
    if not CALVIN:
        clone = "git clone --recurse-submodules https://github.com/mees/calvin ../calvin"
        pytest.skip(f"{clone}; then CALVIN=../calvin")
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    models, simulator = Path(CALVIN) / "calvin_models", Path(CLONE or f"{CALVIN}/calvin_env")
    rules = models / "conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"
    words = models / "conf/annotations/new_playtable_validation.yaml"
    sentences = yaml.safe_load(words.read_text())  # {task: [the sentence]}
    task_of = {told[0]: task for task, told in sentences.items()}
    theirs = of_file(
        simulator / "calvin_env/envs/tasks.py", "Tasks",
        Dict=dict, Set=set, ListConfig=list, partial=partial, np=np, R=Rotation,
    )  # fmt: skip
    oracle = theirs["Tasks"](yaml.safe_load(rules.read_text())["tasks"])
    theirs = of_file(
        models / "calvin_agent/evaluation/evaluate_policy.py",
        "EP_LEN", "rollout", "evaluate_sequence",
        get_env_state_for_initial_condition=calvin.start_pose, collect_plan=lambda *_: None,
    )  # fmt: skip
    worker = E.Worker(E.parse(["--policy", "operator"]))
    for number in range(chains):
        model, chain = AsTheirModel(worker.env, task_of), calvin.chain(number)
        solved = theirs["evaluate_sequence"](
            worker.env, model, oracle, *chain, sentences, plans={}, debug=False
        )
        ours = worker.run_chain(number, None)
        assert (solved, model.steps) == (ours["solved"], ours["steps"]), chain
    worker.env.close()


# ------------------------------------------------------------------ CALVIN's own simulator
def test_its_absence_says_what_to_install_and_how_to_say_where_it_is(tmp_path):
    command = ["--policy", "operator", "--env", "calvin", "--calvin-env", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"not a clone of calvin_env(.|\n)*install --no-deps -e"):
        E.main([*command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="pip install --no-deps -e calvin_env"):
        teleop.main(["rates", *command[2:]])


def test_a_configuration_that_would_run_other_code_is_refused(tmp_path):
    (tmp_path / "calvin_env/envs").mkdir(parents=True)
    (tmp_path / "calvin_env/envs/play_table_env.py").write_text("")
    fine = {"env": {"_target_": "calvin_env.envs.play_table_env.PlayTableSimEnv", "seed": 0}}
    calvin.check_targets(fine, "task_D_D", tmp_path)
    for bad in ("os.system", "calvin_env.envs.play_table_env.os.system", "calvin_env.Popen", 3):
        with pytest.raises(ValueError, match=rf"task_D_D: it asks for {bad}"):
            calvin.check_targets(fine | {"more": [{"_target_": bad}]}, "task_D_D", tmp_path)


@pytest.fixture(scope="module")
def there():
    """function(f, *args): f in a process of its own, for calvin_env wants to be alone in one."""
    try:
        calvin.home(CLONE)
        calvin.needed("calvin_env.envs.play_table_env")
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield lambda f, *args: pool.submit(f, *args).result()


def table(scene=calvin.SCENE, render=False):
    return calvin.Table(scene, render=render, path=CLONE), calvin.make_oracle(CLONE)


def _repeats():
    """The same 40 actions from chain 0's start: twice, with other play in between."""
    env, _ = table()
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 7))
    actions[:, 2], actions[:, 6] = -0.4, 1  # down, among the blocks
    out = []
    for number in (0, 7, 0):
        obs = env.reset(*calvin.start_pose(calvin.chain(number)[0]))
        obs = [obs, *(env.step(a)[0] for a in actions)]
        out.append([np.concatenate([o["robot_obs"], o["scene_obs"]]) for o in obs])
    np.testing.assert_array_equal(out[0], out[2])
    assert np.abs(np.subtract(out[0], out[1])).max() > 0.01
    # After a reset calvin_env makes one physics step.
    start = np.concatenate(calvin.start_pose(calvin.chain(0)[0]))
    np.testing.assert_allclose(out[0][0], start, atol=5e-3)


def test_a_reset_restores_the_state_and_repeats_bit_for_bit(there):
    there(_repeats)


def _solve(task):
    """The operator does one task: (its verdict, calvin_env's, ours, calvin_env's of another)."""
    env, oracle = table()
    env.reset(*calvin.start_pose(calvin.start_states()[0]))
    start = env.get_info()
    done, _ = teleop.attempt(env, oracle, task)
    ends = start, env.get_info()
    return done, oracle(*ends, task), calvin.oracle(*ends, task), oracle(*ends, "close_drawer")


@pytest.mark.parametrize("task", ["open_drawer", "turn_on_led"])
def test_the_operator_solves_a_task_and_both_oracles_agree(there, task):
    assert there(_solve, task) == (True, True, True, False)


def _tasks_and_images():
    env, oracle = table(render=True)
    info = env.get_info()
    assert not any(oracle(info, info, task) for task in calvin.TASKS)
    assert "rgb_obs" not in env.step([0, 0, 0, 0, 0, 0, 1], render=False)[0]
    for name, size in (("rgb_static", 200), ("rgb_gripper", 84)):
        image = env.get_obs()["rgb_obs"][name]
        assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.std() > 10
    with pytest.raises(RuntimeError, match="use another"):
        calvin.Table(path=CLONE)


def test_it_knows_the_34_tasks_renders_at_its_own_sizes_and_refuses_a_second_simulation(there):
    there(_tasks_and_images)


def _configurations(folder):
    """A dataset with a tactile camera."""
    config = calvin.configuration(calvin.home(CLONE), calvin.SCENE)
    config.cameras.tactile = {"_target_": "tacto.Sensor", "name": "tactile"}
    (folder / "validation/.hydra").mkdir(parents=True)
    text = calvin.needed("omegaconf").OmegaConf.to_yaml(config)
    (folder / "validation/.hydra/merged_config.yaml").write_text(text)
    (folder / "training").mkdir()
    for scene in (folder, folder / "validation", folder / "training"):
        env, _ = table(scene, render=True)
        assert env.get_obs()["rgb_obs"].keys() == {"rgb_static", "rgb_gripper"}
        env.close()
    with pytest.raises(ValueError, match="calvin_scene_D"):
        calvin.configuration(calvin.home(CLONE), "moon")


def test_a_datasets_configuration_is_read_without_the_tactile_camera(there, tmp_path):
    there(_configurations, tmp_path)


def _found(folder):
    """calvin_env's root, where only a clone in the project's folder tells it."""
    calvin.__file__ = str(folder / "calvin.py")
    return calvin.home()


def test_a_clone_in_the_projects_folder_is_found_although_it_hides_the_package(there, tmp_path):
    root = there(calvin.home, CLONE)
    (tmp_path / "calvin_env").symlink_to(root)
    assert there(_found, tmp_path) == Path(root).resolve()


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
