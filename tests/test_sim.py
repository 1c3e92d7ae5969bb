"""Claims about the embedded play table (Sec. V-A): CALVIN's control, states, cameras and lights.
That it repeats bit for bit, in any process and after any history: test_teleop.py's replay."""

import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import sim
import teleop

TABLE_0, TABLE_1 = (0.05, -0.12, 0.45999), (0.23, -0.12, 0.45999)
SHELF_LEFT, SHELF_RIGHT = (-0.2408, 0.0924, 0.46099), (0.0703, 0.0924, 0.46099)
IN_DRAWER = (0.16, -0.285, 0.36234)  # when it is open
OPEN, CLOSE, UP = [0, 0, 0, 0, 0, 0, 1.0], [0, 0, 0, 0, 0, 0, -1.0], [0, 0, 0.5, 0, 0, 0, -1.0]
LIFT = "lift_red_block_table"


@pytest.fixture(scope="module")
def env():
    table = sim.PlayTable()
    yield table
    table.close()


def scene(red=TABLE_0, blue=TABLE_1, pink=SHELF_RIGHT, door=0.0, drawer=0.0, bulb=0, led=0):
    blocks = [[*xyz, 0, 0, np.pi / 2] for xyz in (red, blue, pink)]
    return np.array([door, drawer, 0, 0.088 * bulb, bulb, led, *np.ravel(blocks)])


def repeat(env, action, steps):
    """The last observation and info."""
    for _ in range(steps):
        obs, _, _, info = env.step(action, render=False)
    return obs, info


def turn(a, b):
    """Angle between two euler orientations."""
    a, b = Rotation.from_euler("xyz", [a, b])
    return (a.inv() * b).magnitude()


# ------------------------------------------------------------------ arm and gripper
@pytest.mark.parametrize("axis", range(6))
def test_one_unit_moves_the_target_by_its_scale_and_the_tcp_follows(env, axis):
    start = env.reset(sim.ROBOT_OBS0)["robot_obs"]  # whose joints give the benchmark's tcp pose
    assert np.abs(start - sim.ROBOT_OBS0)[[0, 1, 2, 6, 14]].max() < 1e-3
    assert turn(start[3:6], sim.ROBOT_OBS0[3:6]) < 0.01
    before = np.concatenate([env.target_pos, env.target_euler])
    env.step(np.eye(7)[axis] + OPEN, render=False)
    after = np.concatenate([env.target_pos, env.target_euler])
    expected = np.eye(6)[axis] * (0.02 if axis < 3 else 0.05)
    assert np.allclose((after - before + np.pi) % (2 * np.pi) - np.pi, expected, atol=1e-12)
    end = repeat(env, OPEN, 8)[0]["robot_obs"]
    assert np.abs(end[:3] - start[:3] - expected[:3]).max() < 1.5e-3
    assert turn(end[3:6], env.target_euler) < 0.01


def test_kinematics_agree_with_pybullets_and_invert_each_other(env):
    env.reset()
    rng, q0 = np.random.default_rng(1), sim.ROBOT_OBS0[7:14]
    for _ in range(5):
        q = q0 + rng.uniform(-0.3, 0.3, 7)
        for joint, angle in zip(env.arm, q, strict=True):
            env.p.resetJointState(env.panda, joint, angle)
        pos, orn = env.p.getLinkState(env.panda, env.tcp, 0, 1)[4:6]
        xyz, rot, _ = sim.forward_kinematics(q)
        assert np.allclose(xyz, pos, atol=1e-5)
        assert np.allclose(rot.ravel(), env.p.getMatrixFromQuaternion(orn), atol=1e-5)
        found = sim.inverse_kinematics(q0, xyz, rot, q0, steps=50)
        assert np.allclose(sim.forward_kinematics(found)[0], xyz, atol=5e-4)


def test_the_tcp_lags_less_than_an_action_angles_are_wrapped_and_the_gripper_opens_8_cm(env):
    env.reset()
    for _ in range(15):
        obs = env.step([0.5, 0.25, 0.25, 0, 0, 0.5, 1], render=False)[0]
        assert np.linalg.norm(obs["robot_obs"][:3] - env.target_pos) < 0.012
    repeat(env, [0, 0, 0, 0, 0, 1, 1], 60)
    assert np.all(np.abs(env.target_euler) <= np.pi) and env.target_euler[2] < -1
    for action, width in ((CLOSE, 0), (OPEN, 0.08)):
        obs = repeat(env, action, 15)[0]["robot_obs"]
        assert abs(obs[6] - width) < 1e-3 and obs[14] == action[6]


