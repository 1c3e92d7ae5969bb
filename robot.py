"""The real robot: a Franka arm and two cameras behind the simulators' interface. LUMOS Sec. V-B.

    symbol  code    shape   meaning
    a_t     action  (7,)    relative xyz, relative euler xyz, gripper (-1 close, 1 open)     App. D
            T       (4, 4)  the commanded pose of the tool in the base frame: actions move this one
            M       (4, 4)  the measured pose; T never leads it by more than the leash
            q       (7,)    measured joint angles, rad

    camera  ....o....o....o....o....o....o    a thread per camera keeps the newest frame
    tick    |         |         |             15 Hz: state and frames are read, then logged
    policy  |~~~~a_0  |~~~~a_1  |~~~~a_2      its time is part of the tick
    target       *---------*---------*---     safe_target(a_t) is sent, the arm's own 1 kHz follows

Every command passes `safe_target`, a pure function. `RealEnv` has the watchdogs: they hold the last
target, recover where that is safe, or bring the arm to rest and raise Stopped. None of it replaces
the hardware's emergency stop, which stays in the operator's hand. deploy.py is the command line.

Copy this file alone. Needs: numpy, scipy, pydantic; franky-control for the arm,
opencv-python-headless or pyrealsense2 for cameras (each is imported where it is used).
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from scipy.spatial.transform import RigidTransform, Rotation

# The intersection of Panda's (FER) and FR3's joint limits, rad.
Q_LOW = np.array([-2.7437, -1.7628, -2.8973, -3.0421, -2.8065, 0.5445, -2.8973])
Q_HIGH = np.array([2.7437, 1.7628, 2.8973, -0.1518, 2.8065, 3.7525, 2.8973])
# Modified Denavit-Hartenberg parameters of both arms up to the flange: a (m), d (m), alpha (rad).
DH = ((0, 0.333, 0), (0, 0, -np.pi / 2), (0, 0.316, np.pi / 2), (0.0825, 0, np.pi / 2))
DH += ((-0.0825, 0.384, -np.pi / 2), (0, 0, np.pi / 2), (0.088, 0, np.pi / 2), (0, 0.107, 0))

ENDS = {"f": "failed", "a": "abort", "r": "repeat"}  # the operator's keys that end a rollout


class RobotError(Exception):
    """A set-up that cannot be used, or a device that fails: what is wrong and what to do."""


class Unsafe(RobotError):
    """A command or a state that must not be acted on, with the reason."""


class Stopped(Exception):
    """The rollout has ended early and the arm is at rest: abort, repeat, failed, or a fault."""


# ---------------------------------------------------------------------------- configuration
def between(low: float, high: float, kind: type = float):
    """The type of a field: a finite number from low to high."""
    return Annotated[kind, Field(ge=low, le=high)]


Metres, Pixel, Angle = between(-1.2, 1.2), between(0, 8192, int), between(-3.8, 3.8)
Point, Crop = tuple[(Metres,) * 3], tuple[(Pixel,) * 4]
Poses = Annotated[tuple[tuple[(Angle,) * 7], ...], Field(min_length=1)]
Driver = Annotated[str, Field(pattern="^(opencv|realsense):")]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class RobotConfig:
    """Sec. V-B, App. D and E; what the paper does not say is after the public deployments of its
    lab. SETUP.json names the fields that differ; the types are the ranges that are accepted."""

    host: Annotated[str, Field(min_length=1)] = "172.16.0.2"  # the arm's FCI address
    realtime: bool = True  # demand a real-time kernel; false for simulators only
    static: Driver = "opencv:0"  # opencv:NUMBER, opencv:FILE, realsense:SERIAL, realsense:FILE
    gripper: Driver = "realsense:"  # App. E: a D435 at the gripper
    static_crop: Crop | None = None  # top, bottom, left, right in pixels; None: centred square
    gripper_crop: Crop | None = None
    recorded_size: between(64, 1024, int) = 200  # App. E: pixels, both cameras
    policy_size: between(16, 512, int) = 64  # App. E
    hz: between(1, 60, int) = 15  # App. E
    record_hz: between(1, 60, int) = 30  # App. E: thinned to hz
    action_scale: tuple[between(1e-4, 0.1), between(1e-4, 0.5)] = (0.02, 0.05)  # m, rad: App. D
    frame: Literal["base", "tool"] = "base"  # of relative actions: base is App. D's
    control: Literal["impedance", "pose"] = "impedance"
    stiffness: tuple[between(10, 3000), between(1, 300)] = (1000.0, 100.0)  # N/m, Nm/rad
    dynamics: between(0.01, 1) = 0.2  # share of the arm's speed limits, homing and pose control
    box_low: Point = (0.30, -0.40, 0.02)  # m: where the tool may be, base frame
    box_high: Point = (0.70, 0.40, 0.60)
    box_slack: between(0, 0.1) = 0.03  # m: the measured tool may be this far outside
    max_speed: between(0.01, 1) = 0.4  # m/s of the target
    max_turn: between(0.01, 2) = 1.2  # rad/s of the target
    leash: tuple[between(0.005, 0.15), between(0.01, 0.6)] = (0.05, 0.3)  # m, rad: T ahead of M
    max_tilt: between(0.05, 1.5) = 1.0  # rad between the tool's axis and straight down
    joint_margin: between(0.02, 0.5) = 0.1  # rad to a joint's limit
    dead_band: between(0, 0.5) = 0.05  # the gripper keeps what it does where |a_7| is less
    max_frame_age: between(0.05, 2) = 0.25  # s
    max_state_age: between(0.05, 2) = 0.15  # s
    max_misses: between(1, 15, int) = 5  # late ticks among the last 15
    patience: between(0.02, 30) = 3.0  # s that a hold, or waiting for the hand, may last
    max_recoveries: between(0, 10, int) = 2  # in a rollout
    neutral: Poses = (  # Sec. V-B: "various neutral starting positions", joint angles
        (0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.785),
        (0.25, -0.25, 0.0, -2.25, 0.0, 2.0, 1.035),
        (-0.25, -0.25, 0.0, -2.25, 0.0, 2.0, 0.535),
        (0.0, -0.1, 0.0, -2.2, 0.0, 2.1, 0.785),
        (0.15, -0.35, 0.0, -2.3, 0.0, 1.95, 0.935),
    )

    @model_validator(mode="after")
    def _fields_agree(self):
        if (np.array(self.box_low) >= self.box_high).any():
            raise ValueError("box_low is not below box_high")
        if self.record_hz % self.hz:
            raise ValueError("record_hz is no multiple of hz")
        if self.box_slack > self.leash[0]:
            raise ValueError("box_slack is longer than the leash")
        if (self.neutral < Q_LOW).any() or (self.neutral > Q_HIGH).any():
            raise ValueError("neutral is beyond a joint's limit")
        return self


def load_config(path) -> RobotConfig:
    """SETUP.json -> RobotConfig. RobotError names a field that is unknown or out of its range."""
    try:
        return TypeAdapter(RobotConfig).validate_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise RobotError(f"{path}: {error}\nGive an object of RobotConfig's fields.") from error


def recording(c: RobotConfig) -> RobotConfig:
    """The same set-up at record_hz: smaller steps, the same speeds."""
    scale = tuple(s * c.hz / c.record_hz for s in c.action_scale)
    return dataclasses.replace(c, hz=c.record_hz, action_scale=scale)


# ---------------------------------------------------------------------------- geometry
def flange(q) -> np.ndarray:
    """Joint angles (7,) -> the flange's pose (4, 4) in the base frame."""
    p, R = np.zeros(3), Rotation.identity()
    for (a, d, alpha), angle in zip(DH, [*q, 0.0], strict=True):
        R = R * Rotation.from_euler("x", alpha)
        p, R = p + R.apply([a, 0, d]), R * Rotation.from_euler("z", angle)
    return RigidTransform.from_components(p, R).as_matrix()


