"""What robot.py promises: no command out of bounds, no fault unanswered, recordings that train.

The end-to-end tests drive franky-sim on loopback: the real client library, the real network
protocol. They are paced by the arm's own clock, so a slow machine changes nothing but their length.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import data as D
import robot as R

HERE = Path(__file__).resolve().parent
C = R.RobotConfig()
HOME = np.array(C.neutral[0])
HAND = np.eye(4)  # the hand's tool in the flange's frame
HAND[:3, :3], HAND[2, 3] = R.turn([0, 0, -np.pi / 4]), 0.1034


def pose(x=0.5, y=0.0, z=0.3, euler=(np.pi, 0, 0)) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R.from_euler(euler), (x, y, z)
    return T


def act(*a) -> np.ndarray:
    return np.array([*a, *[0.0] * (6 - len(a)), 1.0])


# ------------------------------------------------------------------ geometry, by other means
def test_euler_angles_are_pybullets():
    pybullet = pytest.importorskip("pybullet", reason="the oracle is PyBullet")
    for e in np.random.default_rng(0).uniform(-1.5, 1.5, (50, 3)):
        want = pybullet.getMatrixFromQuaternion(pybullet.getQuaternionFromEuler(e.tolist()))
        np.testing.assert_allclose(R.from_euler(e).ravel(), want, atol=1e-9)
        np.testing.assert_allclose(R.to_euler(R.from_euler(e)), e, atol=1e-9)


def test_a_turn_is_the_exponential_series_and_the_vector_undoes_it():
    for w in [*np.random.default_rng(1).normal(0, 1, (50, 3)), np.zeros(3), np.array([0, 0, 3.14])]:
        x, y, z = w
        K, power, total = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.eye(3), np.eye(3)
        for k in range(1, 60):
            power = power @ K / k
            total = total + power
        np.testing.assert_allclose(R.turn(w), total, atol=1e-9)
        if np.linalg.norm(w) < np.pi:
            np.testing.assert_allclose(R.rotation_vector(R.turn(w)), w, atol=1e-6)
    half = R.rotation_vector(np.diag([1.0, -1, -1]))  # half a turn has no unique direction
    np.testing.assert_allclose(np.abs(half), [np.pi, 0, 0])


def test_the_flange_is_where_pybullets_panda_has_it():
    pybullet = pytest.importorskip("pybullet", reason="the oracle is PyBullet")
    import pybullet_data

    client = pybullet.connect(pybullet.DIRECT)
    try:
        urdf = pybullet_data.getDataPath() + "/franka_panda/panda.urdf"
        arm = pybullet.loadURDF(urdf, useFixedBase=True, physicsClientId=client)
        for q in [*C.neutral, *np.random.default_rng(2).uniform(R.Q_LOW, R.Q_HIGH, (20, 7))]:
            for i in range(7):
                pybullet.resetJointState(arm, i, q[i], physicsClientId=client)
            link = pybullet.getLinkState(arm, 7, 0, 1, physicsClientId=client)  # panda_link8
            T = R.flange(q)
            np.testing.assert_allclose(T[:3, 3], link[4], atol=1e-4)
            rot = np.reshape(pybullet.getMatrixFromQuaternion(link[5]), (3, 3))
            np.testing.assert_allclose(T[:3, :3], rot, atol=1e-4)
    finally:
        pybullet.disconnect(client)


def test_every_neutral_pose_is_safe_and_reachable_from_every_other():
    for q in C.neutral:
        for goal in C.neutral:
            R.check_homing(C, np.array(q), goal, HAND)


# ------------------------------------------------------------------ the safety part
def test_an_action_of_one_is_the_papers_step_in_the_base_frame():
    T = pose(euler=(np.pi, 0, 1.0))
    out, notes = R.safe_target(C, T, act(1.0), T, HOME)
    np.testing.assert_allclose(out[:3, 3] - T[:3, 3], [0.02, 0, 0], atol=1e-12)
    out, _ = R.safe_target(C, T, act(0, 0, 0, 0, 0, 1.0), T, HOME)
    np.testing.assert_allclose(R.to_euler(out[:3, :3])[2] - 1.0, 0.05, atol=1e-9)
    assert notes == []


def test_in_the_tools_frame_the_same_action_goes_another_way():
    T = pose(euler=(np.pi, 0, np.pi / 2))  # the tool's x is the base's y
    out, _ = R.safe_target(dataclasses.replace(C, frame="tool"), T, act(1.0), T, HOME)
    np.testing.assert_allclose(out[:3, 3] - T[:3, 3], [0, 0.02, 0], atol=1e-12)


def test_rotations_are_composed_which_near_straight_down_is_almost_adding_angles():
    down, tilted, a = pose(), pose(euler=(np.pi, 0.9, 0.4)), act(0, 0, 0, 0.6, -0.8, 0.5)
    differences = []
    for T in (down, tilted):
        out, _ = R.safe_target(C, T, a, T, HOME)
        added = R.from_euler(R.to_euler(T[:3, :3]) + a[3:6] * 0.05)
        differences.append(np.linalg.norm(R.rotation_vector(out[:3, :3] @ added.T)))
    assert differences[0] < 0.003 and differences[1] > 0.01


def test_actions_are_integrated_on_the_commanded_pose_not_the_measured_one():
    T, M = pose(), pose(z=0.29)  # the arm sags by a centimetre
    for _ in range(5):
        T, _ = R.safe_target(C, T, act(), M, HOME)
    np.testing.assert_allclose(T[:3, 3], [0.5, 0, 0.3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(bad):
    for k in range(7):
        a = act()
        a[k] = bad
        with pytest.raises(R.Unsafe, match="finite"):
            R.safe_target(C, pose(), a, pose(), HOME)
    M, q = pose(), HOME.copy()
    M[0, 3] = q[2] = bad
    for args in ((M, HOME), (pose(), q)):
        with pytest.raises(R.Unsafe, match="finite"):
            R.safe_target(C, pose(), act(), *args)
    with pytest.raises(R.Unsafe, match="seven"):
        R.safe_target(C, pose(), np.zeros(6), pose(), HOME)


@pytest.mark.parametrize("joint", range(7))
def test_a_joint_close_to_its_limit_is_named(joint):
    for limit, sign in ((R.Q_LOW, 1), (R.Q_HIGH, -1)):
        q = HOME.copy()
        q[joint] = limit[joint] + sign * 0.09
        with pytest.raises(R.Unsafe, match=f"joint {joint + 1} "):
            R.safe_target(C, pose(), act(), pose(), q)
        q[joint] = limit[joint] + sign * 0.11
        R.safe_target(C, pose(), act(), pose(), q)


def test_a_tool_outside_the_box_is_refused_and_one_that_just_overshot_is_not():
    with pytest.raises(R.Unsafe, match="outside the box"):
        R.safe_target(C, pose(x=0.75), act(), pose(x=0.75), HOME)
    out, _ = R.safe_target(C, pose(x=0.70), act(), pose(x=0.72), HOME)
    assert out[0, 3] == 0.70


def test_at_a_wall_of_the_box_the_target_slides_along():
    T = pose(x=0.695)
    out, notes = R.safe_target(C, T, act(0.5, 0.5), T, HOME)
    np.testing.assert_allclose(out[:3, 3], [0.70, 0.01, 0.3], atol=1e-12)
    assert notes == ["box"]


def test_the_leash_stops_a_target_that_runs_ahead_and_pulls_back_one_that_is_left_behind():
    T = M = pose()
    for _ in range(9):  # a blocked arm
        T, notes = R.safe_target(C, T, act(1.0), M, HOME)
    assert notes == ["leash"] and abs(T[0, 3] - 0.55) < 1e-9
    pushed = pose(x=0.45)
    T, notes = R.safe_target(C, T, act(), pushed, HOME)
    assert notes == ["pulled back"] and abs(T[0, 3] - 0.50) < 1e-9


def hostile(rng, c):
    """An action and a measured state that nobody would send on purpose."""
    kind = rng.integers(6)
    a = [rng.normal(0, 1, 7), rng.normal(0, 1e9, 7), rng.choice([-1.0, 1.0], 7), np.zeros(7),
         rng.normal(0, 1, 7), np.full(7, np.nan)][kind]  # fmt: skip
    if kind == 4:
        a[rng.integers(7)] = rng.choice([np.inf, -np.inf, np.nan, 1e300, -1e300])
    M = np.eye(4)
    M[:3, 3] = rng.uniform(np.array(c.box_low) - 0.05, np.array(c.box_high) + 0.05)
    M[:3, :3] = R.from_euler([np.pi + rng.normal(0, 0.4), rng.normal(0, 0.4), rng.uniform(-3, 3)])
    return a, M, rng.uniform(R.Q_LOW + 0.05, R.Q_HIGH - 0.05)


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("jumpy", [False, True])
def test_10000_random_and_hostile_actions_never_exceed_a_bound(frame, jumpy):
    """jumpy: the measured pose is anywhere each time; else it follows the target with a lag."""
    rng, c = np.random.default_rng(7), dataclasses.replace(C, frame=frame)
    T, M, M_before, sent, refused, limited = pose(), pose(), pose(), 0, 0, set()
    for _ in range(10_000):
        a, far, q = hostile(rng, c)
        if jumpy:
            M = far
        else:
            M = T.copy()
            M[:3, 3] += rng.normal(0, 0.01, 3)
            M[:3, :3] = R.turn(rng.normal(0, 0.05, 3)) @ M[:3, :3]
            q = HOME
        before = T.copy()
        try:
            T, notes = R.safe_target(c, T, a, M, q)
        except R.Unsafe:
            refused += 1
            np.testing.assert_array_equal(T, before)  # what is refused leaves no trace
            continue
        sent, limited = sent + 1, limited | set(notes)
        p, m, RT, RM = T[:3, 3], M[:3, 3], T[:3, :3], M[:3, :3]
        assert np.isfinite(T).all()
        assert (p >= c.box_low).all() and (p <= c.box_high).all()
        assert np.linalg.norm(p - m) <= 0.05 + 1e-9
        lead = np.arccos(np.clip((np.trace(RT @ RM.T) - 1) / 2, -1, 1))
        assert lead <= 0.3 + 1e-6
        assert np.arccos(np.clip(-RT[2, 2], -1, 1)) <= 1.0 + 1e-9
        np.testing.assert_allclose(RT @ RT.T, np.eye(3), atol=1e-9)
        # A retreat towards the arm comes on top; it is as far as the arm itself was moved.
        step, moved = p - before[:3, 3], np.linalg.norm(m - M_before[:3, 3])
        assert np.linalg.norm(step) <= 0.4 / 15 + 1e-9 + moved * ("pulled back" in notes)
        assert frame == "tool" or "pulled back" in notes or (np.abs(step) <= 0.02 + 1e-9).all()
        angle, turned = (
            np.arccos(np.clip((np.trace(A[:3, :3] @ B[:3, :3].T) - 1) / 2, -1, 1))
            for A, B in ((T, before), (M, M_before))
        )
        assert angle <= 1.2 / 15 + 1e-6 + turned * ("turned back" in notes)
        M_before = M.copy()
    assert refused > 1000 and sent > 1000  # both happened, or this shows nothing
    assert limited >= {"clamped", "speed", "box", "leash", "turn", "tilt"} - (
        set() if jumpy else {"leash"}
    )


def test_the_largest_share_of_a_way_on_the_leash_is_found_by_bisection_too():
    rng = np.random.default_rng(3)
    for _ in range(300):
        start, end, centre = rng.normal(0, 1, (3, 3))
        radius = np.linalg.norm(start - centre) + rng.uniform(0, 1)
        ok = lambda s, a=start, b=end, c=centre, r=radius: np.linalg.norm(a + s * (b - a) - c) <= r
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if ok(middle) else (low, middle)
        want = 1.0 if ok(1.0) else low
        assert abs(R.reach(start, end, centre, radius) - want) < 1e-6


def test_homing_does_not_sink_through_the_table():
    low = dataclasses.replace(C, box_low=(0.3, -0.4, 0.45))
    with pytest.raises(R.Unsafe, match="outside the box"):
        R.check_homing(low, HOME, HOME, HAND)
    folded = np.array([0, 0.9, 0, -1.6, 0, 2.5, 0.785])  # the tool is lower than the table
    with pytest.raises(R.Unsafe, match="sink"):
        R.check_homing(dataclasses.replace(C, box_low=(0.3, -0.4, 0.3)), folded, HOME, HAND)


def test_the_hand_has_a_dead_band_and_above_zero_opens():
    states = [R.gripper_command(C, a, last) for a, last in
              ((1, -1), (-1, 1), (0.01, -1), (-0.01, 1), (0.06, -1), (0.0, 1))]  # fmt: skip
    assert states == [1, -1, -1, 1, 1, 1]


def test_a_recorded_action_replayed_gives_the_same_commanded_poses():
    rng, T = np.random.default_rng(4), pose()
    for frame in ("base", "tool"):
        c = dataclasses.replace(C, frame=frame)
        for _ in range(100):
            a = np.append(rng.uniform(-0.6, 0.6, 6), 1.0)
            out, _ = R.safe_target(c, T, a, T, HOME)
            np.testing.assert_allclose(R.relative_action(c, T, out, 1.0), a, atol=1e-6)


# ------------------------------------------------------------------ configuration
def test_config_has_the_papers_values():
    c = R.RobotConfig()
    assert (c.hz, c.record_hz, c.policy_size, c.recorded_size) == (15, 30, 64, 200)  # App. E
    assert c.action_scale == (0.02, 0.05) and c.frame == "base"  # App. D
    assert len(c.neutral) > 1  # Sec. V-B
    fast = R.recording(c)
    assert fast.hz * fast.action_scale[0] == pytest.approx(c.hz * c.action_scale[0])


def test_a_wrong_setup_names_the_field(tmp_path):
    for text, match in (
        ('{"hosst": "1"}', "hosst"),
        ('{"hz": "fast"}', "hz"),
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"box_low": [0.3, 0.1]}', "box_low"),
        ('{"action_scale": [0.02]}', "action_scale"),
        ('{"static_crop": [0, 200, 100]}', "static_crop"),
        ('{"neutral": [[0, 0, 0]]}', "neutral"),
        ('{"neutral": []}', "neutral"),
        ('{"hz": 0}', "hz"),
        ('{"action_scale": [0.0, 0.05]}', "action_scale"),
        ('{"max_speed": NaN}', "max_speed"),
        ('{"record_hz": 31}', "record_hz"),
        ('{"frame": "world"}', "frame"),
        ('{"box_low": [0.9, 0, 0]}', "box_low"),
    ):
        (tmp_path / "setup.json").write_text(text)
        with pytest.raises(R.RobotError, match=match):
            R.load_config(tmp_path / "setup.json")
    given = {"host": "1.2.3.4", "leash": [0.04, 0.2], "dynamics": 1, "gripper_crop": [0, 9, 1, 10]}
    (tmp_path / "setup.json").write_text(json.dumps(given | {"neutral": [[0] * 7, [0.5] * 7]}))
    c = R.load_config(tmp_path / "setup.json")
    assert (c.host, c.leash, c.dynamics) == ("1.2.3.4", (0.04, 0.2), 1)
    assert c.gripper_crop == (0, 9, 1, 10) and c.neutral[1] == (0.5,) * 7


# ------------------------------------------------------------------ cameras, from recorded files
def film(path, frames=30, size=(320, 240)):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30, size)
    for i in range(frames):
        image = np.full((size[1], size[0], 3), (255, 0, 0), np.uint8)  # OpenCV's blue
        image[:, 8 * i : 8 * i + 20] = 255
        out.write(image)
    out.release()
    return path


def test_images_shrink_exactly_as_data_py_does():
    for n, size in ((480, 200), (200, 64), (64, 64)):
        x = np.random.default_rng(n).integers(0, 256, (n, n, 3), np.uint8)
        np.testing.assert_array_equal(R.resize_area(x, size), D.resize_area(x, size))


def test_a_film_plays_as_a_camera_in_rgb_cropped_and_again_from_its_start(tmp_path):
    camera = R.Camera(f"opencv:{film(tmp_path / 'film.avi')}", None, 200)
    try:
        seen = set()
        began = time.monotonic()
        while time.monotonic() - began < 2.2:  # the film has one second
            image, stamp = camera.read()
            seen.add(stamp)
            time.sleep(0.01)
        assert camera.shape == (240, 320, 3) and image.shape == (200, 200, 3)
        assert image[..., 2].mean() > 200  # blue in OpenCV's order is the last channel in RGB
        assert 30 < len(seen) < 90 and max(seen) - began > 1.5
    finally:
        camera.close()


def test_a_camera_that_repeats_one_picture_grows_old(tmp_path):
    camera = R.Camera(f"opencv:{film(tmp_path / 'film.avi')}", None, 200)
    try:
        still = camera.read()[0]  # grab() is the camera's own thread's: OpenCV bears no second one
        camera.grab = lambda: time.sleep(0.03) or still
        time.sleep(0.6)
        _, stamp = camera.read()
        assert time.monotonic() - stamp > 0.4
    finally:
        camera.close()


def test_a_missing_camera_or_a_wrong_crop_is_an_error_that_names_it(tmp_path):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    with pytest.raises(R.RobotError, match="no_such"):
        R.Camera(f"opencv:{tmp_path / 'no_such.mp4'}", None, 200)
    with pytest.raises(R.RobotError, match="expected opencv"):
        R.Camera("webcam", None, 200)
    camera = R.Camera(f"opencv:{film(tmp_path / 'film.avi')}", (0, 240, 100, 340), 200)
    with pytest.raises(R.RobotError, match="lie inside"):
        camera.read()
    camera.close()


def test_a_missing_driver_says_what_to_install(monkeypatch):
    for module, use, package in (
        ("cv2", lambda: R.open_driver("opencv:0"), "opencv-python-headless"),
        ("pyrealsense2", lambda: R.open_driver("realsense:"), "pyrealsense2"),
        ("franky", lambda: R.Arm(C), "franky-control"),
    ):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
        with pytest.raises(R.RobotError, match=f"pip install {package}"):
            use()


def test_a_recorded_realsense_file_plays_through_the_drivers_pipeline(tmp_path):
    rs = pytest.importorskip("pyrealsense2", reason="no pyrealsense2", exc_type=ImportError)
    path = str(tmp_path / "x.db3")
    device = rs.software_device()
    sensor = device.add_sensor("Color")
    stream = rs.video_stream()
    stream.type, stream.index, stream.uid, stream.width, stream.height = (
        rs.stream.color,
        0,
        1,
        640,
        480,
    )
    stream.fps, stream.bpp, stream.fmt = 30, 3, rs.format.rgb8
    stream.intrinsics = rs.intrinsics()
    profile = sensor.add_video_stream(stream)
    recorder = rs.recorder(path, device)
    sensor.open(profile)
    sensor.start(lambda frame: None)
    for i in range(60):
        image = np.full((480, 640, 3), (200, 10, 10), np.uint8)
        image[:, 10 * i : 10 * i + 40] = 255
        frame = rs.software_video_frame()
        frame.pixels, frame.stride, frame.bpp = image, 640 * 3, 3
        frame.timestamp, frame.domain = i * 33.3, rs.timestamp_domain.hardware_clock
        frame.frame_number, frame.profile = i + 1, profile.as_video_stream_profile()
        sensor.on_video_frame(frame)
        time.sleep(0.01)
    sensor.stop()
    sensor.close()
    del recorder
    camera = R.Camera(f"realsense:{path}", None, 200)
    try:
        image, stamp = camera.read()
        assert camera.shape == (480, 640, 3) and image.shape == (200, 200, 3)
        assert image[..., 0].mean() > image[..., 2].mean()  # red first
        time.sleep(0.3)
        assert camera.read()[1] > stamp  # it goes on
    finally:
        camera.close()


# ------------------------------------------------------------------ with a kinematic double
class Lost(Exception):
    pass


def test_a_missing_camera_leaves_no_arm_open(monkeypatch):
    opened = []
    monkeypatch.setattr(R, "Arm", lambda c: opened.append(Double()) or opened[0])
    with pytest.raises(R.RobotError, match="expected opencv"):
        R.RealEnv(dataclasses.replace(C, static="webcam"))
    assert opened[0].calls == ["stop"]  # it was closed


class Double:
    """An arm without dynamics, for what needs none: it is halfway to its target at every reading.
    Its clock advances by 5 ms whenever it is read, so nothing waits for the wall's."""

    errors, lost = (Lost,), ()

    def __init__(self):
        self.M, self.q, self.t, self.width = R.flange(HOME) @ HAND, HOME.copy(), 0.0, 0.08
        self.target, self.calls, self.broken = self.M.copy(), [], []

    def state(self):
        if self.broken:
            raise self.broken.pop()
        self.t += 0.005
        self.M[:3, 3] += 0.5 * (self.target[:3, 3] - self.M[:3, 3])
        self.M[:3, :3] = self.target[:3, :3]
        return R.State(self.M.copy(), self.q, self.t, "Idle", HAND)

    def home(self, q, check):
        check()
        self.calls.append("home")
        self.q, self.target = np.array(q), R.flange(q) @ HAND
        self.M = self.target.copy()

    def send(self, T):
        self.calls.append("send")
        self.target = T.copy()

    def grip(self, opened):
        self.calls.append("open" if opened else "close")
        self.width = 0.08 * opened
        return True

    def stop(self):
        self.calls.append("stop")

    close = stop

    def recover(self, error):
        self.calls.append("recover")


