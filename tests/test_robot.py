"""What robot.py promises: no command out of bounds, no fault unanswered.

The end-to-end tests drive franky-sim on loopback: the real client library, the real network
protocol. They are about real time, so they run only where LUMOS_ROBOT_SECONDS says how long the arm
is driven: `make robot-test`, on a machine that does nothing else.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pybullet as bullet
import pybullet_data
import pytest
from franka import HAND, HOME, Double, Lost, act, doubled, environment
from pybullet_utils.bullet_client import BulletClient
from scipy.spatial.transform import Rotation

import data as D
import robot as R

HERE = Path(__file__).resolve().parent
C = R.RobotConfig()
SECONDS = float(os.environ.get("LUMOS_ROBOT_SECONDS", "0"))  # of driving, with a simulated arm


def pose(x=0.5, y=0.0, z=0.3, euler=(np.pi, 0, 0)) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Rotation.from_euler("xyz", euler).as_matrix(), (x, y, z)
    return T


def angle(A, B) -> float:
    """Between two rotation matrices, rad."""
    return float(np.arccos(np.clip((np.trace(A @ B.T) - 1) / 2, -1, 1)))


def safe(**given):
    """safe_target where nothing is wrong but what is given."""
    return R.safe_target(**{"c": C, "T": pose(), "action": act(), "M": pose(), "q": HOME} | given)


def moved(*action, T=None, **changes):
    """Where one action leads a pose that the arm is at: the new pose, and what was limited."""
    T = pose() if T is None else T
    return safe(c=dataclasses.replace(C, **changes), T=T, action=act(*action), M=T)


# ---------------------------------------------------------------------------- geometry
def test_rotations_are_pybullets_in_the_action_and_in_robot_obs():
    def matrix(euler):
        turn = bullet.getMatrixFromQuaternion(bullet.getQuaternionFromEuler([*map(float, euler)]))
        return np.reshape(turn, (3, 3))

    rng, env = np.random.default_rng(0), doubled()
    for _ in range(50):
        a, straight = rng.uniform(-0.9, 0.9, 3), pose()[:3, :3]
        np.testing.assert_allclose(
            moved(0, 0, 0, *a)[0][:3, :3], matrix(0.05 * a) @ straight, atol=1e-9
        )
        env.arm.target[:3, :3] = matrix(a) @ straight
        obs = env.get_obs()["robot_obs"]
        np.testing.assert_allclose(matrix(obs[3:6]), env.arm.target[:3, :3], atol=1e-9)
    env.close()


def test_the_flange_is_where_pybullets_panda_has_it():
    world = BulletClient(bullet.DIRECT)
    urdf = pybullet_data.getDataPath() + "/franka_panda/panda.urdf"
    arm = world.loadURDF(urdf, useFixedBase=True)
    for q in [*C.neutral, *np.random.default_rng(2).uniform(R.Q_LOW, R.Q_HIGH, (20, 7))]:
        for i in range(7):
            world.resetJointState(arm, i, q[i])
        link, T = world.getLinkState(arm, 7, 0, 1), R.flange(q)
        np.testing.assert_allclose(T[:3, 3], link[4], atol=1e-4)
        turn = Rotation.from_quat(link[5]).as_matrix()
        np.testing.assert_allclose(T[:3, :3], turn, atol=1e-4)


def test_every_neutral_pose_is_reachable_and_homing_does_not_sink_through_the_table():
    for q in C.neutral:
        for goal in C.neutral:
            R.check_homing(C, q, goal, HAND)
    with pytest.raises(R.Unsafe, match="outside the box"):
        R.check_homing(dataclasses.replace(C, box_low=(0.3, -0.4, 0.45)), HOME, HOME, HAND)
    folded = np.array([0, 0.9, 0, -1.6, 0, 2.5, 0.785])  # the tool is lower than the table
    with pytest.raises(R.Unsafe, match="sink"):
        R.check_homing(dataclasses.replace(C, box_low=(0.3, -0.4, 0.3)), folded, HOME, HAND)


# ---------------------------------------------------------------------------- safety
def test_an_action_of_one_is_the_papers_step_in_the_frame_that_the_set_up_names():
    T = pose(euler=(np.pi, 0, np.pi / 2))  # the tool's x is the base's y
    for frame, step in (("base", [0.02, 0, 0]), ("tool", [0, 0.02, 0])):
        out, notes = moved(1.0, T=T, frame=frame)
        np.testing.assert_allclose(out[:3, 3] - T[:3, 3], step, atol=1e-12)
        assert notes == []
    turned = pose(euler=(np.pi, 0, np.pi / 2 + 0.05))
    np.testing.assert_allclose(moved(0, 0, 0, 0, 0, 1.0, T=T)[0], turned, atol=1e-12)


def test_rotations_are_composed_which_near_straight_down_is_almost_adding_angles():
    differences = []
    for euler in ((np.pi, 0, 0), (np.pi, 0.9, 0.4)):
        out, _ = moved(0, 0, 0, 0.6, -0.8, 0.5, T=pose(euler=euler))
        added = pose(euler=np.add(euler, 0.05 * np.array([0.6, -0.8, 0.5])))
        differences.append(angle(out[:3, :3], added[:3, :3]))
    assert differences[0] < 0.003 and differences[1] > 0.01


def test_actions_are_integrated_on_the_commanded_pose_not_the_measured_one():
    T = pose()
    for _ in range(5):
        T, _ = safe(T=T, M=pose(z=0.29))  # the arm sags by a centimetre
    np.testing.assert_allclose(T[:3, 3], [0.5, 0, 0.3])


@pytest.mark.parametrize("where", ["action", "T", "M", "q"])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(where):
    for k in range(7):
        for bad in (np.nan, np.inf, -np.inf):
            x = {"action": act(), "T": pose(), "M": pose(), "q": HOME.copy()}[where]
            x.flat[k] = bad
            with pytest.raises(R.Unsafe, match="finite"):
                safe(**{where: x})


def test_what_is_no_action_no_pose_or_no_joint_state_is_refused():
    T, column = pose(), np.array([[1.0], [1], [1], [0]])
    stretched, zero, huge = T * (1 + 0.1 * column), T * (1 - column), T * (1 + 1e300 * column)
    mirrored = T @ np.diag([1, 1, -1, 1])
    no_poses = [T[:3], 2 * T, stretched, zero, huge, mirrored, [*T.tolist()[:3], [0, 0, 0]]]
    sevens = [["0.1"] * 7, np.zeros(7, bool), np.zeros(7, complex), np.full(7, None)]
    sevens += ["0000000", [[0.1], [0.1, 0.2]], np.zeros(6), np.zeros((1, 7))]
    for names, wrong in ((("action", "q"), sevens), (("T", "M"), no_poses)):
        for bad in (None, {"a": 1}, object(), *wrong):
            for name in names:
                with pytest.raises(R.Unsafe, match=r"real numbers|no pose"):
                    safe(**{name: bad})


@pytest.mark.parametrize("joint", range(7))
def test_a_joint_close_to_its_limit_is_named(joint):
    for limit, sign in ((R.Q_LOW, 1), (R.Q_HIGH, -1)):
        q = HOME.copy()
        q[joint] = limit[joint] + sign * 0.09
        with pytest.raises(R.Unsafe, match=f"joint {joint + 1} "):
            safe(q=q)
        q[joint] = limit[joint] + sign * 0.11
        safe(q=q)


def test_outside_the_box_is_refused_overshooting_is_not_and_at_a_wall_the_target_slides():
    with pytest.raises(R.Unsafe, match="outside the box"):
        moved(T=pose(x=0.75))
    assert safe(T=pose(x=0.70), M=pose(x=0.72))[0][0, 3] == 0.70
    out, notes = moved(0.5, 0.5, T=pose(x=0.695))
    np.testing.assert_allclose(out[:3, 3], [0.70, 0.01, 0.3], atol=1e-12)
    assert notes == ["box"]


def test_the_leash_stops_a_target_that_runs_ahead_and_pulls_back_one_that_is_left_behind():
    T = pose()
    for _ in range(9):  # a blocked arm
        T, notes = safe(T=T, action=act(1.0))
    assert notes == ["leash"] and abs(T[0, 3] - 0.55) < 1e-9
    T, notes = safe(T=T, M=pose(x=0.45))  # a pushed one
    assert notes == ["pulled back"] and abs(T[0, 3] - 0.50) < 1e-9


def hostile(rng):
    """An action and a measured state that nobody would send on purpose."""
    kind = rng.integers(6)
    a = [rng.normal(0, 1, 7), rng.normal(0, 1e9, 7), rng.choice([-1.0, 1.0], 7), np.zeros(7),
         rng.normal(0, 1, 7), np.full(7, np.nan)][kind]  # fmt: skip
    if kind == 4:
        a[rng.integers(7)] = rng.choice([np.inf, -np.inf, np.nan, 1e300, -1e300])
    p = rng.uniform(np.array(C.box_low) - 0.05, np.array(C.box_high) + 0.05)
    euler = [np.pi + rng.normal(0, 0.4), rng.normal(0, 0.4), rng.uniform(-3, 3)]
    return a, pose(*p, euler), rng.uniform(R.Q_LOW + 0.05, R.Q_HIGH - 0.05)


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("jumpy", [False, True])
def test_10000_random_and_hostile_actions_never_exceed_a_bound(frame, jumpy):
    """jumpy: the measured pose is anywhere each time; else it follows the target with a lag."""
    rng, c = np.random.default_rng(7), dataclasses.replace(C, frame=frame)
    T, M, M_before, sent, refused, limited = pose(), pose(), pose(), 0, 0, set()
    for _ in range(10_000):
        a, M, q = hostile(rng)
        if not jumpy:
            M, q = T.copy(), HOME
            M[:3, 3] += rng.normal(0, 0.01, 3)
            M[:3, :3] = Rotation.from_rotvec(rng.normal(0, 0.05, 3)).as_matrix() @ M[:3, :3]
        before = T.copy()
        try:
            T, notes = R.safe_target(c, T, a, M, q)
        except R.Unsafe:
            refused += 1
            np.testing.assert_array_equal(T, before)  # what is refused leaves no trace
            continue
        sent, limited = sent + 1, limited | set(notes)
        p, m, RT, RM = T[:3, 3], M[:3, 3], T[:3, :3], M[:3, :3]
        assert np.isfinite(T).all() and (p >= c.box_low).all() and (p <= c.box_high).all()
        assert np.linalg.norm(p - m) <= 0.05 + 1e-9 and angle(RT, RM) <= 0.3 + 1e-6
        assert np.arccos(np.clip(-RT[2, 2], -1, 1)) <= 1.0 + 1e-9
        np.testing.assert_allclose(RT @ RT.T, np.eye(3), atol=1e-9)
        # A retreat towards the arm comes on top; it is as far as the arm itself was moved.
        step, pushed = p - before[:3, 3], np.linalg.norm(m - M_before[:3, 3])
        assert np.linalg.norm(step) <= 0.4 / 15 + 1e-9 + pushed * ("pulled back" in notes)
        assert frame == "tool" or "pulled back" in notes or (np.abs(step) <= 0.02 + 1e-9).all()
        turned = angle(RM, M_before[:3, :3]) if "turned back" in notes else 0.0
        assert angle(RT, before[:3, :3]) <= 1.2 / 15 + 1e-6 + turned
        M_before = M.copy()
    assert refused > 1000 and sent > 1000  # both happened, or this shows nothing
    assert limited >= {"clamped", "speed", "box", "turn", "tilt"}
    assert jumpy or "leash" in limited


def test_the_largest_share_of_a_way_on_the_leash_is_found_by_trying_many_too():
    rng, shares = np.random.default_rng(3), np.linspace(0, 1, 10_001)
    for _ in range(300):
        start, end, centre = rng.normal(0, 1, (3, 3))
        radius = np.linalg.norm(start - centre) + rng.uniform(0, 1)
        away = np.linalg.norm(start + shares[:, None] * (end - start) - centre, axis=1)
        want = shares[away <= radius].max()
        assert R.share_within(start, end, centre, radius) == pytest.approx(want, abs=1.1e-4)


def test_the_hand_has_a_dead_band_and_above_zero_opens():
    table = ((1, -1, 1), (-1, 1, -1), (0.01, -1, -1), (-0.01, 1, 1), (0.06, -1, 1), (0.0, 1, 1))
    for a, last, want in table:
        assert R.gripper_command(C, a, last) == want


# ---------------------------------------------------------------------------- configuration
def test_config_has_the_papers_values():
    assert (C.hz, C.record_hz, C.policy_size, C.recorded_size) == (15, 30, 64, 200)  # App. E
    assert C.action_scale == (0.02, 0.05) and C.frame == "base"  # App. D
    assert len(C.neutral) > 1  # Sec. V-B
    fast = R.recording(C)
    assert fast.hz * fast.action_scale[0] == pytest.approx(C.hz * C.action_scale[0])


@pytest.fixture
def load(tmp_path):
    def load(given):
        (tmp_path / "setup.json").write_text(given if isinstance(given, str) else json.dumps(given))
        return R.load_config(tmp_path / "setup.json")

    return load


NUMBERS = [f.name for f in dataclasses.fields(C) if isinstance(f.default, int | float | tuple)]


@pytest.mark.parametrize("name", [n for n in NUMBERS if n != "realtime"])
def test_every_number_of_a_set_up_has_a_range_and_a_kind(name, load):
    default = getattr(C, name)
    for bad in (-10_000, 1e9, "fast", True, None, float("nan")):
        given = bad
        if isinstance(default, tuple):
            given = [[bad] * 7] if name == "neutral" else [bad] * len(default)
        with pytest.raises(R.RobotError, match=name):
            load({name: given})


WRONG = {  # field: values that are refused
    "hosst": ["1"], "host": ["", 1], "static": ["webcam"], "realtime": [1], "frame": ["world"],
    "control": ["torque"], "box_slack": [0.09], "box_low": [[0.3, 0.1], [0.9, 0, 0]],
    "record_hz": [31], "action_scale": [[0.0, 0.05]],
    "static_crop": [[0, 200, 100], [0, 200, -1, 200]],
    "neutral": [[[0, 0, 0]], [[0, 0, 0, 0, 0, 0, 0]], []],
}  # fmt: skip
WRONG = [({k: x}, k) for k, values in WRONG.items() for x in values]


@pytest.mark.parametrize(("given", "match"), [*WRONG, ("{", "JSON"), ("[1]", "object")])
def test_a_wrong_set_up_names_the_field(given, match, load):
    with pytest.raises(R.RobotError, match=match):
        load(given)


def test_a_set_up_changes_the_fields_that_it_names(load):
    given = {"host": "1.2.3.4", "leash": [0.04, 0.2], "dynamics": 1, "gripper_crop": [0, 9, 1, 10]}
    given["neutral"] = [C.neutral[0], [0.1, *C.neutral[0][1:]]]
    c = load(given)
    assert (c.host, c.leash, c.dynamics) == ("1.2.3.4", (0.04, 0.2), 1)
    assert c.gripper_crop == (0, 9, 1, 10) and c.neutral[1][0] == 0.1 and c.hz == C.hz


# ---------------------------------------------------------------------------- cameras, from files
@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of 0.3 s, 320 x 240, blue with a white bar that moves."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    path, images = tmp_path_factory.mktemp("film") / "film.gif", np.zeros((10, 240, 320, 3), "u1")
    images[..., 2] = 255
    for i, image in enumerate(images):
        image[:, 20 * i : 20 * i + 20] = 255
    imageio.imwrite(path, images, duration=30, loop=0)
    return f"opencv:{path}"


def test_images_shrink_exactly_as_data_py_does():
    for n, size in ((480, 200), (200, 64), (64, 64)):
        x = np.random.default_rng(n).integers(0, 256, (n, n, 3), np.uint8)
        np.testing.assert_array_equal(R.resize_area(x, size), D.resize_area(x, size))


def test_a_film_plays_as_a_camera_in_rgb_cropped_and_again_and_a_still_picture_grows_old(film):
    with contextlib.closing(R.Camera(film, None, 200)) as camera:
        seen, began = set(), time.monotonic()
        while time.monotonic() - began < 2.2:
            image, stamp = camera.read()
            seen.add(stamp)
            time.sleep(0.01)
        assert camera.frame.shape == (240, 320, 3) and image.shape == (200, 200, 3)
        assert camera.box == (0, 240, 40, 280)
        assert image[..., 2].mean() > 200  # blue in OpenCV's order is the last channel in RGB
        assert 12 < len(seen) < 90 and max(seen) - began > 1.5  # it has ten pictures
        still = camera.frame  # grab() is the camera's own thread's: OpenCV bears no second one
        camera.grab = lambda: time.sleep(0.03) or still
        time.sleep(0.6)
        assert time.monotonic() - camera.read()[1] > 0.4


def test_a_missing_camera_or_a_wrong_crop_is_an_error_that_names_it_and_leaves_no_arm_open(
    tmp_path, film, monkeypatch
):
    arm = Double()
    monkeypatch.setattr(R, "Arm", lambda c: arm)
    with pytest.raises(R.RobotError, match="no_such"):
        R.RealEnv(dataclasses.replace(C, static=f"opencv:{tmp_path / 'no_such.mp4'}"))
    assert arm.calls == ["stop"]  # it was closed
    with contextlib.closing(R.Camera(film, (0, 240, 100, 340), 200)) as camera:
        with pytest.raises(R.RobotError, match="lie inside"):
            camera.read()


@pytest.mark.parametrize(
    ("module", "use", "package"),
    [
        ("cv2", lambda: R.Camera("opencv:0", None, 200), "opencv-python-headless"),
        ("pyrealsense2", lambda: R.Camera("realsense:", None, 200), "pyrealsense2"),
        ("franky", lambda: R.Arm(C), "franky-control"),
    ],
)
def test_a_missing_driver_says_what_to_install(monkeypatch, module, use, package):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(R.RobotError, match=f"pip install {package}"):
        use()


def test_a_recorded_realsense_file_plays_through_the_drivers_pipeline(tmp_path):
    rs = pytest.importorskip("pyrealsense2", reason="no pyrealsense2", exc_type=ImportError)
    path, device, stream = str(tmp_path / "x.db3"), rs.software_device(), rs.video_stream()
    sensor = device.add_sensor("Color")
    stream.type, stream.index, stream.uid = rs.stream.color, 0, 1
    stream.width, stream.height = 640, 480
    stream.fps, stream.bpp, stream.fmt = 30, 3, rs.format.rgb8
    stream.intrinsics = rs.intrinsics()
    profile = sensor.add_video_stream(stream)
    recorder = rs.recorder(path, device)
    sensor.open(profile)
    sensor.start(lambda frame: None)
    for i in range(60):
        frame = rs.software_video_frame()
        frame.pixels = np.full((480, 640, 3), (200, 10, i), np.uint8)
        frame.timestamp, frame.stride, frame.bpp = i * 33.3, 640 * 3, 3
        frame.domain = rs.timestamp_domain.hardware_clock
        frame.frame_number, frame.profile = i + 1, profile.as_video_stream_profile()
        sensor.on_video_frame(frame)
        time.sleep(0.01)
    sensor.stop()
    sensor.close()
    del recorder
    with contextlib.closing(R.Camera(f"realsense:{path}", None, 200)) as camera:
        image, stamp = camera.read()
        assert camera.frame.shape == (480, 640, 3) and image.shape == (200, 200, 3)
        assert image[..., 0].mean() > image[..., 2].mean()  # red first
        time.sleep(0.3)
        assert camera.read()[1] > stamp  # it goes on


# ---------------------------------------------------------------------------- with a double
@pytest.fixture
def double(tmp_path):
    with open(tmp_path / "log.jsonl", "w") as log:
        env = doubled(log=log)
        yield env
        env.close()


def test_the_interface_is_the_simulators(double):
    obs = double.reset()
    assert [*obs["rgb_obs"]] == ["rgb_static", "rgb_gripper"]
    for image in obs["rgb_obs"].values():
        assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    T, robot_obs = R.flange(HOME) @ HAND, obs["robot_obs"]
    np.testing.assert_allclose(pose(*robot_obs[:3], robot_obs[3:6]), T, atol=1e-6)
    np.testing.assert_array_equal(robot_obs[6:], [0.08, *HOME, 1.0])
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


def test_a_hand_that_stays_busy_ends_the_wait_before_a_rollout_and_in_it(double):
    double.config = dataclasses.replace(double.config, patience=0.1)
    double.reset()
    double.arm.grip = lambda opened: False
    with pytest.raises(R.Stopped, match="hand has been busy"):
        for _ in range(100):
            double.step(-act())
            time.sleep(0.005)
    with pytest.raises(R.Stopped, match="hand has been busy"):
        double.reset()


def test_ticks_are_one_period_apart_and_each_is_on_the_disk_before_the_next(double):
    double.reset()
    times = []
    for k in range(30):
        double.step(act(0.01 * k))
        times.append(double.state.time)
        assert [x["action"][0] for x in events(double, "tick")] == [0.01 * i for i in range(k + 1)]
    assert np.diff(times).mean() == pytest.approx(1 / 15, abs=0.006)


def test_an_arm_that_a_hand_stopped_is_not_started_again(double):
    double.reset()
    double.arm.broken, double.arm.mode = [Lost("user stop")], "UserStopped"
    with pytest.raises(R.Stopped, match="UserStopped"):
        double.step(act())


# ---------------------------------------------------------------------------- on loopback
class Simulated:
    """The simulated arm's process, and what it says that the arm did."""

    def __init__(self, host, folder):
        self.host, self.path = host, folder / "history"
        command = [sys.executable, HERE / "franka.py", host, self.path]
        # In a session of its own: a Ctrl-C here must not end the robot that we talk to.
        options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self.process = subprocess.Popen(command, **options)
        assert self.process.stdout.readline() == "READY\n"

    def reflex(self):
        self.process.send_signal(signal.SIGUSR1)

    def silence(self, seconds):
        self.process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self.process.send_signal, [signal.SIGCONT]).start()

    def history(self, begin=0.0, end=np.inf):
        """(N, 6): wall clock, simulated time, tool's xyz, hand's width."""
        h = np.fromfile(self.path).reshape(-1, 6)
        return h[(h[:, 0] >= begin) & (h[:, 0] <= end)]

    def in_real_time(self, begin, end):
        """history(); too busy a machine cannot tell of real time."""
        h = self.history(begin, end)
        factor = np.ptp(h[:, 1]) / (end - begin) if len(h) else 0.0
        if factor < 0.5:
            pytest.skip(f"the simulator runs at {factor:.2f} of real time: the machine is too busy")
        return h

    def travel(self, begin, end=None):
        """The longest distance (m) between two places of the tool in a time of the wall clock."""
        p = self.in_real_time(begin, end or time.time())[:, 2:5]
        return float(np.linalg.norm(p.max(0) - p.min(0)))

    def comes_to_rest(self, since=None, within=1.5):
        """Seconds from `since` (wall clock; now) until the tool stays within 2 mm for good."""
        since = since or time.time()
        time.sleep(within)
        h = self.in_real_time(since - 0.5, time.time())
        away = np.linalg.norm(h[:, 2:5] - h[-1, 2:5], axis=1) > 0.002
        assert (h[:, 0] < since + within - 0.5).any()
        return float(h[away, 0].max(initial=since) - since)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    if not SECONDS:
        pytest.skip("real time, which a busy machine cannot give: make robot-test")
    for name in ("franky", "franky_sim"):
        pytest.importorskip(name, reason=f"{name} is not installed: make robot")
    robot = Simulated(f"127.0.{os.getpid() % 200 + 1}.7", tmp_path_factory.mktemp("franka"))
    yield robot
    robot.process.kill()
    robot.process.wait()


