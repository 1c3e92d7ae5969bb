"""Claims about the embedded play table (Sec. V-A): CALVIN's control, states, cameras and lights."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pybullet as p
import pytest

import sim

REPO = Path(sim.__file__).parent
TABLE_0, TABLE_1 = (0.05, -0.12, 0.45999), (0.23, -0.12, 0.45999)
SHELF_LEFT, SHELF_RIGHT = (-0.2408, 0.0924, 0.46099), (0.0703, 0.0924, 0.46099)
IN_DRAWER = (0.16, -0.285, 0.36234)  # when it is open
OPEN, CLOSE = ([0, 0, 0, 0, 0, 0, grip] for grip in (1.0, -1.0))


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


def drive(env, xyz, grip, speed=0.01, wait=3):
    """Move the target straight to xyz by actions, then wait; returns the last observation, info."""
    way = np.array(xyz) - env.target_pos
    steps = int(np.ceil(np.abs(way).max() / speed))
    repeat(env, [*way / steps / 0.02, 0, 0, 0, grip[6]], steps)
    return repeat(env, grip, wait)


def grasp_red(env, lifted):
    """Grasp the red block of the default scene and lift it: the last observation, info."""
    env.reset()
    drive(env, (0.05, -0.12, 0.464), OPEN, speed=0.02)
    drive(env, (0.05, -0.12, 0.464001), CLOSE, wait=8)
    return drive(env, lifted, CLOSE)


def turn(a, b):
    """Angle between two euler orientations, by PyBullet."""
    diff = p.getDifferenceQuaternion(p.getQuaternionFromEuler(a), p.getQuaternionFromEuler(b))
    return p.getAxisAngleFromQuaternion(diff)[1]


def test_the_benchmarks_joints_give_the_benchmarks_tcp_pose(env):
    obs = env.reset(sim.ROBOT_OBS0)["robot_obs"]
    assert np.abs(obs[:3] - sim.ROBOT_OBS0[:3]).max() < 1e-3
    assert turn(obs[3:6], sim.ROBOT_OBS0[3:6]) < 0.01
    assert abs(obs[6] - 0.08) < 1e-3 and obs[14] == 1


@pytest.mark.parametrize("axis", range(6))
def test_one_unit_moves_the_target_by_its_scale_and_the_tcp_follows(env, axis):
    start = env.reset()["robot_obs"]
    before = np.concatenate([env.target_pos, env.target_euler])
    env.step(np.eye(7)[axis] + np.eye(7)[6], render=False)
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
        assert np.allclose(rot.ravel(), p.getMatrixFromQuaternion(orn), atol=1e-5)
        found = sim.inverse_kinematics(q0, xyz, rot, q0, steps=50)
        assert np.allclose(sim.forward_kinematics(found)[0], xyz, atol=5e-4)


def test_the_tcp_lags_less_than_one_action_behind_a_moving_target(env):
    env.reset()
    for _ in range(15):
        obs = env.step([0.5, 0.25, 0.25, 0, 0, 0.5, 1], render=False)[0]
        assert np.linalg.norm(obs["robot_obs"][:3] - env.target_pos) < 0.012


def test_the_target_euler_angles_are_wrapped(env):
    env.reset()
    repeat(env, [0, 0, 0, 0, 0, 1, 1], 70)
    assert np.all(np.abs(env.target_euler) <= np.pi) and env.target_euler[2] < -1


def test_the_gripper_closes_to_nothing_and_opens_to_8_cm(env):
    env.reset()
    for action, width in ((CLOSE, 0), (OPEN, 0.08)):
        obs = repeat(env, action, 15)[0]["robot_obs"]
        assert abs(obs[6] - width) < 1e-3 and obs[14] == action[6]


def test_reset_restores_any_state(env):
    rng = np.random.default_rng(0)
    for k in range(5):
        robot = sim.ROBOT_OBS0.copy()
        robot[7:14] += rng.uniform(-0.1, 0.1, 7)
        robot[6], robot[14] = rng.uniform(0, 0.08), -1
        red = rng.uniform(0.1, 0.3), rng.uniform(-0.1, -0.05), 0.45999
        state = scene(red=red, blue=(0, 0.3, 1.2))
        state[:4] = rng.uniform(0, 1, 4) * (0.28, 0.22, 0.02, 0.088)
        state[4:6], state[11] = (k % 2, k // 2 % 2), rng.uniform(-3, 3)
        obs = env.reset(robot, state)
        assert np.abs(obs["robot_obs"][7:14] - robot[7:14]).max() < 1e-3
        assert obs["robot_obs"][14] == -1
        assert np.abs(obs["scene_obs"] - state)[3:].max() < 1e-3
        assert np.abs(obs["scene_obs"] - state)[:3].max() < 2e-3
        again = env.reset(obs["robot_obs"], obs["scene_obs"])
        assert np.abs(again["scene_obs"] - obs["scene_obs"]).max() < 2e-3


def test_a_recorded_state_in_mid_play_is_restored(env):
    obs, _ = grasp_red(env, (0.07, -0.14, 0.56))
    again = env.reset(obs["robot_obs"], obs["scene_obs"])
    assert np.abs(again["robot_obs"] - obs["robot_obs"])[:6].max() < 2e-3
    assert np.abs(again["scene_obs"] - obs["scene_obs"]).max() < 2e-3
    held, info = drive(env, (0.07, -0.14, 0.60), CLOSE)
    assert held["scene_obs"][8] - obs["scene_obs"][8] > 0.035  # the block is still in the hand
    touched = {c[2] for c in info["scene_info"]["movable_objects"]["block_red"]["contacts"]}
    assert touched == {info["robot_info"]["uid"]}


@pytest.mark.parametrize("place", [TABLE_0, TABLE_1, SHELF_LEFT, SHELF_RIGHT, IN_DRAWER])
def test_a_block_rests_in_every_place_and_touches_it_from_the_first_info_on(env, place):
    link = {0.45999: "base_link", 0.46099: "plank_link", 0.36234: "drawer_link"}[place[2]]
    env.reset(None, scene((0.4, -0.1, 0.45999), (-0.3, -0.1, 0.45999), place, drawer=0.22))
    for _ in range(30):
        info = env.get_info()["scene_info"]
        part = (env.table, info["fixed_objects"]["table"]["links"][link])
        contacts = info["movable_objects"]["block_pink"]["contacts"]
        assert {(c[2], c[4]) for c in contacts} == {part}
        obs, _ = repeat(env, OPEN, 1)
    assert np.abs(obs["scene_obs"][18:21] - place).max() < 1e-3
    assert np.abs(obs["scene_obs"][21:23]).max() < 1e-2


def test_doors_and_switch_stay_put_and_the_button_springs_back(env):
    start = scene(door=0.13, drawer=0.1)
    start[2:4] = 0.02, 0.05
    env.reset(None, start)
    change = repeat(env, OPEN, 30)[0]["scene_obs"][:4] - start[:4]
    assert np.abs(change - (0, 0, -0.02, 0)).max() < 1e-3


def test_a_block_in_the_drawer_goes_with_it(env):
    env.reset(None, scene(blue=IN_DRAWER, drawer=0.22))
    motor = {"targetVelocity": -0.3, "force": 100}
    drawer = env.joints["base__drawer"]
    env.p.setJointMotorControl2(env.table, drawer, p.VELOCITY_CONTROL, **motor)
    obs = repeat(env, OPEN, 40)[0]["scene_obs"]
    assert obs[1] < 0.01
    assert abs(obs[13] - IN_DRAWER[1] - 0.22) < 0.07 and abs(obs[14] - IN_DRAWER[2]) < 5e-3


def test_lifting_a_block_by_actions_is_that_lift_and_nothing_else(env):
    env.reset()
    start = env.get_info()
    _, info = grasp_red(env, (0.05, -0.12, 0.56))
    assert [task for task in sim.TASKS if sim.oracle(start, info, task)] == ["lift_red_block_table"]


def _fingerprint(env, seed):
    """Hash of states and images along a rough trajectory that shoves blocks and drawer about."""
    rng, out = np.random.default_rng(seed), hashlib.sha256()
    obs = env.reset(None, scene(drawer=0.22 * (seed % 2), blue=(0.12, -0.1, 0.46)))
    for k in range(90):
        if k % 10 == 0:
            move = rng.uniform(-1, 1, 6) * (1, 1, 1, 0.3, 0.3, 0.3) + (0.2, 0.3, -0.4, 0, 0, 0)
        action = [*np.clip(move, -1, 1), 1 if k // 15 % 2 else -1]
        obs = env.step(action, render=k % 30 == 29)[0]
        images = obs.get("rgb_obs", {}).values()
        out.update(b"".join(x.tobytes() for x in (obs["robot_obs"], obs["scene_obs"], *images)))
    return out.hexdigest()


def test_trajectories_repeat_bit_for_bit_after_any_history_and_in_another_process(env):
    fresh = [_fingerprint(env, seed) for seed in (0, 1)]
    for _ in range(3):
        env.reset()
    assert [_fingerprint(env, seed) for seed in (1, 0)] == fresh[::-1]
    assert _fingerprint(env, 0) == fresh[0]  # straight after itself
    code = "import sim, test_sim as t; e = sim.PlayTable()\n"
    code += "print(*(t._fingerprint(e, seed) for seed in (1, 0)))"
    paths = {**os.environ, "PYTHONPATH": f"{REPO}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=paths)
    assert run.stdout.split() == fresh[::-1]


def test_each_press_of_the_button_toggles_the_led_once(env):
    env.reset()
    leds = []
    for _ in range(2):
        drive(env, (-0.12, -0.12, 0.53), CLOSE, speed=0.02)
        obs, _ = drive(env, (-0.12, -0.12, 0.475), CLOSE, wait=8)  # held down for a while
        leds.append(obs["scene_obs"][5])
    assert leds == [1, 0]


def test_the_light_bulb_is_on_while_the_switch_is_on_its_far_side(env):
    env.reset()
    for position, bulb in ((0.04, 0), (0.048, 1), (0.08, 1), (0.04, 0)):
        env.p.resetJointState(env.table, env.joints["base__switch"], position)
        assert repeat(env, OPEN, 1)[0]["scene_obs"][4] == bulb


def pixels(env, camera, body, link=-1):
    """Mask of the pixels that show a body's link."""
    return env.camera(camera)[1] == body + ((link + 1) << 24)