def tilt(R: Rotation) -> float:
    """Angle between the tool's axis (its z) and straight down, rad."""
    return float(np.arccos(np.clip(-R.apply([0, 0, 1])[2], -1, 1)))


def share_within(start, end, centre, radius: float) -> float:
    """The largest s in [0, 1] with start + s (end - start) within radius of centre, else 0."""
    d, f = end - start, start - centre
    a, b, c = d @ d, d @ f, f @ f - radius**2
    if a < 1e-18 or c > 1e-9:
        return 0.0
    return float(np.clip((-b + np.sqrt(max(b * b - a * c, 0))) / a, 0, 1))


# ---------------------------------------------------------------------------- safety
def numbers(what: str, x, shape: tuple) -> np.ndarray:
    """x as floats. Unsafe: it is not an array of finite real numbers in that shape."""
    try:
        out = np.asarray(x)
        if out.dtype.kind not in "iuf" or out.shape != shape or not np.isfinite(out).all():
            raise ValueError(f"{x!r:.300}")
        return out.astype(float)
    except Exception as error:  # whatever x is: a list of unequal rows, a tensor with a gradient
        raise Unsafe(f"{what} is not {shape} finite real numbers: {error}") from error


def pose(what: str, x) -> tuple[np.ndarray, Rotation]:
    """x (4, 4) -> position (3,) and rotation. Unsafe: it is no pose."""
    T = numbers(what, x, (4, 4))
    R = np.clip(T[:3, :3], -2, 2)
    skew = np.abs(R.T @ R - np.eye(3)).max()
    if skew > 1e-3 or np.linalg.det(R) < 0 or any(T[3] != [0, 0, 0, 1]):
        raise Unsafe(f"{what} is no pose: {T.tolist()}")
    return T[:3, 3], Rotation.from_matrix(R)