class Noise:
    """A camera whose pictures are all different, and always new."""

    spec, shape = "noise", (240, 320, 3)

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def read(self):
        return self.rng.integers(0, 256, (200, 200, 3), np.uint8), time.monotonic()

    def close(self):
        pass


def doubled(tmp_path, c=C, **options):
    keys = []
    env = R.RealEnv(c, arm=Double(), cameras={k: Noise() for k in R.CAMERAS}, clock="robot",
                    key=lambda: keys.pop(0) if keys else "", **options)  # fmt: skip
    env.keys = keys
    env.start_log(tmp_path / "log.jsonl")
    return env


@pytest.fixture
def double(tmp_path):
    patient = dataclasses.replace(C, max_frame_age=30.0, max_state_age=30.0)
    env = doubled(tmp_path, patient)
    yield env
    env.close()


def test_the_interface_is_the_simulators(double):
    obs = double.reset()
    assert {k: (x.shape, x.dtype) for k, x in obs["rgb_obs"].items()} == dict.fromkeys(
        R.CAMERAS, ((64, 64, 3), np.uint8)
    )
    p, e, (width, *q, last) = obs["robot_obs"][:3], obs["robot_obs"][3:6], obs["robot_obs"][6:]
    T = R.flange(HOME) @ HAND
    np.testing.assert_allclose(p, T[:3, 3], atol=1e-6)
    np.testing.assert_allclose(R.from_euler(e), T[:3, :3], atol=1e-6)
    assert (width, last) == (0.08, 1.0) and q == HOME.tolist()
    obs, reward, done, info = double.step(act(0.5), render=False)
    assert (reward, done, info["operator"]) == (0.0, False, None)
    double.keys.append("s")
    assert double.step(act())[3]["operator"] == "success"
    double.resume()
    assert double.get_info()["operator"] is None