# ------------------------------------------------------------------ states
def test_a_bad_state_or_action_is_an_error_that_names_it_and_moves_nothing(env):
    for states, message in (
        ((np.zeros(14), None), "robot_obs must be 15"), ((np.zeros(15),), r"robot_obs\[14\]"),
        ((None, np.full(24, np.nan)), "scene_obs must be 24"),
        ((None, np.full(24, 0.5)), r"scene_obs\[4\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            env.reset(*states)
    target = env.target_pos.copy()
    for action in ([*[0] * 6, 0.5], [0] * 7, [0] * 6, np.full(7, np.nan), [np.inf, *[0] * 5, 1]):
        with pytest.raises(ValueError, match="action"):
            env.step(action)
    assert np.array_equal(env.target_pos, target)


def test_reset_restores_any_state(env):
    rng = np.random.default_rng(0)
    for k in range(5):
        robot, red = sim.ROBOT_OBS0.copy(), (*rng.uniform((0.1, -0.1), (0.3, -0.05)), 0.45999)
        robot[7:14] += rng.uniform(-0.1, 0.1, 7)
        robot[6], robot[14] = rng.uniform(0, 0.08), -1
        state = scene(red=red, blue=(0, 0.3, 1.2), bulb=k % 2, led=k // 2 % 2)
        state[:4], state[11] = rng.uniform(0, 1, 4) * (0.28, 0.22, 0.02, 0.088), rng.uniform(-3, 3)
        obs = env.reset(robot, state)
        assert np.abs(obs["robot_obs"] - robot)[7:].max() < 1e-3
        assert np.abs(obs["scene_obs"] - state)[3:].max() < 1e-3
        again = env.reset(obs["robot_obs"], obs["scene_obs"])
        for other in (state, again["scene_obs"]):
            assert np.abs(obs["scene_obs"] - other).max() < 2e-3


def test_lifting_a_block_is_that_task_alone_and_is_restored_in_the_middle(env):
    env.reset()
    start = env.get_info()
    assert teleop.attempt(env, sim.oracle, LIFT)[0]
    obs, info = repeat(env, CLOSE, 3)
    assert [task for task in sim.TASKS if sim.oracle(start, info, task)] == [LIFT]
    again = env.reset(obs["robot_obs"], obs["scene_obs"])
    assert np.abs(again["robot_obs"] - obs["robot_obs"])[:6].max() < 2e-3
    assert np.abs(again["scene_obs"] - obs["scene_obs"]).max() < 2e-3
    held, info = repeat(env, UP, 8)
    assert held["scene_obs"][8] - obs["scene_obs"][8] > 0.035  # the block is still in the hand
    touched = {c[2] for c in info["scene_info"]["movable_objects"]["block_red"]["contacts"]}
    assert touched == {info["robot_info"]["uid"]}


@pytest.mark.parametrize("place", [TABLE_0, TABLE_1, SHELF_LEFT, SHELF_RIGHT, IN_DRAWER])
def test_a_block_rests_in_every_place_and_touches_it_from_the_first_info_on(env, place):
    link = {0.45999: "base_link", 0.46099: "plank_link", 0.36234: "drawer_link"}[place[2]]
    env.reset(None, scene((0.4, -0.1, 0.45999), (-0.3, -0.1, 0.45999), place, drawer=0.22))
    for _ in range(30):
        contacts = env.get_info()["scene_info"]["movable_objects"]["block_pink"]["contacts"]
        assert {(c[2], c[4]) for c in contacts} == {(env.table, env.links[link])}
        obs, _ = repeat(env, OPEN, 1)
    assert np.abs(obs["scene_obs"][18:21] - place).max() < 1e-3
    assert np.abs(obs["scene_obs"][21:23]).max() < 1e-2


def test_doors_stay_put_the_button_springs_back_and_a_block_goes_with_the_drawer(env):
    start = scene(blue=IN_DRAWER, door=0.13, drawer=0.22)
    start[2:4] = 0.02, 0.05
    env.reset(None, start)
    change = repeat(env, OPEN, 30)[0]["scene_obs"][:4] - start[:4]
    assert np.abs(change - (0, 0, -0.02, 0)).max() < 1e-3
    motor = {"targetVelocity": -0.3, "force": 100}
    how = env.table, env.joints["base__drawer"], env.p.VELOCITY_CONTROL
    env.p.setJointMotorControl2(*how, **motor)
    obs = repeat(env, OPEN, 40)[0]["scene_obs"]
    assert obs[1] < 0.01
    assert abs(obs[13] - IN_DRAWER[1] - 0.22) < 0.07 and abs(obs[14] - IN_DRAWER[2]) < 5e-3


def test_each_press_toggles_the_led_once_and_the_bulb_is_on_while_its_switch_is(env):
    env.reset()
    for task, led in (("turn_on_led", 1), ("turn_off_led", 0)):
        assert teleop.attempt(env, sim.oracle, task)[0]
        obs, _ = repeat(env, CLOSE, 8)  # held down for a while
        assert obs["scene_obs"][2] > 0.01 and obs["scene_obs"][5] == led
    for position, bulb in ((0.04, 0), (0.048, 1), (0.08, 1), (0.04, 0)):
        env.p.resetJointState(env.table, env.joints["base__switch"], position)
        assert repeat(env, OPEN, 1)[0]["scene_obs"][4] == bulb


# ------------------------------------------------------------------ pictures
def pixels(env, camera, body, link=-1):
    """Mask of the pixels that show a body's link."""
    return env.camera(camera)[1] == body + ((link + 1) << 24)


@pytest.mark.parametrize("door, places", [
    (0.28, (TABLE_0, TABLE_1, SHELF_RIGHT)), (0, (SHELF_LEFT, IN_DRAWER, TABLE_0)),
    (0.28, (TABLE_1, TABLE_0, IN_DRAWER)),
])  # fmt: skip
def test_blocks_and_lights_cover_at_least_16_static_pixels(env, door, places):
    away = np.array(sim.ROBOT_OBS0)  # the arm turned away from the table
    away[7] = -2.6
    env.reset(away, scene(*places, door=door, drawer=0.22))
    parts = [(body,) for body in env.blocks.values()]
    for part in [*parts, *((env.table, env.links[x]) for x in ("light_link", "led_link"))]:
        assert pixels(env, "static", *part).sum() >= 16


def test_blocks_look_unlike_all_around_them_lights_on_unlike_off_open_doors_unlike_shut(env):
    def colour(body, link=-1):
        return image[pixels(env, "static", body, link)].mean(0)

    lit = {}
    for on in (0, 1):
        # Blocks in the air in front of the table, where nothing hides them.
        state = scene((0.1, -0.3, 0.7), (0.2, -0.3, 0.7), (0.3, -0.3, 0.7), bulb=on, led=on)
        image = env.reset(None, state)["rgb_obs"]["rgb_static"].astype(float)
        lit[on] = [colour(env.table, env.links[x]) for x in ("light_link", "led_link")]
    blocks = [colour(body) for body in env.blocks.values()]
    things = [colour(env.table, link) for link in env.links.values()]
    things += [colour(env.panda, env.arm[4]), colour(env.panda, env.hand)]
    for i, block in enumerate(blocks):
        assert min(np.linalg.norm(block - other) for other in blocks[:i] + things) > 75
    assert min(np.linalg.norm(np.subtract(lit[1], lit[0]), axis=1)) > 120
    states = scene(), scene(door=0.28), scene(drawer=0.22)
    shut, *others = (env.reset(None, s)["rgb_obs"]["rgb_static"].astype(int) for s in states)
    for opened in others:
        assert (np.abs(opened - shut).max(-1) > 12).sum() > 150


def test_the_gripper_camera_sees_fingers_and_the_block_between_them(env):
    env.reset()
    assert teleop.attempt(env, sim.oracle, LIFT)[0]
    for finger in env.fingers:
        assert pixels(env, "gripper", env.panda, finger).sum() > 60
    block = pixels(env, "gripper", env.blocks["block_red"])
    assert block.sum() > 60 and 20 < np.argwhere(block)[:, 1].mean() < 44


def test_images_are_uint8_squares_of_any_size_and_can_be_left_out():
    table = sim.PlayTable(static_size=200, gripper_size=84)
    for image, size in zip(table.get_obs()["rgb_obs"].values(), (200, 84), strict=True):
        assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.std() > 15
        assert not (image == 255).all(-1).any()  # no blown-out white
    assert "rgb_obs" not in table.step(OPEN, render=False)[0]
    table.close()


def test_a_missing_pybullet_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet_data", None)
    with pytest.raises(ImportError, match="pip install pybullet"):
        sim.PlayTable()