def check_state(c: RobotConfig, M, q, boxed: bool = True) -> tuple[np.ndarray, Rotation]:
    """The measured position and rotation. Unsafe: no motion may start from this state or go on
    in it. boxed: a tool outside the box is unsafe, too."""
    (m, R), q = pose("the measured pose", M), numbers("the joints' state", q, (7,))
    margin = np.minimum(q - Q_LOW, Q_HIGH - q)
    j = int(margin.argmin())
    if margin[j] < c.joint_margin:
        raise Unsafe(f"joint {j + 1} at {q[j]:.2f} rad is {margin[j]:.2f} rad from its limit")
    if boxed and np.linalg.norm(np.clip(m, c.box_low, c.box_high) - m) > c.box_slack:
        raise Unsafe(f"the tool at {m.round(3)} m is outside the box {c.box_low} to {c.box_high}")
    if tilt(R) > c.max_tilt + c.leash[1]:
        raise Unsafe(f"the tool is tilted by {tilt(R):.2f} rad")
    return m, R


def safe_target(c: RobotConfig, T, action, M, q) -> tuple[np.ndarray, list[str]]:
    """Commanded pose T and an action -> the next commanded pose (4, 4), and what was limited.

    T, M (4, 4); action, q (7,). What goes out is finite, in the box, no more tilted than max_tilt
    and on the leash to M; it is a clamped, speed-limited step from T, or from where the leash
    pulled T back to. That retreat ignores the speed limit: it is as far as the arm itself was
    moved, and a target left behind would pull with more force. Unsafe: there is no such pose, or
    an input is no action, pose or joint state.
    """
    a, (p, R) = numbers("the action", action, (7,)), pose("the commanded pose", T)
    m, R_m = check_state(c, M, q)
    notes = ["clamped"] if np.abs(a[:6]).max() > 1 else []
    a = np.clip(a, -1, 1)

    def limited(v, longest: float, note: str):
        length = np.linalg.norm(v)
        if length > longest:
            notes.append(note)
        return v * longest / length if length > longest else v

    # A leash that has become too long (the arm was pushed, or is blocked) pulls the target back.
    inside = np.clip(m, c.box_low, c.box_high)  # in the box, on the leash: to fall back on
    p = np.clip(p, c.box_low, c.box_high)
    if np.linalg.norm(p - m) > c.leash[0] + 1e-9:
        p = inside + share_within(inside, p, m, c.leash[0]) * (p - inside)
        notes.append("pulled back")
    lead = (R * R_m.inv()).as_rotvec()
    R = Rotation.from_rotvec(limited(lead, c.leash[1], "turned back")) * R_m

    # The step: positions slide along the box's walls and end on the leash.
    d, dR = a[:3] * c.action_scale[0], Rotation.from_euler("xyz", a[3:6] * c.action_scale[1])
    if c.frame == "tool":
        d, dR = R.apply(d), R * dR * R.inv()
    step = p + limited(d, c.max_speed / c.hz, "speed")
    goal = np.clip(step, c.box_low, c.box_high)
    if not np.array_equal(goal, step):
        notes.append("box")
    if np.linalg.norm(goal - m) > c.leash[0]:
        goal = p + share_within(p, goal, m, c.leash[0]) * (goal - p)
        notes.append("leash")
    w = limited(dR.as_rotvec(), c.max_turn / c.hz, "turn")

    # Rotations are composed [D21]. They are not convex: all of the step, else a part, else none.
    for share in (1.0, 0.5, 0.25, 0.0):
        R_goal = Rotation.from_rotvec(share * w) * R
        lead = (R_goal * R_m.inv()).magnitude()
        if tilt(R_goal) <= c.max_tilt and lead <= c.leash[1] + 1e-9:
            break
    else:
        raise Unsafe(f"the tool is tilted by {tilt(R):.2f} rad, {c.max_tilt} are allowed")
    if share < 1:
        notes.append("tilt")
    goal = np.clip(goal, c.box_low, c.box_high)  # rounding may have left it just outside
    return RigidTransform.from_components(goal, R_goal).as_matrix(), notes