PLACES = (TABLE_0, TABLE_1, SHELF_RIGHT), (SHELF_LEFT, IN_DRAWER, TABLE_0)


@pytest.mark.parametrize("places", [*PLACES, (TABLE_1, TABLE_0, IN_DRAWER)])
def test_blocks_and_lights_cover_at_least_16_static_pixels(env, places):
    away = np.array(sim.ROBOT_OBS0)  # the arm turned away from the table
    away[7] = -2.6
    env.reset(away, scene(*places, door=0.28 * (places != PLACES[1]), drawer=0.22))
    parts = [(body,) for body in env.blocks.values()]
    for part in [*parts, *((env.table, env.links[x]) for x in ("light_link", "led_link"))]:
        assert pixels(env, "static", *part).sum() >= 16


def test_blocks_look_unlike_each_other_and_all_around_them_and_lights_on_unlike_off(env):
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
    assert min(np.linalg.norm(on - off) for on, off in zip(lit[1], lit[0], strict=True)) > 120


@pytest.mark.parametrize("moved", [{"door": 0.28}, {"drawer": 0.22}])
def test_door_and_drawer_move_many_pixels(env, moved):
    images = [env.reset(None, scene(**x))["rgb_obs"]["rgb_static"] for x in ({}, moved)]
    shut, opened = (image.astype(int) for image in images)
    assert (np.abs(opened - shut).max(-1) > 12).sum() > 150