def test_reset_goes_to_the_joints_of_robot_obs_and_refuses_those_that_are_unsafe(double):
    wanted = np.zeros(15)
    wanted[7:14] = C.neutral[1]
    np.testing.assert_allclose(double.reset(wanted)["robot_obs"][7:14], C.neutral[1])
    wanted[7] = 2.7
    with pytest.raises(R.Stopped, match="joint 1"):
        double.reset(wanted)
    assert double.arm.calls.count("home") == 1


def test_ticks_are_one_period_apart_by_the_arms_clock(double):
    double.reset()
    times = [(double.step(act()), double.state.time)[1] for _ in range(30)]
    assert np.diff(times).mean() == pytest.approx(1 / 15, abs=0.006)


def test_errors_are_recovered_twice_and_then_end_the_rollout(double):
    double.reset()
    for k in range(2):
        double.arm.broken = [Lost("reflex")]
        double.step(act(0.5))
        assert double.arm.calls.count("recover") == k + 1
        np.testing.assert_allclose(double.T[:3, 3], double.arm.M[:3, 3], atol=0.01)
    double.arm.broken = [Lost("reflex")]
    with pytest.raises(R.Stopped, match="reflex"):
        double.step(act(0.5))
    assert double.arm.calls[-1] == "stop"


def test_what_took_longer_than_patience_to_recover_ends_the_rollout(double):
    double.reset()
    double.config = dataclasses.replace(double.config, patience=0.05)
    double.arm.broken, double.arm.recover = [Lost("silence")], lambda error: time.sleep(0.1)
    with pytest.raises(R.Stopped, match=r"silence; it took .* s to recover"):
        double.step(act(0.5))
    assert double.arm.calls[-1] == "stop"