def check_homing(c: RobotConfig, q, goal, F_T_EE) -> None:
    """Unsafe: a straight line in joint space from q to goal, (7,) each, that the arm may not take.
    F_T_EE (4, 4): the tool in the flange's frame."""
    q, goal = numbers("the joints' state", q, (7,)), numbers("the goal", goal, (7,))
    check_state(c, flange(goal) @ F_T_EE, goal)
    for s in np.linspace(0, 1, 25):
        z = (flange((1 - s) * q + s * goal) @ F_T_EE)[2, 3]
        if z < c.box_low[2] - c.box_slack:
            raise Unsafe(f"on the way the tool would sink to {z:.3f} m: raise it by hand first")


def gripper_command(c: RobotConfig, a: float, last: float) -> float:
    """App. D: above 0 opens (1), else closes (-1); near 0 it keeps what it does [D2]."""
    return last if abs(a) < c.dead_band else (1.0 if a > 0 else -1.0)


# ---------------------------------------------------------------------------- cameras
def driver(module: str, package: str):
    """An optional library. RobotError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RobotError(f"{error}: pip install {package} (docs/robot.md)") from error


def resize_area(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3) by area averaging; a copy of data.py's."""
    weights = []
    for n in image.shape[:2]:  # (size, n): pixel i averages [i n/size, (i+1) n/size)
        edge, pixel = np.arange(size + 1)[:, None] * n / size, np.arange(n)
        overlap = np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel)
        weights.append((np.maximum(overlap, 0) * size / n).astype(np.float32))
    x = weights[0] @ image.reshape(len(image), -1).astype(np.float32)
    return np.rint(weights[1] @ x.reshape(size, -1, 3)).astype(np.uint8)


def open_opencv(name: str):
    """NUMBER of a camera, or FILE, a film, which plays at its own pace, again and again."""
    cv2 = driver("cv2", "opencv-python-headless")
    device = cv2.VideoCapture(int(name) if name.isdigit() else name)
    if not device.isOpened():
        raise RobotError("no such camera or film")
    device.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    pause = 1 / (device.get(cv2.CAP_PROP_FPS) or 30) if os.path.isfile(name) else 0

    def grab():
        ok, frame = device.read()
        if not ok and pause:  # a film's end
            device.set(cv2.CAP_PROP_POS_FRAMES, 0)
            ok, frame = device.read()
        if not ok:
            raise RobotError("no more frames")
        time.sleep(pause)
        return frame[..., ::-1]  # OpenCV's order is BGR

    return grab, device.release


def open_realsense(name: str):
    """SERIAL number of a camera ("": any), or FILE, a recording, which repeats."""
    rs = driver("pyrealsense2", "pyrealsense2, apt install libusb-1.0-0")
    pipe, config = rs.pipeline(), rs.config()
    if os.path.isfile(name):
        config.enable_device_from_file(name, True)
    else:
        config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
        if name:
            config.enable_device(name)
    pipe.start(config)

    def grab():
        return np.array(pipe.wait_for_frames(2000).get_color_frame().get_data())

    return grab, pipe.stop


