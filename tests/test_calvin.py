"""CALVIN's own simulator behind sim.PlayTable's interface. Where calvin_env is not installed, set
CALVIN_ENV to its clone; without either, all but the first test are skipped, with the reason.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import calvin
import evaluate as E
import sim
import teleop

CLONE = os.environ.get("CALVIN_ENV")
_kept = []  # of the process with the simulation: its only Table


def test_its_absence_says_what_to_install_and_how_to_say_where_it_is(tmp_path, capsys):
    with pytest.raises(ImportError, match=r"not a clone of calvin_env(.|\n)*git clone(.|\n)*-e"):
        calvin.home(tmp_path)
    command = ["--policy", "operator", "--env", "calvin", "--calvin-env", str(tmp_path)]
    with pytest.raises(SystemExit, match="pip install --no-deps -e calvin_env"):
        E.main(command)
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


def table(render=False):
    for other in _kept:
        other.close()
    _kept[:] = [calvin.Table(render=render, path=CLONE)]
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
    other = oracle(start, env.get_info(), "close_drawer")
    return done, oracle(start, env.get_info(), task), sim.oracle(start, env.get_info(), task), other


@pytest.mark.parametrize("task", ["open_drawer", "turn_on_led"])
def test_the_operator_solves_a_task_and_both_oracles_agree(there, task):
    assert there(_solve, task) == (True, True, True, False)


def _tasks():
    env, oracle = table()
    info = env.get_info()
    answers = [oracle(info, info, task) for task in sim.TASKS]
    try:
        calvin.Table(path=CLONE)
    except RuntimeError as error:
        return answers, str(error)


def test_it_knows_the_34_tasks_and_refuses_a_second_simulation_in_a_process(there):
    answers, message = there(_tasks)
    assert answers == [False] * 34 and "use another" in message


def _images():
    env, _ = table(render=True)
    obs, *_ = env.step([0, 0, 0, 0, 0, 0, 1], render=False)
    return list(obs), env.get_obs()["rgb_obs"]


def test_both_cameras_render_at_calvins_sizes_where_asked(there):
    unseen, images = there(_images)
    assert unseen == ["robot_obs", "scene_obs"]
    assert {k: (x.shape, x.dtype) for k, x in images.items()} == {
        "rgb_static": ((200, 200, 3), np.uint8), "rgb_gripper": ((84, 84, 3), np.uint8),
    }  # fmt: skip
    assert all(x.std() > 10 for x in images.values())


def _configurations(folder):
    """Of a dataset with a tactile camera: its cameras, and whether it makes a Table; an error."""
    root = calvin.home(CLONE)
    config = calvin.configuration(root, calvin.SCENE)
    config.cameras.tactile = {"_target_": "tacto.Sensor", "name": "tactile"}
    (folder / "validation/.hydra").mkdir(parents=True)
    (folder / "validation/.hydra/merged_config.yaml").write_text(
        calvin.needed("omegaconf").OmegaConf.to_yaml(config)
    )
    for other in _kept:
        other.close()
    _kept[:] = [calvin.Table(folder, path=CLONE)]
    try:
        calvin.configuration(root, "moon")
    except ValueError as error:
        return sorted(_kept[0].get_obs()["rgb_obs"]), str(error)


def test_a_datasets_configuration_is_read_without_the_tactile_camera(there, tmp_path):
    names, message = there(_configurations, tmp_path)
    assert names == ["rgb_gripper", "rgb_static"] and "calvin_scene_D" in message


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