def test_the_check_tells_the_policys_scale_and_every_limit(double, tmp_path, capsys):
    double.keys.append("y")
    double.check(tmp_path / "check.png")
    text = capsys.readouterr().out
    for word in ("0.02 m, 0.05 rad", "15 times", "recorded at 30 Hz", "box (0.3", "0.4 m/s",
                 "leash 0.05 m, 0.3 rad", "tilt 1.0", "joints 0.1 rad", "1000 N/m"):  # fmt: skip
        assert word in text


def test_an_arm_that_a_hand_stopped_is_not_started_again(double):
    double.reset()
    state = double.arm.state
    double.arm.broken = [Lost("user stop")]
    double.arm.state = lambda: dataclasses.replace(state(), mode="UserStopped")
    with pytest.raises(R.Stopped, match="UserStopped"):
        double.step(act(0.5))


def test_every_tick_is_on_the_disk_before_the_next(double, tmp_path):
    double.reset()
    for k in range(5):
        double.step(act(0.1 * k))
        log = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert log[-1]["event"] == "tick" and log[-1]["action"][0] == pytest.approx(0.1 * k)
        assert len([x for x in log if x["event"] == "tick"]) == k + 1


def test_a_dry_run_sends_nothing(tmp_path):
    env = doubled(tmp_path, dry_run=True)
    env.reset()
    env.step(act(1.0))
    env.close()
    assert set(env.arm.calls) <= {"stop"} and env.T is not None


# ------------------------------------------------------------------ recording
@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Teleoperated play through the file, both splits: the recording and what was commanded."""
    tmp_path, frames = tmp_path_factory.mktemp("played"), (100, 90)
    c = dataclasses.replace(R.recording(C), max_frame_age=30.0, max_state_age=30.0)
    env, rng, commands = doubled(tmp_path, c), np.random.default_rng(5), {}
    for split, n in zip(("training", "validation"), frames, strict=True):
        env.reset()
        left, commands[split], x = iter(range(n)), [], np.zeros(6)

        def device(obs, left=left, seen=commands[split]):
            nonlocal x
            seen.append(env.T.copy())
            x = 0.8 * x + rng.normal(0, 0.3, 6)
            hand = 1.0 if len(seen) < 40 else -1.0
            return None if next(left, None) is None else np.append(np.clip(x, -1, 1), hand)

        assert R.record(env, tmp_path / "play", split, device) == n // 2
    env.close()
    return tmp_path / "play", commands


def test_recorded_play_is_packed_and_its_actions_are_differences_of_commanded_poses(
    played, tmp_path
):
    folder, commands = played
    D.pack(folder, tmp_path / "packed", lang_folder="none", procs=1)
    data = D.PlayData(tmp_path / "packed", "training")
    assert len(data) == 50 and data.rgb_static.shape == (50, 64, 64, 3)
    assert (data.meta["hz"], data.meta["action_scale"]) == (15, [0.02, 0.05])
    assert (data.meta["source"], data.meta["renderer"]) == ("robot", "camera")
    kept = commands["training"][::2]
    for t in range(len(data)):  # App. E
        want = (kept[t + 1][:3, 3] - kept[t][:3, 3]) / 0.02
        np.testing.assert_allclose(data.actions[t, :3], np.clip(want, -1, 1), atol=1e-5)
    assert data.actions[0, 6] == 1 and data.actions[-1, 6] == -1
    frame = np.load(folder / "training" / "episode_0000010.npz")
    assert frame["rgb_static"].shape == (200, 200, 3)  # App. E
    np.testing.assert_allclose(frame["actions"][:3], kept[11][:3, 3])


@pytest.fixture
def folder(played, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(played[0], tmp_path / "play"))


def test_frames_that_a_crash_left_behind_become_an_episode(folder):
    split = folder / "training"
    first = 1 + max(int(p.stem[8:]) for p in folder.glob("*/episode_*.npz"))
    for i in range(first, first + 25):
        (split / f"episode_{i:07d}.npz").write_bytes((split / "episode_0000000.npz").read_bytes())
    recorder = R.Recorder(folder, "training", R.recording(C))
    bounds = np.load(split / "ep_start_end_ids.npy").tolist()
    assert bounds == [[0, 49], [first, first + 24]] and recorder.next == first + 25
    with pytest.raises(R.RobotError, match="another recording"):
        R.Recorder(
            folder, "training", R.recording(dataclasses.replace(C, action_scale=(0.01, 0.05)))
        )


def test_an_episode_shorter_than_a_window_leaves_nothing(tmp_path):
    env = doubled(tmp_path, dataclasses.replace(R.recording(C), max_frame_age=30.0))
    env.reset()
    left = iter(range(20))
    source = lambda obs: None if next(left, None) is None else act()
    assert R.record(env, tmp_path / "play", "training", source) == 0
    assert not list((tmp_path / "play").glob("*/episode_*.npz"))
    env.close()


def test_guided_by_hand_the_commanded_pose_is_the_measured_one_and_only_the_hand_moves(tmp_path):
    env = doubled(tmp_path, dataclasses.replace(R.recording(C), max_frame_age=30.0))
    env.reset()
    env.arm.calls.clear()
    state, ticks = env.arm.state, []

    def guided():
        ticks.append(env.arm.target[2, 3])
        env.arm.target[2, 3] -= 0.00002  # a person lowers the arm
        if len(ticks) in (400, 2000):
            env.keys.append("g" if len(ticks) == 400 else "n")
        return state()

    env.arm.state = guided
    n = R.record(env, tmp_path / "play", "training")
    assert n >= 20 and set(env.arm.calls) == {"close"}
    frames = [np.load(p) for p in sorted((tmp_path / "play/training").glob("episode_*.npz"))]
    assert frames[0]["rel_actions"][2] < 0 and frames[-1]["rel_actions"][6] == -1
    env.close()


def test_a_hand_that_holds_something_keeps_it_when_an_episode_begins(tmp_path):
    arm, c = Double(), dataclasses.replace(R.recording(C), max_frame_age=30.0)
    arm.width = 0.04
    env = R.RealEnv(c, arm=arm, cameras={k: Noise() for k in R.CAMERAS}, clock="robot",
                    key=lambda: "n")  # fmt: skip
    R.record(env, tmp_path / "play", "training")
    assert env.get_obs()["robot_obs"][14] == -1
    env.close()
    assert set(arm.calls) == {"stop"}


def test_actions_beyond_one_are_clipped_and_counted(tmp_path):
    recorder = R.Recorder(tmp_path, "training", R.recording(C))
    images = {k: np.zeros((200, 200, 3), np.uint8) for k in R.CAMERAS}
    for x in (0.4, 0.42, 0.45, 0.46):  # m: an action of 1, one of 1.5, one of 0.5
        for _ in range(2):
            recorder.add(pose(x=x), 1.0, images, np.zeros(15))
    actions = [np.load(p)["rel_actions"][0] for p in sorted(tmp_path.glob("*/episode_*.npz"))]
    np.testing.assert_allclose(actions, [1, 1, 0.5], atol=1e-9)
    assert recorder.clipped == 1


def test_ctrl_c_in_a_recording_says_that_everything_is_kept(tmp_path, monkeypatch):
    class Interrupted:
        check = close = lambda self, *_, **__: None

        def ask(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(R, "RealEnv", lambda *_, **__: Interrupted())
    (tmp_path / "setup.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"Ctrl-C.*kept.*same command"):
        R.main(["record", str(tmp_path / "setup.json"), str(tmp_path / "play"), "training"])


def test_annotated_play_has_the_language_of_its_spans(folder, tmp_path):
    spans = tmp_path / "spans.csv"
    spans.write_text("start,end,sentence,task\n"
                     "3,30,pull out the drawer,open_drawer\n10,40,Push the drawer  shut,\n"
                     "60,90,pull out the drawer,open_drawer\n")  # fmt: skip
    D.main(["annotate", str(folder), str(spans)])
    D.pack(folder, tmp_path / "packed", procs=1)
    data = D.PlayData(tmp_path / "packed", "training")
    np.testing.assert_array_equal(data.spans, [[3, 30], [10, 40]])
    assert data.tasks == ["open_drawer", "Push the drawer  shut"]
    np.testing.assert_allclose(data.span_emb[0], D.encode(["pull out the drawer"])[0])
    told = D.read_held_out(folder / f"validation/lang_{D.TEXT_ENCODER}")
    assert told["tasks"] == ["open_drawer", "Push the drawer  shut"]
    batch = D.Windows(data, 8, kind="lang").batch(0)
    assert set(batch["span"].tolist()) <= {0, 1}


def test_the_frame_of_relative_actions_travels_with_the_data(folder, tmp_path):
    for name in ("base", "tool"):
        for path in folder.glob("*/recording.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"frame": name}))
        D.pack(folder, tmp_path / name, lang_folder="none", procs=1)
        meta = D.PlayData(tmp_path / name, "training").meta
        assert meta.get("frame", "base") == name  # absent in what was packed before: base


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


# ------------------------------------------------------------------ evaluate.py --env real
@pytest.fixture
def session(tmp_path, monkeypatch):
    """evaluate.py --env real with the double, a policy that drifts, and an operator's keys."""
    import evaluate as E
    import train

    class Drifting:
        skip, seed = 1, staticmethod(lambda n: None)

        def reset(self):  # the operator's key of this instruction, at its fourth step
            self.steps, self.key = 0, during.pop(0) if during else None

        def act(self, obs, embedding):
            self.steps += 1
            if self.steps == 4 and self.key == "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.steps == 4 and self.key:
                made[-1].keys.append(self.key)
            return act(0.1)

        steps, key = -10, None

    meta = {"hz": 15, "action_scale": [0.02, 0.05], "renderer": "camera"}
    checkpoint = {"meta": meta, "text_encoder": D.TEXT_ENCODER, "config": {"method": "lumos"}}
    checkpoint |= {"step": 5, "run": {"seed": 0}}
    monkeypatch.setattr(train, "load_agent", lambda *_: (Drifting(), checkpoint))
    sentences = ["pull out the drawer", "push the drawer shut"]
    assert not set(sentences[:1]) - set(D.embedding_table())
    tasks = {"a": {"sentence": sentences[0], "scene": "drawer shut"},
             "b": {"sentence": sentences[0], "scene": "in hand", "held": True}}  # fmt: skip
    setup = {"rows": [{"row": "Both", "paper": [60, 50, 70], "tasks": tasks}],
             "chains": [{"scene": "as it is", "tasks": ["a", "b", "a", "b", "a"]}]}  # fmt: skip
    (tmp_path / "tasks.json").write_text(json.dumps(setup))
    (tmp_path / "setup.json").write_text('{"max_frame_age": 30.0, "max_state_age": 30.0}')
    made, script, during, real = [], [], [], R.RealEnv

    def environment(c, dry_run):
        keys = []
        env = real(c, dry_run, arm=Double(), cameras={k: Noise() for k in R.CAMERAS},
                   clock="robot", key=lambda: keys.pop(0) if keys else "")  # fmt: skip
        env.keys = keys

        def ask(text, choices):
            assert script and script[0] in choices, (text, choices, script)
            keys.append(script.pop(0))
            return real.ask(env, text, choices)

        env.ask = ask
        made.append(env)
        return env

    monkeypatch.setattr(R, "RealEnv", environment)

    def run(answers, keys=(), rollouts=2, more=()):
        script[:], during[:] = list(answers), list(keys)
        command = "--env real --checkpoint agent.pt --limit 8 --rollouts".split()
        files = {"--robot": "setup.json", "--tasks": "tasks.json", "--out": "out"}
        files = [x for k, name in files.items() for x in (k, str(tmp_path / name))]
        return E.main([*command, str(rollouts), *files, *more])

    run.made, run.out, run.checkpoint = made, tmp_path / "out", checkpoint
    return run