class Camera:
    """One camera and its thread, which keeps the newest frame only, cropped and shrunk.

    box: what of `frame`, the whole picture, is kept: top, bottom, left, right."""

    def __init__(self, spec: str, crop, size: int):
        self.spec, self.crop, self.size, self.error = spec, crop, size, None
        self.newest, self.frame, self.box, self.running = (None, 0.0), None, None, True
        kind, _, name = spec.partition(":")
        open_driver = {"opencv": open_opencv, "realsense": open_realsense}[kind]
        try:  # grab() -> rgb uint8 (H, W, 3), blocking
            self.grab, self.release = open_driver(name)
        except (RuntimeError, RobotError) as error:
            raise RobotError(f"camera {spec}: {error}. Its cable in, at a USB 3 port?") from error
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            while self.running:
                frame, now = self.grab(), time.monotonic()
                # A driver may repeat its last picture for ever. No two of a live camera are equal.
                if not np.array_equal(frame, self.frame):
                    self.newest = (self._cut(frame), now)
                self.frame = frame
        except Exception as error:  # told by read(), in the control loop
            self.error = error

    def _cut(self, frame):
        H, W, _ = frame.shape
        n = min(H, W)
        y, x = (H - n) // 2, (W - n) // 2
        self.box = top, bottom, left, right = self.crop or (y, y + n, x, x + n)
        if bottom > H or right > W or min(bottom - top, right - left) < self.size:
            what = f"the crop {self.crop} must lie inside {W} x {H} pixels"
            raise RobotError(f"{what} and have {self.size} or more each way")
        return resize_area(frame[top:bottom, left:right], self.size)

    def read(self) -> tuple[np.ndarray, float]:
        """The newest frame, uint8 (size, size, 3), and when it came (time.monotonic, s)."""
        deadline = time.monotonic() + 5
        while self.newest[0] is None and not self.error and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.error or self.newest[0] is None:
            raise RobotError(f"camera {self.spec}: {self.error or 'no frame within 5 s'}")
        return self.newest

    def close(self):
        self.running = False
        self.thread.join(3)
        self.release()


# ---------------------------------------------------------------------------- arm
class ArmState(NamedTuple):
    M: np.ndarray  # (4, 4) measured pose
    q: np.ndarray  # (7,) rad
    time: float  # the arm's own clock, s
    mode: str  # libfranka's, with what is wrong
    F_T_EE: np.ndarray  # (4, 4) the tool in the flange's frame