def test_the_gripper_camera_sees_fingers_and_the_block_between_them(env):
    grasp_red(env, (0.05, -0.12, 0.6))
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


@pytest.mark.parametrize(
    "action", [[0] * 6 + [0.5], [0] * 7, [0] * 6, np.full(7, np.nan), [np.inf] + [0] * 5 + [1]]
)
def test_a_bad_action_is_an_error_and_moves_nothing(env, action):
    env.reset()
    target = env.target_pos.copy()
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    assert np.array_equal(env.target_pos, target)


def test_a_bad_state_is_an_error_that_names_it(env):
    for robot, scene_obs, message in (
        (np.zeros(14), None, "robot_obs must be 15"), (np.zeros(15), None, r"robot_obs\[14\]"),
        (None, np.full(24, np.nan), "scene_obs must be 24"),
        (None, np.full(24, 0.5), r"scene_obs\[4\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            env.reset(robot, scene_obs)


def test_sim_and_calvin_work_alone_in_an_empty_folder_and_name_pybullet_if_it_is_missing(tmp_path):
    for file in ("sim.py", "calvin.py"):
        shutil.copy(REPO / file, tmp_path)
    alone = "import sim; print(sim.PlayTable(8, 8).get_obs()['rgb_obs']['rgb_static'].shape)"
    without = "import sys; sys.modules['pybullet_data'] = None; import sim; sim.PlayTable()"
    how = {"cwd": tmp_path, "capture_output": True, "text": True}
    good, bad = (subprocess.run([sys.executable, "-c", x], **how) for x in (alone, without))
    assert "(8, 8, 3)" in good.stdout
    assert bad.returncode != 0 and "pip install pybullet" in bad.stderr