@pytest.fixture
def env(simulated, film, tmp_path, request):
    c = dataclasses.replace(C, host=simulated.host, realtime=False, static=film, gripper=film,
                            dynamics=0.3, **getattr(request, "param", {}))  # fmt: skip
    with open(tmp_path / "log.jsonl", "w") as log:
        env = environment(c, R.Arm(c), log=log)
        env.reset()
        yield env
        env.close()


def events(env, *kinds) -> list[dict]:
    """What is in the log, of these kinds if there are any."""
    log = [json.loads(line) for line in Path(env.log.name).read_text().splitlines()]
    return [x for x in log if not kinds or x["event"] in kinds]


def to_and_fro(i) -> np.ndarray:
    return act(0, 0.6 if i // 15 % 2 == 0 else -0.6)


def drive(env, steps, policy=to_and_fro):
    for i in range(steps):
        env.step(policy(i))


def report(request, text):
    """Figures for docs/robot.md: shown by pytest -s."""
    print(f"\n[{request.node.name}] {text}")


@pytest.mark.parametrize("env", [{}, {"control": "pose"}], indirect=True, ids=["impedance", "pose"])
def test_a_policy_runs_at_15_hz(env, simulated, request):
    """The published policy's time, its hand, and a motion to and fro at 0.18 m/s: it is lost here,
    and would lean on a side of the box, or turn until a joint's limit stops it."""
    import train

    policy = train.load_agent(HERE.parent / "assets/sim.pt")[0]
    obs, times, errors, began = env.get_obs(), [], [], time.time()
    for tick in range(int(15 * SECONDS)):
        action = policy.act(obs, np.zeros(384, np.float32))
        action[:6] = to_and_fro(tick)[:6]
        obs, _, _, _ = env.step(action)
        times.append(env.state.time)
        errors.append(1000 * np.linalg.norm(env.state.M[:3, 3] - env.T[:3, 3]))
    period, wall = 1000 * np.diff(times), time.time() - began
    report(request, f"{1000 / period.mean():.3f} Hz by the arm's clock ({len(times)} ticks, "
           f"{times[-1] - times[0]:.0f} s, real-time factor {SECONDS / wall:.2f}); period std "
           f"{period.std():.2f}, 99 % {np.percentile(period, 99):.1f}, max {period.max():.1f} ms; "
           f"tracking error mean {np.mean(errors):.1f}, 95 % {np.percentile(errors, 95):.1f}, max "
           f"{max(errors):.1f} mm; recoveries {env.recoveries}")  # fmt: skip
    assert len(events(env, "tick")) == len(times) and env.recoveries <= 2
    p = simulated.history(began)[:, 2:5]  # from the simulator's side
    assert (p > np.array(C.box_low) - 0.03).all() and (p < np.array(C.box_high) + 0.03).all()
    assert np.linalg.norm(p.max(0) - p.min(0)) > 0.02  # it did move
    simulated.in_real_time(began, time.time())  # or the rate says nothing
    assert abs(1000 / period.mean() - 15) < 0.2


def frozen(env, name, seconds=None):
    """From now on a camera gives its last picture again and again, for some time."""
    camera = env.cameras[name]
    live, still = camera.grab, camera.frame
    camera.grab = lambda: time.sleep(0.03) or still
    if seconds:
        threading.Timer(seconds, setattr, (camera, "grab", live)).start()


def unplugged(env, name):
    def unplug():
        raise OSError("device removed")

    env.cameras[name].grab = unplug


FAULTS = {  # name: what happens, how it begins and ends in the log, words of how it begins
    "camera frozen": (lambda e, s: frozen(e, "rgb_static", 2.0), "hold resumed", "rgb_static"),
    "arm's state stale": (lambda e, s: s.silence(0.6), "hold resumed", "state is"),
    "silent for 2.5 s": (lambda e, s: s.silence(2.5), "error recovered", "Network"),
    "pre-empted": (lambda e, s: e.arm.robot.stop(), "error recovered", "error"),
    "reflex": (lambda e, s: s.reflex(), "error recovered", "cartesian_reflex"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("env", [{"patience": 8.0}], indirect=True)
def test_after_a_fault_that_passes_the_arm_goes_on_and_nothing_jumps(
    env, simulated, fault, request
):
    happens, kinds, words = FAULTS[fault]
    drive(env, 20)
    when = time.time()
    happens(env, simulated)
    drive(env, 40)
    log = events(env, *kinds.split(), "stopped")
    assert " ".join(e["event"] for e in log) == kinds and words in json.dumps(log[0])
    assert env.recoveries == kinds.count("recovered")
    noticed, back = (e["wall"] - when for e in log)
    report(request, f"noticed after {noticed:.2f} s, goes on after {back:.2f} s")
    assert simulated.travel(log[1]["wall"]) > 0.02
    h = simulated.history(when)
    assert np.linalg.norm(np.diff(h[:, 2:5], axis=0), axis=1).max() < 0.006  # m in 10 ms
    if kinds == "error recovered":
        at = h[np.argmin(np.abs(h[:, 0] - log[1]["wall"])), 2:5]
        np.testing.assert_allclose(log[1]["measured"], at, atol=0.01)
    if fault == "silent for 2.5 s":
        assert back > 2.4
    if fault == "camera frozen":
        assert noticed < 0.8 and simulated.travel(when + 1.2, when + 1.9) < 0.002


ENDINGS = {  # name: what happens before each step, perhaps its action; the reason; recoveries
    "camera frozen": (lambda e, s, i: frozen(e, "rgb_gripper"), r"rgb_gripper is .* old", 0),
    "camera unplugged": (lambda e, s, i: unplugged(e, "rgb_static"), "device removed", 0),
    "silent for 4.5 s": (lambda e, s, i: s.silence(4.5), r"Network.*s to recover", 1),
    "reflexes": (lambda e, s, i: s.reflex() if i % 15 == 5 else None, "Reflex", 3),
    "abort": (lambda e, s, i: e.keys.append("a"), "abort", 0),
    "repeat": (lambda e, s, i: e.keys.append("r"), "repeat", 0),
    "failed": (lambda e, s, i: e.keys.append("f"), "failed", 0),
    "not finite": (lambda e, s, i: act(np.nan), "finite", 0),
    "slow policy": (lambda e, s, i: time.sleep(0.5), "ticks were late", 0),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_cannot_go_on_ends_with_its_reason_and_the_arm_at_rest(
    env, simulated, ending, request
):
    happens, reason, recoveries = ENDINGS[ending]
    drive(env, 20)
    with pytest.raises(R.Stopped, match=reason):
        for i in range(60):
            action = happens(env, simulated, i)
            env.step(to_and_fro(i) if action is None else action)
    assert events(env)[-1]["event"] == "stopped" and env.recoveries == recoveries
    rest = simulated.comes_to_rest()
    report(request, f"at rest {rest:.2f} s after Stopped")
    assert rest < 0.5


def test_ctrl_c_brings_the_arm_to_rest_and_keeps_the_log(env, simulated, request):
    began = time.time()
    drive(env, 20)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        drive(env, 20)
    stop = events(env, "stopping")[0]
    rest = simulated.comes_to_rest(stop["wall"], 2.0)
    report(request, f"at rest {rest:.2f} s after Ctrl-C")
    assert stop["reason"] == "Ctrl-C" and rest < 1.0
    assert len(events(env, "tick")) == 20 and events(env)[-1]["event"] == "stopped"
    assert simulated.travel(began, stop["wall"]) > 0.02


def test_huge_actions_are_clamped(env, simulated):
    when = time.time()
    drive(env, 10, policy=lambda i: act(0, 1e12 * (-1) ** (i // 5)))
    h = simulated.history(when)[::5]
    speed = np.linalg.norm(np.diff(h[:, 2:5], axis=0), axis=1) / np.diff(h[:, 1])
    assert 0.02 < speed.max() < 0.6  # m/s, by the simulator


def test_a_dry_run_moves_nothing(env, simulated):
    env.arm.stop()
    env.dry_run = True
    time.sleep(1)
    when = time.time()
    env.reset()
    drive(env, 10)  # on the way out, until the leash holds the target
    assert np.abs(env.T[:3, 3] - env.state.M[:3, 3]).max() > 0.02  # it would have gone there
    assert simulated.travel(when) < 0.001


def test_the_hand_follows_the_sign_of_the_action(env, simulated):
    drive(env, 45, policy=lambda i: -0.7 * act())
    assert simulated.history()[-1, 5] < 0.01
    assert env.get_obs()["robot_obs"][14] == -1 and env.get_obs()["robot_obs"][6] < 0.01
    drive(env, 45, policy=lambda i: 0.7 * act())
    assert simulated.history()[-1, 5] > 0.07


def test_a_wrong_address_is_an_error_and_what_is_waited_for_is_told(capsys):
    pytest.importorskip("franky", reason="franky-control is not installed")
    with pytest.raises(R.RobotError, match=r"no arm at 127.9.9.9"):
        R.Arm(dataclasses.replace(C, host="127.9.9.9", realtime=False))
    assert "waiting for the arm at 127.9.9.9" in capsys.readouterr().out


@pytest.mark.skipif(os.path.exists("/sys/kernel/realtime"), reason="a real-time kernel")
def test_without_a_real_time_kernel_the_error_names_the_simulators_setting(simulated):
    with pytest.raises(R.RobotError, match='"realtime": false'):
        R.Arm(dataclasses.replace(C, host=simulated.host))