class Arm:
    """Panda (FER) or FR3 and its hand, through franky. Every method may raise one of `errors`."""

    def __init__(self, c: RobotConfig):
        f = driver("franky", "franky-control")
        self.c, self.franky, self.tracker, self.width, self.running = c, f, None, 0.0, True
        # A planner's failure is a plain RuntimeError, and two are not franky.Exceptions.
        self.errors = (f.Exception, f.InvalidMotionTypeException, f.GripperException, RuntimeError)
        self.lost = f.NetworkException
        self.connect()
        self.thread = threading.Thread(target=self._watch_hand, daemon=True)
        self.thread.start()

    def connect(self):
        f, c, self.grip_job = self.franky, self.c, None
        want = f.RealtimeConfig.Enforce if c.realtime else f.RealtimeConfig.Ignore
        # No probe of the port before: an arm has one client at a time, and that would be the probe.
        print(f"waiting for the arm at {c.host}, up to a minute", flush=True)
        try:
            self.robot, self.hand = f.Robot(c.host, realtime_config=want), f.Gripper(c.host)
            self.width = float(self.hand.width)
        except self.errors as error:
            why = "Is it unlocked, FCI active, nobody else connected? A Panda needs another wheel "
            why += 'than an FR3, a simulated arm the set-up "realtime": false (docs/robot.md).'
            raise RobotError(f"no arm at {c.host}: {error} {why}") from error

    def _watch_hand(self):  # reading the width blocks until the hand reports, so not in the loop
        while self.running:
            with contextlib.suppress(*self.errors, AttributeError):  # its next command will tell
                self.width = float(self.hand.width)
            time.sleep(0.03)

    def state(self) -> ArmState:
        if self.robot is None:  # recover() could not connect; perhaps it can now
            self.connect()
        s = self.robot.state
        mode, errors = str(s.robot_mode).split(".")[-1], str(s.current_errors)
        mode += "" if errors == "[]" else f" {errors}"
        M, F_T_EE = np.array(s.O_T_EE.matrix, float), np.array(s.F_T_EE.matrix, float)
        return ArmState(M, np.array(s.q, float).ravel(), s.time.to_sec(), mode, F_T_EE)

    def enable(self):
        """Clear errors, and set every limit: the wheels' defaults differ."""
        r, x = self.robot, self.c.dynamics
        deadline = time.monotonic() + 2  # states from before the recovery may still be on their way
        if not r.recover_from_errors():
            while r.has_errors:
                if time.monotonic() > deadline:
                    raise RuntimeError("automatic error recovery failed")
                time.sleep(0.05)
        r.relative_dynamics_factor = self.franky.RelativeDynamicsFactor(x, x, x)
        r.translation_velocity_limit.set(1.0)  # m/s
        r.rotation_velocity_limit.set(2.0)  # rad/s
        r.set_collision_behavior([20.0] * 7, [25.0] * 7, [20.0] * 6, [30.0] * 6)  # Nm, N

    def home(self, q, check):
        """To joint angles q (7,), at `dynamics` of full speed; `check()` may raise on the way."""
        self.stop()
        self.enable()
        self.robot.move(self.franky.JointMotion([float(x) for x in q]), asynchronous=True)
        while not self.robot.join_motion(0.02):  # poll_motion says "no motion" before it began
            check()

    def send(self, T):
        """Absolute target (4, 4); returns at once. Relative motions lose some when streamed."""
        f, c, target = self.franky, self.c, self.franky.Affine(T)
        if c.control == "pose":  # holds where a new target fails to come
            absolute = f.ReferenceType.Absolute
            motion = f.CartesianMotion(target, absolute, return_when_finished=False)
            self.robot.move(motion, asynchronous=True)
            return
        if self.tracker is None:
            how = {"lower_joint_limits": Q_LOW, "upper_joint_limits": Q_HIGH}
            how["translational_stiffness"], how["rotational_stiffness"] = c.stiffness
            how["translational_error_clip"] = [c.leash[0]] * 3  # bounds the spring's force
            how["posture_task"] = f.PostureTask(list(c.neutral[0]), stiffness=10.0)
            self.tracker = f.CartesianImpedanceTracker(self.robot, **how)
        self.robot.poll_motion()  # raises what went wrong meanwhile; set_target never does
        self.tracker.set_target(target)

    def grip(self, opened: bool) -> bool:
        """Open or close; returns at once. False: the hand is still busy, ask again."""
        if self.grip_job is not None and not self.grip_job.wait(0.0):
            return False
        if opened:
            self.grip_job = self.hand.open_async(0.1)  # m/s
        else:  # width 0 m, 0.1 m/s, 20 N; it may end at any width
            wide = {"epsilon_inner": 0.1, "epsilon_outer": 0.1}
            self.grip_job = self.hand.grasp_async(0.0, 0.1, 20.0, **wide)
        return True

    def stop(self):
        """Bring the arm to rest. It then holds by itself."""
        f, tracker, self.tracker = self.franky, self.tracker, None
        if tracker is not None:
            tracker.stop()  # ramps the torques down
        elif self.robot is not None and self.robot.is_in_control:
            joints = self.robot.current_control_signal_type == f.ControlSignalType.JointPositions
            motion = f.JointStopMotion() if joints else f.CartesianStopMotion()
            self.robot.move(motion, asynchronous=True)
            self.robot.join_motion(2.0)

    def recover(self, error):
        """After an error: the arm at rest and ready for motions. Raises where that fails."""
        self.tracker = None
        if isinstance(error, self.lost):
            self.robot = self.hand = None  # a Robot whose connection died never works again
            self.connect()
        with contextlib.suppress(*self.errors):
            self.robot.join_motion(1.0)  # takes the stored exception away
        self.stop()
        self.enable()
        last, deadline = np.full(3, np.inf), time.monotonic() + 3
        while time.monotonic() < deadline:  # planning fails while the arm still moves
            p = self.state().M[:3, 3]
            if np.linalg.norm(p - last) < 2e-4:
                return
            last = p
            time.sleep(0.1)

    def close(self):
        self.running = False
        with contextlib.suppress(*self.errors):
            self.stop()
        self.thread.join(2)
        if self.grip_job is not None:  # it works on the hand: it must go first
            with contextlib.suppress(*self.errors):
                self.grip_job.wait(3.0)
        self.grip_job = self.hand = self.robot = None  # disconnects