def test_rollouts_are_judged_recorded_and_resumed_and_the_table_is_table_iis(session, capsys):
    # a/00 is seen to succeed; a/01's time is over, and it is judged a success; enough.
    result = session("yggsq", ["s", None])
    assert result["tasks"] == {"a": [2, 2]} and result["chains"] == []
    # b/00, with the object in hand, is invalid, then judged failed.
    result = session("ygcgcfq", ["r", None])
    assert result["tasks"] == {"a": [2, 2], "b": [0, 1]}
    text = capsys.readouterr().out
    assert "Both" in text and "66.7%" in text and "60%" in text
    records = [json.loads(x) for x in (session.out / "rollouts.jsonl").read_text().splitlines()[1:]]
    assert [r["chain"] for r in records] == ["a/00", "a/01", "b/00"]
    names = {p.name for p in (session.out / "rollouts").iterdir()}
    for stem in ("a_00_0", "a_01_0", "b_00_0", "b_00_1"):  # also of the one that was invalid
        assert {f"{stem}.jsonl", f"{stem}.gif", f"{stem}_start.npz"} <= names
    log = [json.loads(x) for x in (session.out / "rollouts/b_00_1.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "outcome" and log[-1]["outcome"] == "failed"
    assert "close" in session.made[-1].arm.calls


def test_chains_of_five_count_what_was_solved_in_a_row(session):
    result = session("yg", ["s", "s", "f"], rollouts=0)
    assert result["chains"] == [2] and result["tasks"] == {}


def test_a_policy_of_another_rate_or_scale_is_refused_before_anything_moves(session):
    good = dict(session.checkpoint["meta"])
    wrong = {"hz": 30, "action_scale": [0.01, 0.05], "renderer": "tiny", "frame": "tool"}
    for key, value in wrong.items():
        session.checkpoint["meta"] = good | {key: value}
        with pytest.raises(SystemExit, match=key):
            session("")
    assert session.made == []


def test_an_operator_who_says_no_ends_it_and_nothing_moved(session):
    with pytest.raises(SystemExit, match="said no"):
        session("n")
    assert set(session.made[0].arm.calls) <= {"stop"}


@pytest.mark.parametrize(("key", "outcome"), [("f", "failed"), ("a", "abort"), ("r", "repeat")])
def test_a_rollout_that_ends_before_its_first_step_has_its_outcome(
    session, monkeypatch, key, outcome
):
    def home(self, q, check):  # the operator presses the key while the arm is homing
        if not session.out.joinpath("rollouts/a_00_1.jsonl").exists():
            session.made[-1].keys.append(key)
        check()

    monkeypatch.setattr(Double, "home", home)
    result = session("yg" + {"f": "q", "a": "", "r": "gq"}[key], ["s"])
    assert result["tasks"] == {"f": {"a": [0, 1]}, "a": {}, "r": {"a": [1, 1]}}[key]
    log = [json.loads(x) for x in (session.out / "rollouts/a_00_0.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "outcome" and log[-1]["outcome"] == outcome
    assert not session.out.joinpath("rollouts/a_00_0.gif").exists()


def test_homing_that_is_refused_is_judged_by_the_operator(session, monkeypatch):
    def home(self, q, check):
        raise Lost("blocked")

    monkeypatch.setattr(Double, "home", home)
    assert session("ygfq")["tasks"] == {"a": [0, 1]}
    assert "blocked" in (session.out / "rollouts.jsonl").read_text()


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(session, capsys):
    with pytest.raises(SystemExit, match=r"Ctrl-C.*same command"):
        session("ygg", ["s", "ctrl-c"])
    assert "33.3%" not in (text := capsys.readouterr().out) and "100.0%" in text
    log = (session.out / "rollouts/a_01_0.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["outcome"] == "interrupted"
    assert session("ygq", ["s"])["tasks"] == {"a": [2, 2]}


def test_single_tasks_alone_and_an_abort_when_asked(session):
    assert session("yggq", ["s", "s"], more=["--chains", "0"])["tasks"] == {"a": [2, 2]}
    session("yga", more=["--chains", "0"])  # "c closes them, a abort"
    session("ygca", [None], more=["--chains", "0"])  # "The time is over: ... a abort"
    outcomes = [json.loads(p.read_text().splitlines()[-1])["outcome"]
                for p in sorted((session.out / "rollouts").glob("b_00_*.jsonl"))]  # fmt: skip
    assert outcomes == ["abort", "abort"]


def test_what_fails_before_the_first_motion_leaves_no_record_behind(session, monkeypatch, tmp_path):
    def unreachable(*_):
        raise R.RobotError("no arm at 1.2.3.4")

    working = R.RealEnv
    monkeypatch.setattr(R, "RealEnv", unreachable)
    with pytest.raises(SystemExit, match="no arm"):
        session("")
    monkeypatch.setattr(R, "RealEnv", working)
    with pytest.raises(SystemExit, match="said no"):
        session("n")
    (tmp_path / "setup.json").write_text('{"max_frame_age": 30.0, "max_state_age": 20.0}')
    assert session("ygq", ["s"])["tasks"] == {"a": [1, 1]}
    (tmp_path / "setup.json").write_text('{"max_frame_age": 30.0, "max_state_age": 10.0}')
    only = r"another evaluation: robot.max_state_age was 20.0 and is 10.0. Give another"
    with pytest.raises(SystemExit, match=only):
        session("")


def test_a_dry_run_has_a_folder_and_a_column_of_its_own(session, tmp_path):
    import evaluate as E

    command = "--env real --robot x.json --checkpoint runs/robot/agent.pt".split()
    outs = [E.parse([*command, *more]).out.name for more in ((), ("--dry-run",))]
    assert outs == ["evaluate_real", "evaluate_real_dry_run"]
    result = session("ygq", ["s"], more=["--dry-run"])
    heads = [E.real_table(result | {"dry_run": dry}).splitlines()[1] for dry in (True, False)]
    assert "dry run" in heads[0] and "real" not in heads[0] and "real" in heads[1]


def test_a_task_file_without_chains_is_named(session, tmp_path):
    setup = json.loads((tmp_path / "tasks.json").read_text())
    for wrong, match in (({"rows": setup["rows"]}, "'chains'"), ([], "tabletop.json"),
                         (setup | {"chains": [{"scene": "", "tasks": ["c"]}]}, "'c'")):  # fmt: skip
        (tmp_path / "tasks.json").write_text(json.dumps(wrong))
        with pytest.raises(SystemExit, match=rf"tasks.json.*{match}"):
            session("")


@pytest.fixture(scope="module")
def learned(played, tmp_path_factory):
    """A run of two steps on the recorded play, at the size of the tests, and its policy."""
    import train

    root = tmp_path_factory.mktemp("learned")
    (root / "spans.csv").write_text("start,end,sentence,task\n"
        "3,30,pull out the drawer,a\n10,45,pull out the drawer,a\n"
        "60,90,pull out the drawer,a\n")  # fmt: skip
    shutil.copytree(played[0], root / "play")
    D.main(["annotate", str(root / "play"), str(root / "spans.csv")])
    D.pack(root / "play", root / "packed", procs=1)
    for stage in ("wm", "agent"):
        train.main(["--stage", stage, "--preset", "tiny", "--steps", "2", "--data",
                    str(root / "packed"), "--out", str(root / "run")])  # fmt: skip
    return root / "run", train.load_agent(root / "run" / "agent.pt")[0]


def test_play_of_a_robot_trains_and_no_probe_asks_for_the_scene_that_it_lacks(learned):
    files = {p.name for p in learned[0].iterdir()}
    assert "agent.pt" in files and "probe.json" not in files


def test_rollouts_are_dreamed_again_from_their_first_pictures_and_judged(
    session, learned, monkeypatch, capsys
):
    import train

    session("yggsq", ["s", None])  # two rollouts of a
    policy, looks = learned[1], []
    act_on = policy.act
    monkeypatch.setattr(policy, "act", lambda obs, e: looks.append(obs) or act_on(obs, e))
    monkeypatch.setattr(train, "load_agent", lambda *_: (policy, session.checkpoint))
    monkeypatch.setattr(R, "RealEnv", None)  # no robot

    def dreams(keys):
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
        row = session("", more=["--dream"])["rows"][0]
        return row["real"], row["dream"]

    assert dreams("x\ns\nq\n") == ([2, 2], [1, 1])
    assert "1 rollouts are left" in capsys.readouterr().out
    start = np.load(session.out / "rollouts/a_00_0_start.npz")
    for k in R.CAMERAS:
        np.testing.assert_array_equal(looks[0]["rgb_obs"][k], start[k])
    assert looks[1:9] == [None] * 8 and looks[9] is not None  # --limit 8
    assert (session.out / "rollouts/a_00_0_dream.gif").stat().st_size > 1000
    assert dreams("f\n") == ([2, 2], [1, 2])  # goes on with the second
    assert dreams("") == ([2, 2], [1, 2])
    assert "50.0%" in capsys.readouterr().out


def test_the_task_file_is_the_papers_22_tasks_in_14_rows_and_20_chains():
    setup = json.loads((HERE.parent / "assets/tabletop.json").read_text())
    tasks = [t for row in setup["rows"] for t in row["tasks"]]
    assert len(setup["rows"]) == 14 and len(tasks) == len(set(tasks)) == 22
    for k, average in enumerate((67.68, 63.39, 75.89)):  # Table II: over its rows
        assert abs(np.mean([row["paper"][k] for row in setup["rows"]]) - average) < 0.01
    assert setup["paper_chains"] == [2.05, 1.90]  # its last row
    sentences = {x["sentence"] for row in setup["rows"] for x in row["tasks"].values()}
    assert sentences <= set(D.embedding_table())  # no text encoder needed
    chains = [tuple(c["tasks"]) for c in setup["chains"]]
    assert len(set(chains)) == 20 and all(len(c) == 5 for c in chains)
    for chain in chains:  # lifted things are placed before the next is lifted
        for lift, place in zip(chain[::2], chain[1::2], strict=False):
            assert set(chain) <= set(tasks)
            assert lift.split("_")[:2] == ["lift", place.split("_")[1]] and place.startswith(
                "place"
            )


def test_the_play_tables_embeddings_are_what_they_were_before_the_robots_were_added():
    """Checkpoints are trained on these bits. A new sentence goes behind them."""
    with np.load(HERE.parent / "assets/embeddings.npz") as z:
        rows = z["embeddings"][:442]
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    assert digest == "3b1deb80af9a12b880a9b76553fb114905009e75ba660302d84e0366c0547e8f"


# ------------------------------------------------------------------ end to end, on loopback
def needs_franky():
    pytest.importorskip("franky", reason="franky-control is not installed")
    pytest.importorskip("franky_sim", reason="franky-sim is not installed")


class Simulated:
    """The simulated arm's process, and what it says that the arm did."""

    def __init__(self, host, folder):
        self.host, self.folder, self.dumps = host, folder, 0
        command = [sys.executable, str(HERE / "franka.py"), host]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # In a session of its own: a Ctrl-C here must not end the robot that we talk to.
        self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        assert self.process.stdout.readline() == "READY\n"

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def history(self):
        """(N, 8): wall, simulated time, tool's xyz, largest joint speed, hand's width, in motion"""
        self.dumps += 1
        path = self.folder / f"dump{self.dumps}.npy"
        self.tell(f"dump {path}")
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return np.load(path)

    def during(self, begin, end):
        """history() in a time of the wall clock; too busy a machine cannot tell of real time."""
        h = self.history()
        h = h[(h[:, 0] >= begin) & (h[:, 0] <= end)]
        factor = np.ptp(h[:, 1]) / (end - begin) if len(h) else 0.0
        if factor < 0.5:
            pytest.skip(f"the simulator runs at {factor:.2f} of real time: the machine is too busy")
        return h

    def travel(self, begin, end):
        """The longest distance (m) between two places of the tool in a time of the wall clock."""
        p = self.during(begin, end)[:, 2:5]
        return float(np.linalg.norm(p.max(0) - p.min(0)))

    def comes_to_rest(self, since, within=3.0):
        """Seconds from `since` (wall clock) until the tool stays within 2 mm for good."""
        time.sleep(within)
        h = self.during(since - 0.5, time.time())
        away = np.linalg.norm(h[:, 2:5] - h[-1, 2:5], axis=1) > 0.002
        assert (h[:, 0] < since + within - 0.5).any()
        last = h[away & (h[:, 0] > since), 0]
        return float(last.max() - since) if len(last) else 0.0


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    needs_franky()
    robot = Simulated(f"127.0.{os.getpid() % 200 + 1}.7", tmp_path_factory.mktemp("franka"))
    yield robot
    robot.process.kill()
    robot.process.wait()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return [film(tmp_path_factory.mktemp("films") / f"{k}.avi") for k in ("static", "gripper")]


@pytest.fixture
def env(simulated, films, tmp_path, request):
    changes = getattr(request, "param", {})
    static, gripper = (f"opencv:{path}" for path in films)
    c = dataclasses.replace(C, host=simulated.host, realtime=False, static=static, gripper=gripper,
                            dynamics=0.3, **changes)  # fmt: skip
    keys = []
    env = R.RealEnv(c, key=lambda: keys.pop(0) if keys else "", clock="robot")
    env.keys = keys
    env.start_log(tmp_path / "log.jsonl")
    env.reset()
    yield env
    env.close()


def events(env) -> list[dict]:
    return [json.loads(line) for line in Path(env.log.name).read_text().splitlines()]


def to_and_fro(i) -> np.ndarray:
    return act(0, 0.6 if i // 15 % 2 == 0 else -0.6)


def drive(env, steps, policy=to_and_fro, at=None, fault=None) -> float:
    """Steps with `fault()` before step `at`; when that was (wall clock)."""
    when = 0.0
    for i in range(steps):
        if i == at:
            when = time.time()
            fault()
        env.step(policy(i))
    return when


def report(request, text):
    """Figures for the README: shown by pytest -s."""
    print(f"\n[{request.node.name}] {text}")


def untrained_policy():
    """LUMOS itself with random weights, at the size of the tests."""
    import agent as A
    import world_model as W

    world = W.WorldModel(W.PRESETS["tiny"])
    return A.Policy(
        world, A.Agent(A.PRESETS["tiny"], world.config.deterministic, world.config.latent)
    )


SECONDS = float(os.environ.get("LUMOS_ROBOT_SECONDS", "60"))


@pytest.mark.parametrize("env", [{}, {"control": "pose"}], indirect=True, ids=["impedance", "pose"])
def test_a_policy_runs_at_15_hz(env, simulated, request):
    policy, emb = untrained_policy(), np.zeros(384, np.float32)
    obs, times, errors, began = env.get_obs(), [], [], time.time()
    assert obs["rgb_obs"]["rgb_static"].shape == (64, 64, 3) and obs["robot_obs"].shape == (15,)
    for tick in range(int(15 * SECONDS)):
        target = env.T.copy()
        action = policy.act(obs, emb)
        # Untrained, it would lean on a side of the box, and turn until a joint's limit stops it.
        action[:6] *= [(-1) ** (tick // 30)] * 3 + [0] * 3
        obs, _, _, _ = env.step(action)
        times.append(env.state.time)
        errors.append(1000 * np.linalg.norm(env.state.M[:3, 3] - env.T[:3, 3]))
        assert np.linalg.norm(env.T[:3, 3] - target[:3, 3]) <= 0.4 / 15 + 0.05
    period, log = 1000 * np.diff(times), [e for e in events(env) if e["event"] == "tick"]
    wall = time.time() - began
    report(request, f"{1000 / period.mean():.3f} Hz by the arm's clock ({len(times)} ticks, "
           f"{times[-1] - times[0]:.0f} s, real-time factor {SECONDS / wall:.2f}); period std "
           f"{period.std():.2f}, 99 % {np.percentile(period, 99):.1f}, max {period.max():.1f} ms; "
           f"tracking error mean {np.mean(errors):.1f}, 95 % {np.percentile(errors, 95):.1f}, max "
           f"{max(errors):.1f} mm; recoveries {env.recoveries}")  # fmt: skip
    assert abs(1000 / period.mean() - 15) < 0.2
    assert len(log) == len(times) and env.recoveries <= 2
    h = simulated.history()
    h = h[h[:, 0] > began]
    assert (h[:, 2:5] > np.array(C.box_low) - 0.03).all()  # from the simulator's side
    assert (h[:, 2:5] < np.array(C.box_high) + 0.03).all()
    assert np.linalg.norm(h[:, 2:5].max(0) - h[:, 2:5].min(0)) > 0.02  # it did move


def test_a_frozen_camera_holds_the_arm_and_when_it_lives_again_it_goes_on(env, simulated, request):
    camera = env.cameras["rgb_static"]
    live, still = camera.grab, camera.read()[0].repeat(2, 0).repeat(2, 1)

    def freeze():
        camera.grab = lambda: time.sleep(0.03) or still
        threading.Timer(2.0, setattr, (camera, "grab", live)).start()

    when = drive(env, 45, at=20, fault=freeze)
    assert simulated.travel(when + 1.2, when + 1.9) < 0.002
    assert simulated.travel(when + 2.5, time.time()) > 0.02
    hold = next(e for e in events(env) if e["event"] == "hold")
    report(request, f"holds {hold['wall'] - when:.2f} s after the last picture")
    assert "rgb_static" in hold["reason"][0] and hold["wall"] - when < 0.8
    assert [e["event"] for e in events(env) if e["event"] in ("hold", "resumed", "stopped")] == [
        "hold",
        "resumed",
    ]


def test_a_camera_that_stays_frozen_ends_the_rollout_with_the_arm_at_rest(env, simulated):
    camera = env.cameras["rgb_gripper"]
    still = np.zeros((240, 320, 3), np.uint8)
    with pytest.raises(R.Stopped, match=r"rgb_gripper is .* old"):
        drive(
            env, 60, at=10, fault=lambda: setattr(camera, "grab", lambda: time.sleep(0.03) or still)
        )
    assert simulated.comes_to_rest(time.time(), 1.5) < 0.5
    assert events(env)[-1]["event"] == "stopped"


def test_a_camera_that_is_unplugged_ends_the_rollout(env):
    def unplug():
        raise OSError("device removed")

    with pytest.raises(R.Stopped, match="device removed"):
        drive(env, 60, at=5, fault=lambda: setattr(env.cameras["rgb_static"], "grab", unplug))


def silence(simulated, seconds):
    os.kill(simulated.process.pid, signal.SIGSTOP)
    threading.Timer(seconds, os.kill, (simulated.process.pid, signal.SIGCONT)).start()


def test_a_stale_state_holds_and_goes_on(env, simulated, request):
    when = drive(env, 45, at=20, fault=lambda: silence(simulated, 0.6))
    kinds = [e["event"] for e in events(env) if e["event"] != "tick"]
    hold = next(e for e in events(env) if e["event"] == "hold")
    report(request, f"holds {hold['wall'] - when:.2f} s after the last state")
    assert "state is" in hold["reason"][0] and "resumed" in kinds and "error" not in kinds


@pytest.mark.parametrize("env", [{"patience": 8.0}], indirect=True)
def test_a_connection_silent_for_2_5_s_is_rebuilt_and_nothing_jumps(env, simulated, request):
    when = drive(env, 60, at=20, fault=lambda: silence(simulated, 2.5))
    log = events(env)
    lost = next(e for e in log if e["event"] == "error")
    back = next(e for e in log if e["event"] == "recovered")
    report(request, f"noticed after {lost['wall'] - when:.2f} s, goes on after "
           f"{back['wall'] - when:.2f} s")  # fmt: skip
    assert "Network" in lost["error"] and back["wall"] - when > 2.4
    h = simulated.history()
    step = np.linalg.norm(np.diff(h[h[:, 0] > when, 2:5], axis=0), axis=1)  # per 10 ms
    assert step.max() < 0.006
    assert simulated.travel(back["wall"], time.time()) > 0.02


def test_a_connection_silent_for_longer_than_patience_ends_the_rollout(env, simulated):
    with pytest.raises(R.Stopped, match=r"Network.*s to recover"):
        drive(env, 60, at=20, fault=lambda: silence(simulated, 4.5))
    assert events(env)[-1]["event"] == "stopped"
    assert simulated.comes_to_rest(time.time(), 1.5) < 0.5


def test_a_preempted_motion_is_taken_up_again(env, simulated, request):
    when = drive(env, 45, at=20, fault=lambda: env.arm.robot.stop())
    log = [e for e in events(env) if e["event"] in ("error", "recovered", "stopped")]
    assert [e["event"] for e in log] == ["error", "recovered"]
    report(request, f"noticed after {log[0]['wall'] - when:.2f} s, goes on after "
           f"{log[1]['wall'] - when:.2f} s")  # fmt: skip
    assert simulated.travel(log[1]["wall"], time.time()) > 0.02


def test_reflexes_are_cleared_but_not_for_ever(env, simulated, request):
    when = drive(env, 40, at=15, fault=lambda: simulated.tell("reflex"))
    log = [e for e in events(env) if e["event"] in ("error", "recovered")]
    report(request, f"noticed after {log[0]['wall'] - when:.2f} s, goes on after "
           f"{log[1]['wall'] - when:.2f} s")  # fmt: skip
    assert "Reflex" in log[0]["error"] and "cartesian_reflex" in log[0]["error"]
    np.testing.assert_allclose(
        log[1]["measured"], simulated_at(simulated, log[1]["wall"]), atol=0.01
    )
    with pytest.raises(R.Stopped, match="Reflex"):
        for _ in range(3):
            drive(env, 20, at=5, fault=lambda: simulated.tell("reflex"))
    assert simulated.comes_to_rest(time.time(), 1.5) < 0.5


def simulated_at(simulated, wall):
    h = simulated.history()
    return h[np.argmin(np.abs(h[:, 0] - wall)), 2:5]


def test_ctrl_c_brings_the_arm_to_rest_and_keeps_the_log(env, simulated, request):
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        drive(env, 60, at=20, fault=lambda: os.kill(os.getpid(), signal.SIGINT))
    log = events(env)
    stop = next(e for e in log if e["event"] == "stopping")
    rest = simulated.comes_to_rest(stop["wall"], 2.0)
    report(request, f"at rest {rest:.2f} s after Ctrl-C")
    assert stop["reason"] == "Ctrl-C" and rest < 1.0
    assert len([e for e in log if e["event"] == "tick"]) == 20 and log[-1]["event"] == "stopped"
    assert simulated.travel(began, stop["wall"]) > 0.02


@pytest.mark.parametrize(("key", "reason"), [("a", "abort"), ("r", "repeat"), ("f", "failed")])
def test_the_operators_keys_end_the_rollout(env, simulated, key, reason, request):
    with pytest.raises(R.Stopped) as stop:
        drive(env, 60, at=20, fault=lambda: env.keys.append(key))
    assert stop.value.reason == reason
    rest = simulated.comes_to_rest(time.time(), 1.5)
    report(request, f"at rest {rest:.2f} s after Stopped")
    assert rest < 0.5


def test_nan_stops_the_arm_and_huge_actions_are_clamped(env, simulated):
    when = time.time()
    drive(env, 10, policy=lambda i: act(0, 1e12 * (-1) ** (i // 5)))
    h = simulated.history()
    h = h[h[:, 0] > when]
    speed = np.linalg.norm(np.diff(h[::5, 2:5], axis=0), axis=1) / np.diff(h[::5, 1])
    assert 0.02 < speed.max() < 0.6  # m/s, by the simulator
    with pytest.raises(R.Stopped, match="finite"):
        drive(env, 10, at=3, fault=lambda: None, policy=lambda i: act(np.nan if i == 3 else 0.5))
    assert simulated.comes_to_rest(time.time(), 1.5) < 0.5


def test_a_policy_that_is_too_slow_is_stopped_with_the_reason(env):
    def slow(i):
        time.sleep(0.5)
        return to_and_fro(i)

    with pytest.raises(R.Stopped, match="ticks were late"):
        drive(env, 15, policy=slow)


def test_the_hand_follows_the_sign_of_the_action(env, simulated):
    drive(env, 45, policy=lambda i: np.r_[np.zeros(6), -0.7])
    assert simulated.history()[-1, 6] < 0.01
    assert env.get_obs()["robot_obs"][14] == -1 and env.get_obs()["robot_obs"][6] < 0.01
    drive(env, 45, policy=lambda i: np.r_[np.zeros(6), 0.7])
    assert simulated.history()[-1, 6] > 0.07


def test_a_wrong_address_is_an_error_and_what_is_waited_for_is_told(capsys):
    needs_franky()
    c = dataclasses.replace(C, host="127.9.9.9", realtime=False)
    with pytest.raises(R.RobotError, match=r"no arm at 127.9.9.9"):
        R.Arm(c)
    assert "waiting for the arm at 127.9.9.9" in capsys.readouterr().out


@pytest.mark.skipif(os.path.exists("/sys/kernel/realtime"), reason="a real-time kernel")
def test_without_a_real_time_kernel_the_error_names_the_simulators_setting(simulated):
    with pytest.raises(R.RobotError, match='"realtime": false'):
        R.Arm(dataclasses.replace(C, host=simulated.host))


def test_the_check_shows_everything_and_moves_nothing(env, simulated, tmp_path, capsys):
    env.arm.stop()
    time.sleep(1)
    when = time.time()
    env.keys += ["x", "y"]
    env.check(tmp_path / "check.png")
    text = capsys.readouterr().out
    for word in (simulated.host, "static.avi", "0.02 m", "box", "check.png", "WILL MOVE"):
        assert word in text
    assert (tmp_path / "check.png").stat().st_size > 1000
    env.keys.append("n")
    with pytest.raises(R.RobotError, match="said no"):
        env.check(tmp_path / "check.png")
    env.cameras["rgb_static"].grab = lambda: (
        time.sleep(0.03)
        or np.random.default_rng(time.monotonic_ns()).integers(0, 3, (240, 320, 3), np.uint8)
    )  # a cap on the lens: noise and nothing else
    time.sleep(0.3)
    with pytest.raises(R.RobotError, match="shows nothing"):
        env.check(tmp_path / "check.png")
    assert simulated.travel(when, time.time()) < 0.001


def test_a_dry_run_moves_nothing(env, simulated):
    env.arm.stop()
    env.dry_run = True
    time.sleep(1)
    when = time.time()
    env.reset()
    drive(env, 10)  # on the way out, until the leash holds the target
    assert np.abs(env.T[:3, 3] - env.state.M[:3, 3]).max() > 0.02  # it would have gone there
    assert simulated.travel(when, time.time()) < 0.001