# ---------------------------------------------------------------------------- environment
class RealEnv:
    """Arm and cameras behind the simulators' interface, at config.hz.

    arm, cameras: instead of the set-up's. key() -> a pressed key, or "". clock() -> what 15 Hz go
    by, s (a simulated arm's may be slow). The operator's keys in a rollout: s success, f failed,
    r repeat (invalid), a abort; others wait in `pressed` for who reads them.
    """

    def __init__(self, c, dry_run=False, arm=None, cameras=None, key=None, clock=time.monotonic):
        self.config, self.dry_run, self.key, self.clock = c, dry_run, key, clock
        self.cameras, self.log, self.handler, self.interrupted = cameras or {}, None, None, False
        self.arm, self.T, self.pressed, self.recoveries = arm or Arm(c), None, [], 0
        try:
            if not cameras:
                size = c.recorded_size
                self.cameras["rgb_static"] = Camera(c.static, c.static_crop, size)
                self.cameras["rgb_gripper"] = Camera(c.gripper, c.gripper_crop, size)
        except BaseException:
            self.close()  # a thread that reads the hand must not outlive this
            raise
        self.gripper = 1.0 if self.arm.width > 0.07 else -1.0  # what it does now; 0.08 m is open
        self.hand_asked, self.newest_state = None, (None, 0.0)
        self.misses = collections.deque(maxlen=15)
        if threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, *_):
        if self.interrupted:  # the second time at once, whatever is under way
            raise KeyboardInterrupt
        self.interrupted = True

    def close(self):
        """Arm at rest, cameras closed."""
        self.arm.close()  # stops only what it has started
        for camera in self.cameras.values():
            camera.close()
        if self.handler:
            signal.signal(signal.SIGINT, self.handler)

    def note(self, event: str, **values):
        """A line of the log, a JSONL file, on its way to the disk at once."""
        if self.log:
            entry = {"event": event, "wall": time.time()} | values
            self.log.write(json.dumps(entry, default=np.ndarray.tolist) + "\n")
            self.log.flush()

    def reset(self, robot_obs=None, scene_obs=None):
        """Home to the joint angles in robot_obs (15,) (None: neutral pose 0) and open the hand.
        scene_obs: the operator has set the scene. Returns the observation."""
        q = self.config.neutral[0] if robot_obs is None else robot_obs[7:14]
        self.recoveries, self.hand_asked = 0, None
        try:
            s = self.arm.state()
            check_homing(self.config, s.q, q, s.F_T_EE)
            self.note("home", q=np.asarray(q), dry_run=self.dry_run)
            if not self.dry_run:
                self.arm.home(q, self._watch)
            while not self._grip(1.0):
                self._watch()
                time.sleep(0.01)
        except self.arm.errors as error:
            self._recover(error, time.monotonic())  # so that the next attempt finds a ready arm
            self.stop(f"homing: {error}")
        except RobotError as error:
            self.stop(str(error))
        return self.resume()

    def resume(self):
        """Start, or go on after a pause, from where the arm is now. Returns the observation."""
        self.verdict, self.pressed = None, []
        obs = self.get_obs()
        self.T = self.state.M.copy()
        self._pace()
        return obs

    def step(self, action, render=True, guided=False):
        """One action (7,) and the wait for the next tick: observation, 0.0, False, info. Raises
        Stopped, with the arm at rest, or KeyboardInterrupt. render: for the simulators. guided: a
        person moves the arm; the commanded pose is the measured one; only the hand is commanded."""
        return self._guard(self._step, action, guided), 0.0, False, self.get_info()

    def get_obs(self):
        """What the cameras see and the arm feels now."""
        return self._guard(self._observe)

    def get_info(self):
        """The operator's verdict: None or "success"."""
        return {"operator": self.verdict}

    def _guard(self, work, *args):
        """Whatever goes wrong in a tick ends here: recovered, or the arm at rest and Stopped."""
        began = time.monotonic()
        try:
            return work(*args)
        except self.arm.errors as error:
            self._recover(error, began)
        except RobotError as error:
            self.stop(str(error))
        return self._guard(self._observe)

    def _watch(self):
        """Ctrl-C and the operator's keys."""
        if self.interrupted:
            with contextlib.suppress(Stopped):
                self.stop("Ctrl-C")
            raise KeyboardInterrupt
        key = self.key() if self.key else ""
        if key in ENDS:
            self.stop(ENDS[key])
        elif key == "s":
            self.verdict = "success"
        elif key:
            self.pressed.append(key)

    def stop(self, reason: str):
        """The arm to rest, the reason into the log, and out."""
        self.note("stopping", reason=reason)
        try:
            if not self.dry_run:
                self.arm.stop()
        except self.arm.errors as error:
            self.note("stop failed", error=str(error))
            print(f"WARNING: the arm did not confirm its stop: {error}", flush=True)
        self.note("stopped", reason=reason)
        raise Stopped(reason)

    def _recover(self, error, began: float):
        """Clears a reflex, a pre-emption, a lost connection, to go on from the measured pose,
        unless that lasted longer than `patience` since `began`."""
        self.recoveries += 1
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, self.arm.lost):
            with contextlib.suppress(*self.arm.errors):
                text += f" (mode {self.arm.state().mode})"
        self.note("error", error=text, count=self.recoveries)
        print(f"the arm reports {text}", flush=True)
        if self.dry_run or self.recoveries > self.config.max_recoveries:
            self.stop(text)
        try:
            self.arm.recover(error)
            s = self.arm.state()
        except (*self.arm.errors, RobotError) as again:
            self.stop(f"{text}; and then {again}")
        if s.mode.startswith(("UserStopped", "Guiding")):  # somebody's hand is on it
            self.stop(f"{text}; the arm is {s.mode}")
        lost = time.monotonic() - began
        if lost > self.config.patience:
            self.stop(f"{text}; it took {lost:.1f} s to recover")
        self.T = s.M.copy()
        self._pace()
        self.note("recovered", measured=s.M[:3, 3], q=s.q)

    def _pace(self):
        """The next tick is one period from now; what was late before does not count."""
        self.misses.clear()
        self.next_tick = self.clock() + 1 / self.config.hz

    def _grip(self, command: float) -> bool:
        """Open (1) or close (-1) the hand. False: it is still busy. RobotError: for too long."""
        now = time.monotonic()
        if self.dry_run or self.arm.grip(command > 0):
            self.gripper, self.hand_asked = command, None
            return True
        self.hand_asked = self.hand_asked or now
        if now - self.hand_asked > self.config.patience:
            raise RobotError("the hand has been busy for too long: is something stuck in it?")
        return False

    def frames(self) -> tuple[dict, dict]:
        """The newest picture of each camera, and its age (s)."""
        read = {k: camera.read() for k, camera in self.cameras.items()}
        now = time.monotonic()
        return {k: x for k, (x, _) in read.items()}, {k: now - t for k, (_, t) in read.items()}

    def _observe(self):
        """Fresh state and frames, as an observation. While something is stale the arm holds its
        last target; after `patience` the rollout ends."""
        c, began, held = self.config, time.monotonic(), False
        while True:
            self._watch()
            s, now = self.arm.state(), time.monotonic()
            if s.time != self.newest_state[0]:
                self.newest_state = (s.time, now)
            self.images, self.ages = self.frames()
            stale = [f"{k} is {t:.2f} s old" for k, t in self.ages.items() if t > c.max_frame_age]
            age = now - self.newest_state[1]
            if age > c.max_state_age:
                stale.append(f"the arm's state is {age:.2f} s old")
            if not stale:
                break
            if not held:
                self.note("hold", reason=stale)
            held = True
            if now - began > c.patience:
                self.stop("; ".join(stale))
            time.sleep(0.01)
        if held:
            self.note("resumed", after=now - began)
            self._pace()
        self.state, euler = s, Rotation.from_matrix(s.M[:3, :3]).as_euler("xyz")
        robot_obs = np.array([*s.M[:3, 3], *euler, self.arm.width, *s.q, self.gripper])
        rgb = {k: resize_area(x, c.policy_size) for k, x in self.images.items()}
        return {"rgb_obs": rgb, "robot_obs": robot_obs}

    def _step(self, action, guided):
        c, s = self.config, self.arm.state()
        if guided:
            check_state(c, s.M, s.q, boxed=False)
            self.T, notes = s.M.copy(), ["guided"]
        else:
            self.T, notes = safe_target(c, self.T, action, s.M, s.q)
            if not self.dry_run:
                self.arm.send(self.T)
        command = gripper_command(c, action[6], self.gripper)
        if command == self.gripper:
            self.hand_asked = None
        else:
            self._grip(command)
        late = self.clock() - self.next_tick
        self.misses.append(late > 0.5 / c.hz)
        if sum(self.misses) >= c.max_misses:
            count = f"{sum(self.misses)} of {len(self.misses)} ticks were late"
            self.stop(f"{count}, the last by {late:.3f} s: a faster policy or computer is needed")
        now, moved = self.clock(), time.monotonic()
        while now < self.next_tick and time.monotonic() - moved < c.max_state_age:
            self._watch()
            time.sleep(min(self.next_tick - now, 0.002))
            before, now = now, self.clock()
            moved = moved if now == before else time.monotonic()  # an arm's clock may stand still
        self.next_tick = max(self.next_tick + 1 / c.hz, now)  # after an overrun no burst
        obs, s = self._observe(), self.state
        tick = {"t": now, "late": late, "action": np.asarray(action), "target": self.T}
        tick |= {"measured": s.M, "q": s.q, "gripper": self.gripper, "ages": self.ages}
        self.note("tick", **tick, notes=notes)
        return obs
