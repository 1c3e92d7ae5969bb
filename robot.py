"""The real robot: a Franka arm and two cameras behind the simulator's interface. LUMOS Sec. V-B.

    symbol  code    shape   meaning
    a_t     action  (7,)    relative xyz, relative euler xyz, gripper (-1 close, 1 open)     App. D
            T       (4, 4)  the COMMANDED pose of the tool in the base frame: actions move this one
            M       (4, 4)  the measured pose; the commanded one is never further than the leash
            q       (7,)    measured joint angles, rad

    camera  ....o....o....o....o....o....o    every camera has a thread, the newest frame counts
    tick    |         |         |             15 Hz: state and frames are read, then logged
    policy  |~~~~a_0  |~~~~a_1  |~~~~a_2      its time is part of the tick
    target       *---------*---------*---     safe_target(a_t) is sent, the arm's own 1 kHz follows

Every command passes `safe_target`, a pure function. What the watchdogs do is in `RealEnv`: they
hold (no new target), recover where that is safe, else stop the arm and raise Stopped with the
reason; each tick is in the log before the next one starts. None of it replaces the hardware's
emergency stop, which stays in the operator's hand.

    python robot.py check  SETUP.json                    look at everything, move nothing
    python robot.py record SETUP.json DIR training       play by hand guiding, in CALVIN's format

Copy this file alone. Needs: numpy; franky-control for the arm, opencv-python-headless or
pyrealsense2 for cameras, imageio for the check's picture (each is imported where it is used).
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

CAMERAS = ("rgb_static", "rgb_gripper")
SHORTEST = 20  # frames of the shortest window (Table IV): shorter episodes are of no use
# The intersection of Panda's (FER) and FR3's joint limits, rad.
Q_LOW = np.array([-2.7437, -1.7628, -2.8973, -3.0421, -2.8065, 0.5445, -2.8973])
Q_HIGH = np.array([2.7437, 1.7628, 2.8973, -0.1518, 2.8065, 3.7525, 2.8973])
# Modified Denavit-Hartenberg parameters of both arms up to the flange: a (m), d (m), alpha (rad).
DH = ((0, 0.333, 0), (0, 0, -np.pi / 2), (0, 0.316, np.pi / 2), (0.0825, 0, np.pi / 2))
DH += ((-0.0825, 0.384, -np.pi / 2), (0, 0, np.pi / 2), (0.088, 0, np.pi / 2), (0, 0.107, 0))


class RobotError(Exception):
    """A set-up that cannot be used. The message says what is wrong and what to do."""


class Unsafe(Exception):
    """A command or a state that must not be acted on, with the reason."""


class Stopped(Exception):
    """The rollout has ended early and the arm is at rest. `reason`: abort, repeat, failed, or
    a fault's description."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class RobotConfig:
    """Sec. V-B, App. D and E; what the paper does not say is after the public deployments of its
    lab. SETUP.json names the fields that differ."""

    host: str = "172.16.0.2"  # the arm's FCI address
    realtime: bool = True  # demand a real-time kernel; false for simulators only
    static: str = "opencv:0"  # opencv:NUMBER, opencv:FILE, realsense:SERIAL, realsense:FILE
    gripper: str = "realsense:"  # App. E: a D435 at the gripper
    static_crop: tuple | None = None  # top, bottom, left, right in pixels; None: centred square
    gripper_crop: tuple | None = None
    recorded_size: int = 200  # App. E: pixels, both cameras
    policy_size: int = 64  # App. E
    hz: int = 15  # App. E
    record_hz: int = 30  # App. E: thinned to hz
    action_scale: tuple = (0.02, 0.05)  # m and rad per step at action 1 (App. D)
    frame: str = "base"  # of relative actions: base (App. D) or tool
    control: str = "impedance"  # or pose
    stiffness: tuple = (1000.0, 100.0)  # impedance, N/m and Nm/rad
    dynamics: float = 0.2  # share of the arm's speed limits, homing and pose control
    box_low: tuple = (0.30, -0.40, 0.02)  # m: where the tool may be, base frame
    box_high: tuple = (0.70, 0.40, 0.60)
    box_slack: float = 0.03  # m: the measured tool may be this far outside (it overshoots)
    max_speed: float = 0.4  # m/s of the target
    max_turn: float = 1.2  # rad/s of the target
    leash: tuple = (0.05, 0.3)  # m and rad: how far the target may lead the measured pose
    max_tilt: float = 1.0  # rad between the tool's axis and straight down
    joint_margin: float = 0.1  # rad to a joint's limit
    dead_band: float = 0.05  # the gripper keeps what it does where |a_7| is less
    max_frame_age: float = 0.25  # s
    max_state_age: float = 0.15  # s
    max_misses: int = 5  # late ticks among the last 15
    patience: float = 3.0  # s that a hold may last before the rollout ends
    max_recoveries: int = 2  # in a rollout
    neutral: tuple = (  # Sec. V-B: "various neutral starting positions", joint angles
        (0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.785),
        (0.25, -0.25, 0.0, -2.25, 0.0, 2.0, 1.035),
        (-0.25, -0.25, 0.0, -2.25, 0.0, 2.0, 0.535),
        (0.0, -0.1, 0.0, -2.2, 0.0, 2.1, 0.785),
        (0.15, -0.35, 0.0, -2.3, 0.0, 1.95, 0.935),
    )


def alike(x, like) -> bool:
    """x is of the kind of `like`, a field's default: as many numbers, all finite."""
    if isinstance(like, tuple):
        return isinstance(x, tuple) and len(x) == len(like) and all(map(alike, x, like))
    if isinstance(like, float):
        return type(x) in (int, float) and bool(np.isfinite(x))
    return type(x) is type(like)


def load_config(path) -> RobotConfig:
    """SETUP.json -> RobotConfig. RobotError: a field that does not exist, or is of another kind."""
    try:
        given = json.loads(Path(path).read_text())
        if not isinstance(given, dict):
            raise ValueError(f"it holds {given!r:.40}, not one object {{...}}")
    except (OSError, ValueError) as error:
        raise RobotError(f"{path}: {error}. Give a JSON file of RobotConfig's fields.") from error
    known = dataclasses.asdict(RobotConfig())
    for k, x in given.items():
        if k not in known:
            raise RobotError(f"{path}: no field is called {k}; they and their defaults: {known}")
        if isinstance(x, list):
            given[k] = x = tuple(tuple(v) if isinstance(v, list) else v for v in x)
        like = known[k]
        if k.endswith("_crop"):
            like = None if x is None else (0, 0, 0, 0)
        elif k == "neutral":  # one pose or more
            like = like[:1] * len(x) if x and isinstance(x, tuple) else like
        if not alike(x, like):
            raise RobotError(f"{path}: {k} = {x!r}, expected something like {like!r}")
    c = RobotConfig(**given)
    if c.frame not in ("base", "tool") or c.control not in ("impedance", "pose"):
        raise RobotError(f"{path}: frame is base or tool, control is impedance or pose")
    if (np.array(c.box_low) >= c.box_high).any():
        raise RobotError(f"{path}: box_low {c.box_low} is not below box_high {c.box_high}")
    for k in ("hz", "record_hz", "policy_size", "recorded_size", "action_scale"):
        if np.min(getattr(c, k)) <= 0:
            raise RobotError(f"{path}: {k} = {getattr(c, k)} must be above 0")
    if c.record_hz % c.hz:
        raise RobotError(f"{path}: record_hz {c.record_hz} is no multiple of hz {c.hz}")
    return c


def recording(c: RobotConfig) -> RobotConfig:
    """The same set-up at record_hz: smaller steps, the same speeds."""
    scale = tuple(s * c.hz / c.record_hz for s in c.action_scale)
    return dataclasses.replace(c, hz=c.record_hz, action_scale=scale)


# ------------------------------------------------------------------ geometry
def from_euler(e) -> np.ndarray:
    """Euler xyz (3,), fixed axes, rad -> rotation (3, 3) = Rz Ry Rx, as CALVIN (PyBullet) does."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(e), np.cos(e)
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ y @ x


def to_euler(R) -> np.ndarray:
    """The inverse: rotation (3, 3) -> (3,) rad."""
    pitch = np.arctan2(-R[2, 0], np.hypot(R[0, 0], R[1, 0]))
    return np.array([np.arctan2(R[2, 1], R[2, 2]), pitch, np.arctan2(R[1, 0], R[0, 0])])


def rotation_vector(R) -> np.ndarray:
    """Rotation (3, 3) -> axis times angle (3,), angle in [0, pi]."""
    v = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / 2
    sine, cosine = np.linalg.norm(v), (np.trace(R) - 1) / 2
    if sine > 1e-6:
        return v * np.arctan2(sine, cosine) / sine
    if cosine > 0:
        return v
    k = (R + np.eye(3))[:, np.argmax(np.diag(R))]  # half a turn: the axis is a column of R + 1
    return np.pi * k / np.linalg.norm(k)


def turn(w) -> np.ndarray:
    """Axis times angle (3,) -> rotation (3, 3)."""
    angle = np.linalg.norm(w)
    x, y, z = w / max(angle, 1e-12)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def flange(q) -> np.ndarray:
    """Joint angles (7,) -> the flange's pose (4, 4) in the base frame."""
    T = np.eye(4)
    for (a, d, alpha), angle in zip(DH, [*q, 0.0], strict=True):
        (s, c), (sa, ca) = (np.sin(angle), np.cos(angle)), (np.sin(alpha), np.cos(alpha))
        rows = [[c, -s, 0, a], [s * ca, c * ca, -sa, -d * sa], [s * sa, c * sa, ca, d * ca]]
        T = T @ [*rows, [0, 0, 0, 1]]
    return T


def tilt(R) -> float:
    """Angle between the tool's axis (its z) and straight down, rad."""
    return float(np.arccos(np.clip(-R[2, 2], -1, 1)))


def relative_action(c: RobotConfig, T, T_next, gripper: float) -> np.ndarray:
    """The action (7,) that moves commanded pose T to T_next: App. E's difference of commands. The
    arm's six may be beyond -1 and 1: what is recorded is clipped."""
    R, dp = T[:3, :3], T_next[:3, 3] - T[:3, 3]
    dR = T_next[:3, :3] @ R.T
    if c.frame == "tool":
        dp, dR = R.T @ dp, R.T @ T_next[:3, :3]
    arm = np.concatenate([dp / c.action_scale[0], to_euler(dR) / c.action_scale[1]])
    return np.append(arm, gripper)


# ------------------------------------------------------------------ safety
def reach(start, end, centre, radius: float) -> float:
    """The largest s in [0, 1] for which start + s (end - start) is no further than radius from
    centre; 0 where even start is."""
    d, f = end - start, start - centre
    a, b, c = d @ d, d @ f, f @ f - radius**2
    if a < 1e-18 or c > 1e-9:
        return 0.0
    return float(np.clip((-b + np.sqrt(max(b * b - a * c, 0))) / a, 0, 1))


def check_state(c: RobotConfig, M, q) -> None:
    """Unsafe: a state that no motion may start from or go on in."""
    if not (np.isfinite(M).all() and np.isfinite(q).all()):
        raise Unsafe("the arm reports numbers that are not finite")
    margin = np.minimum(q - Q_LOW, Q_HIGH - q)
    if margin.min() < c.joint_margin:
        j = int(margin.argmin())
        raise Unsafe(f"joint {j + 1} at {q[j]:.2f} rad is {margin[j]:.2f} rad from its limit")
    m = M[:3, 3]
    if np.linalg.norm(np.clip(m, c.box_low, c.box_high) - m) > c.box_slack:
        raise Unsafe(f"the tool at {m.round(3)} m is outside the box {c.box_low} to {c.box_high}")
    if tilt(M[:3, :3]) > c.max_tilt + c.leash[1]:
        raise Unsafe(f"the tool is tilted by {tilt(M[:3, :3]):.2f} rad")


def safe_target(c: RobotConfig, T, action, M, q) -> tuple[np.ndarray, list[str]]:
    """Commanded pose T and an action -> the next commanded pose (4, 4), and what was limited.

    T, M (4, 4); action, q (7,). Whatever comes in, what goes out is finite, in the box, no more
    tilted than max_tilt and on the leash to M; it is a clamped, speed-limited step from T, or
    from where the leash pulled T back to. That retreat is at once, whatever the speed limit: it
    is as far as the arm itself was moved, and a target left behind would pull with more force.
    Raises Unsafe where there is no such pose.
    """
    a = np.asarray(action, float)
    if a.shape != (7,) or not np.isfinite(a).all():
        raise Unsafe(f"action {a} is not seven finite numbers")
    check_state(c, M, q)
    notes = ["clamped"] if np.abs(a[:6]).max() > 1 else []
    a = np.clip(a, -1, 1)
    p, R, m, Rm = T[:3, 3], T[:3, :3], M[:3, 3], M[:3, :3]

    # A leash that has become too long (the arm was pushed, or is blocked) pulls the target back.
    inside = np.clip(m, c.box_low, c.box_high)  # in the box, on the leash: to fall back on
    p = np.clip(p, c.box_low, c.box_high)
    s = reach(inside, p, m, c.leash[0])
    if s < 1 and np.linalg.norm(p - m) > c.leash[0] + 1e-9:
        p, notes = inside + s * (p - inside), [*notes, "pulled back"]
    w = rotation_vector(R @ Rm.T)
    if (angle := np.linalg.norm(w)) > c.leash[1]:
        R, notes = turn(w * c.leash[1] / angle) @ Rm, [*notes, "turned back"]

    # The step: positions slide along the box's walls and end on the leash.
    d = a[:3] * c.action_scale[0]
    dR = from_euler(a[3:6] * c.action_scale[1])
    if c.frame == "tool":
        d, dR = R @ d, R @ dR @ R.T
    if (step := np.linalg.norm(d)) > c.max_speed / c.hz:
        d, notes = d * c.max_speed / c.hz / step, [*notes, "speed"]
    goal = np.clip(p + d, c.box_low, c.box_high)
    if not np.array_equal(goal, p + d):
        notes.append("box")
    s = reach(p, goal, m, c.leash[0])
    if s < 1 and np.linalg.norm(goal - m) > c.leash[0]:
        goal, notes = p + s * (goal - p), [*notes, "leash"]
    w = rotation_vector(dR)
    if (angle := np.linalg.norm(w)) > c.max_turn / c.hz:
        w, notes = w * c.max_turn / c.hz / angle, [*notes, "turn"]
    # Rotations are composed [D20]. They are not convex: all of the step, else a part, else none.
    for share in (1.0, 0.5, 0.25, 0.0):
        R_goal = turn(share * w) @ R
        lead = np.linalg.norm(rotation_vector(R_goal @ Rm.T))
        if tilt(R_goal) <= c.max_tilt and lead <= c.leash[1] + 1e-9:
            break
    else:
        raise Unsafe(f"the tool is tilted by {tilt(R):.2f} rad, {c.max_tilt} are allowed")
    if share < 1:
        notes.append("tilt")
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = R_goal, np.clip(goal, c.box_low, c.box_high)
    return out, notes


def check_homing(c: RobotConfig, q, goal, F_T_EE) -> None:
    """Unsafe: a straight line in joint space from q to goal, (7,) each, that the arm may not take.
    F_T_EE (4, 4): the tool in the flange's frame."""
    check_state(c, flange(goal) @ F_T_EE, np.asarray(goal))
    for s in np.linspace(0, 1, 25):
        z = (flange((1 - s) * np.asarray(q) + s * np.asarray(goal)) @ F_T_EE)[2, 3]
        if z < c.box_low[2] - c.box_slack:
            raise Unsafe(f"on the way the tool would sink to {z:.3f} m: raise it by hand first")


def gripper_command(c: RobotConfig, a: float, last: float) -> float:
    """App. D: above 0 opens (1), else closes (-1); near 0 it keeps what it does [D2]."""
    return last if abs(a) < c.dead_band else (1.0 if a > 0 else -1.0)


# ------------------------------------------------------------------ cameras
def resize_area(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3) by area averaging; a copy of data.py's."""
    H, W, _ = images.shape

    def weights(n: int) -> np.ndarray:  # (size, n): pixel i averages [i n/size, (i+1) n/size)
        edge, pixel = np.arange(size + 1)[:, None] * n / size, np.arange(n)
        overlap = np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel)
        return (np.maximum(overlap, 0) * size / n).astype(np.float32)

    x = weights(H) @ images.reshape(H, W * 3).astype(np.float32)
    return np.rint(weights(W) @ x.reshape(size, W, 3)).astype(np.uint8)


def open_driver(spec: str):
    """`kind:argument` -> (grab() -> rgb uint8 (H, W, 3), blocking; release()). A file plays at its
    own pace, again and again. RobotError: no driver, no such camera."""
    kind, _, name = spec.partition(":")
    if kind == "opencv":
        try:
            import cv2
        except ImportError as error:
            raise RobotError(f"{spec} needs OpenCV: pip install opencv-python-headless") from error
        device = cv2.VideoCapture(int(name) if name.isdigit() else name)
        if not device.isOpened():
            raise RobotError(f"{spec}: no such camera or film. Cameras here: /dev/video*")
        device.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        pause = 1 / (device.get(cv2.CAP_PROP_FPS) or 30) if os.path.isfile(name) else 0

        def grab():
            ok, frame = device.read()
            if not ok and pause:  # a film's end
                device.set(cv2.CAP_PROP_POS_FRAMES, 0)
                ok, frame = device.read()
            if not ok:
                raise RobotError(f"{spec} gives no more frames. Is its cable in?")
            time.sleep(pause)
            return frame[..., ::-1]  # OpenCV's order is BGR

        return grab, device.release
    if kind == "realsense":
        try:
            import pyrealsense2 as rs
        except ImportError as error:
            raise RobotError(
                f"{spec} needs pip install pyrealsense2, apt install libusb-1.0-0 ({error})"
            ) from error
        pipe, config = rs.pipeline(), rs.config()
        if os.path.isfile(name):
            config.enable_device_from_file(name, True)
        else:
            if name:
                config.enable_device(name)
            config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
        try:
            pipe.start(config)
        except RuntimeError as error:
            raise RobotError(
                f"{spec}: {error}. Is it at a USB 3 port? rs-enumerate-devices lists "
                "the serial numbers."
            ) from error
        return lambda: np.array(pipe.wait_for_frames(2000).get_color_frame().get_data()), pipe.stop
    raise RobotError(f"camera {spec!r}: expected opencv:... or realsense:...")


class Camera:
    """One camera and its thread, which keeps the newest frame only, cropped and shrunk."""

    def __init__(self, spec: str, crop, size: int):
        self.spec, self.crop, self.size, self.error = spec, crop, size, None
        self.newest, self.shape, self.running = (None, 0.0), None, True
        self.grab, self.release = open_driver(spec)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        last = None
        try:
            while self.running:
                raw, now = self.grab(), time.monotonic()
                # A driver may repeat its last picture for ever. No two of a live camera are equal.
                if last is None or not np.array_equal(raw, last):
                    self.newest = (self._crop(raw), now)
                last = raw
        except Exception as error:  # told by read(), in the control loop
            self.error = error

    def _crop(self, raw):
        self.shape, (H, W, n) = raw.shape, (*raw.shape[:2], min(raw.shape[:2]))
        y, x = (H - n) // 2, (W - n) // 2
        top, bottom, left, right = self.crop or (y, y + n, x, x + n)
        cut = raw[top:bottom, left:right]
        if min(cut.shape[:2]) < self.size or cut.shape[:2] != (bottom - top, right - left):
            raise RobotError(
                f"{self.spec} gives {W} x {H} pixels; the crop {self.crop} of it must "
                f"lie inside and have {self.size} or more each way"
            )
        return resize_area(cut, self.size)

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


# ------------------------------------------------------------------ arm
@dataclasses.dataclass(frozen=True)
class State:
    """M (4, 4) measured pose, q (7,) rad, time of the arm's own clock (s), mode, F_T_EE (4, 4)."""

    M: np.ndarray
    q: np.ndarray
    time: float
    mode: str = "Idle"
    F_T_EE: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(4))


class Arm:
    """Panda (FER) or FR3 and its hand, through franky. Every method may raise one of `errors`."""

    def __init__(self, c: RobotConfig):
        try:
            import franky  # never import *: it shadows the builtin Exception
        except ImportError as error:
            raise RobotError(
                "the arm needs franky: pip install franky-control (for an FR3; a "
                "Panda needs another wheel of it, see the README)"
            ) from error
        self.c, self.franky, self.tracker, self.width, self.running = c, franky, None, 0.0, True
        # A planner's failure is a plain RuntimeError, and these two are not franky.Exceptions.
        self.errors = (
            franky.Exception,
            franky.InvalidMotionTypeException,
            franky.GripperException,
            RuntimeError,
        )
        self.lost = franky.NetworkException
        self.connect()
        self.thread = threading.Thread(target=self._watch_hand, daemon=True)
        self.thread.start()

    def connect(self):
        f, c, self.grip_job = self.franky, self.c, None
        want = f.RealtimeConfig.Enforce if c.realtime else f.RealtimeConfig.Ignore
        # No probe of the port before: an arm has one client at a time, and that would be the probe.
        print(f"waiting for the arm at {c.host}, up to a minute", flush=True)
        try:
            self.robot = f.Robot(c.host, realtime_config=want)
            self.hand = f.Gripper(c.host)
            self.width = float(self.hand.width)
        except f.RealtimeException as error:
            raise RobotError(
                f'{error} See "Kernel" in the README; for a simulated arm the set-up says '
                '"realtime": false.'
            ) from error
        except f.IncompatibleVersionException as error:
            raise RobotError(
                f"{c.host}: {error}. Panda and FR3 need different wheels of "
                "franky-control, see the README."
            ) from error
        except self.errors as error:
            raise RobotError(
                f"no arm at {c.host}: {error}. Is the address right, the arm "
                "unlocked, FCI active, nobody else connected?"
            ) from error

    def _watch_hand(self):  # reading the width blocks until the hand reports, so not in the loop
        while self.running:
            with contextlib.suppress(*self.errors, AttributeError):  # its next command will tell
                self.width = float(self.hand.width)
            time.sleep(0.03)

    def state(self) -> State:
        if self.robot is None:  # recover() could not connect; perhaps it can now
            self.connect()
        s = self.robot.state
        M, q = np.array(s.O_T_EE.matrix, float), np.array(s.q, float).ravel()
        mode = str(s.robot_mode).split(".")[-1]
        if (errors := str(s.current_errors)) != "[]":
            mode += f" {errors}"
        return State(M, q, s.time.to_sec(), mode, np.array(s.F_T_EE.matrix, float))

    def enable(self):
        """Clear errors, and set every limit: the wheels' defaults differ."""
        f, r, x = self.franky, self.robot, self.c.dynamics
        deadline = time.monotonic() + 2  # states from before the recovery may still be on their way
        if not r.recover_from_errors():
            while r.has_errors:
                if time.monotonic() > deadline:
                    raise RuntimeError("automatic error recovery failed")
                time.sleep(0.05)
        r.relative_dynamics_factor = f.RelativeDynamicsFactor(x, x, x)
        r.translation_velocity_limit.set(1.0)
        r.rotation_velocity_limit.set(2.0)
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
        f = self.franky
        if self.c.control == "pose":  # holds where a new target fails to come
            motion = f.CartesianMotion(
                f.Affine(T), f.ReferenceType.Absolute, return_when_finished=False
            )
            self.robot.move(motion, asynchronous=True)
            return
        if self.tracker is None:
            self.tracker = f.CartesianImpedanceTracker(
                self.robot,
                translational_stiffness=self.c.stiffness[0],
                rotational_stiffness=self.c.stiffness[1],
                translational_error_clip=[self.c.leash[0]] * 3,  # bounds the spring's force
                posture_task=f.PostureTask(list(self.c.neutral[0]), stiffness=10.0),
                lower_joint_limits=Q_LOW,
                upper_joint_limits=Q_HIGH,
            )
        self.robot.poll_motion()  # raises what went wrong meanwhile; set_target never does
        self.tracker.set_target(f.Affine(T))

    def grip(self, opened: bool) -> bool:
        """Open or close; returns at once. False: the hand is still busy, ask again."""
        if self.grip_job is not None and not self.grip_job.wait(0.0):
            return False
        self.grip_job = (
            self.hand.open_async(0.1)
            if opened
            else self.hand.grasp_async(0.0, 0.1, 20.0, epsilon_inner=0.1, epsilon_outer=0.1)
        )
        return True

    def stop(self):
        """Bring the arm to rest. It then holds by itself."""
        f, tracker, self.tracker = self.franky, self.tracker, None
        if tracker is not None:
            tracker.stop()  # ramps the torques down
        elif self.robot is not None and self.robot.is_in_control:
            joints = self.robot.current_control_signal_type == f.ControlSignalType.JointPositions
            self.robot.move(
                f.JointStopMotion() if joints else f.CartesianStopMotion(), asynchronous=True
            )
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
        last, deadline = None, time.monotonic() + 3
        while time.monotonic() < deadline:  # planning fails while the arm still moves
            p = self.state().M[:3, 3]
            if last is not None and np.linalg.norm(p - last) < 2e-4:
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
        self.grip_job = None
        self.hand = self.robot = None  # disconnects: an arm has one client at a time


# ------------------------------------------------------------------ environment
def terminal_key() -> str | None:
    """A key that was pressed; "" if none was; None where there is no keyboard."""
    if not select.select([sys.stdin], [], [], 0)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 1).decode(errors="ignore") or None


class RealEnv:
    """Arm and cameras behind the simulators' interface, at config.hz.

    arm, cameras: instead of the set-up's. key: function returning a pressed key. clock: "wall", or
    "robot" to go by the arm's own clock (a simulated arm may be slower than real time).
    The operator's keys in a rollout: s success, f failed, r repeat (invalid), a abort.
    """

    def __init__(
        self, c: RobotConfig, dry_run=False, arm=None, cameras=None, key=None, clock="wall"
    ):
        self.config, self.dry_run, self.key = c, dry_run, key or terminal_key
        self.cameras, self.log, self.terminal, self.interrupted = cameras or {}, None, None, False
        self.arm = arm or Arm(c)
        self.clock = time.monotonic if clock == "wall" else lambda: self.arm.state().time
        try:
            for name in CAMERAS if not cameras else ():
                spec, crop = getattr(c, name[4:]), getattr(c, f"{name[4:]}_crop")
                self.cameras[name] = Camera(spec, crop, c.recorded_size)
        except BaseException:
            self.close()  # a thread that reads the hand must not outlive this
            raise
        self.gripper = 1.0 if self.arm.width > 0.07 else -1.0  # what it does now; 0.08 m is open
        self.T, self.verdict, self.next_tick, self.recoveries = None, None, 0, 0
        self.robot_time, self.misses = (None, 0.0), collections.deque(maxlen=15)
        if threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGINT, self._on_interrupt)
        if key is None and sys.stdin.isatty():
            import termios
            import tty

            self.terminal = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)

    def _on_interrupt(self, *_):
        if self.interrupted:  # the second time at once, whatever is under way
            raise KeyboardInterrupt
        self.interrupted = True

    def close(self):
        """Arm at rest, cameras closed, log on the disk."""
        self.arm.close()  # stops only what it has started
        for camera in self.cameras.values():
            camera.close()
        self.start_log(None)
        if hasattr(self, "handler"):
            signal.signal(signal.SIGINT, self.handler)
        if self.terminal:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.terminal)

    def start_log(self, path):
        """Further events go to this JSONL file (None: nowhere), each flushed at once."""
        if self.log:
            os.fsync(self.log.fileno())
            self.log.close()
        self.log = open(path, "a") if path else None

    def note(self, event: str, **values):
        if self.log:
            plain = {k: x.tolist() if isinstance(x, np.ndarray) else x for k, x in values.items()}
            self.log.write(json.dumps({"event": event, "wall": time.time()} | plain) + "\n")
            self.log.flush()

    def ask(self, text: str, choices: str) -> str:
        """Wait until the operator presses one of the keys."""
        print(f"{text} [{'/'.join(choices)}]", flush=True)
        while (key := self.key()) is None or key not in choices or not key:
            if key is None:
                raise RobotError("no keyboard to ask the operator: run this in a terminal")
            if self.interrupted:
                raise KeyboardInterrupt
            time.sleep(0.02)
        self.note("asked", text=text, answer=key)
        return key

    # -------------------------------------------------------------- before the first motion
    def check(self, picture, moves: str = "THE ARM WILL MOVE"):
        """Prints what is connected, saves what the policy sees, asks the operator to confirm.
        RobotError: something is wrong, or the operator says no. Nothing moves."""
        c, s = self.config, self.arm.state()
        images, ages = self._frames()
        for name, image in images.items():
            spread = image.std()
            camera = self.cameras[name]
            print(
                f"{name}: {camera.spec}, {camera.shape} -> {image.shape}, {ages[name]:.2f} s old, "
                f"grey levels {image.mean():.0f} +- {spread:.0f}"
            )
            if spread < 3:
                raise RobotError(f"{name} ({self.cameras[name].spec}) shows nothing: cap, light?")
            if ages[name] > c.max_frame_age:
                raise RobotError(f"{name} ({self.cameras[name].spec}) is frozen")
        import imageio.v3 as imageio

        n = c.recorded_size
        small = [resize_area(x, c.policy_size) for x in images.values()]
        large = [x.repeat(-(-n // len(x)), 0).repeat(-(-n // len(x)), 1)[:n, :n] for x in small]
        rows = [np.concatenate(row, 1) for row in ([*images.values()], large)]
        imageio.imwrite(picture, np.concatenate(rows))
        print(f"what they see, above as recorded, below as the policy gets it: {picture}")
        wrong = np.linalg.norm((flange(s.q) @ s.F_T_EE)[:3, 3] - s.M[:3, 3])
        if wrong > 0.01:
            raise RobotError(f"the arm's pose is {wrong:.3f} m from its joints': another arm?")
        where = "where it is now"
        try:
            check_state(c, s.M, s.q)
            for where in c.neutral:
                check_homing(c, s.q, where, s.F_T_EE)
        except Unsafe as error:
            raise RobotError(f"pose {where}: {error}. Guide it away, or correct it.") from error
        print(
            f"arm: {c.host}, {c.control} control, mode {s.mode}, tool at "
            f"{s.M[:3, 3].round(3)} m, hand {self.arm.width:.3f} m open"
        )
        speed = [x * c.hz for x in c.action_scale]
        print(
            f"an action of 1: {c.action_scale[0]} m, {c.action_scale[1]} rad in the {c.frame} "
            f"frame, {c.hz} times a second ({speed[0]:.2f} m/s, {speed[1]:.2f} rad/s)\n"
            f"box {c.box_low} to {c.box_high} m; at most {c.max_speed} m/s, {c.max_turn} rad/s; "
            f"leash {c.leash[0]} m, {c.leash[1]} rad; tilt {c.max_tilt} rad; joints "
            f"{c.joint_margin} rad from their limits; stiffness {c.stiffness[0]:.0f} N/m, "
            f"{c.stiffness[1]:.0f} Nm/rad"
        )
        if c.record_hz != c.hz:
            print(f"play is recorded at {c.record_hz} Hz, then thinned to {c.hz}")
        print("DRY RUN: nothing will move" if self.dry_run else moves)
        if self.ask("Emergency stop in hand, box free of people? Go on?", "yn") == "n":
            raise RobotError("the operator said no")

    # -------------------------------------------------------------- the simulators' interface
    def reset(self, robot_obs=None, scene_obs=None):
        """Home to the joint angles in robot_obs (15,) (None: neutral pose 0) and open the hand.
        scene_obs: the operator has set the scene. Returns the observation."""
        q = self.config.neutral[0] if robot_obs is None else robot_obs[7:14]
        self.verdict, self.recoveries = None, 0
        try:
            s = self.arm.state()
            check_homing(self.config, s.q, q, s.F_T_EE)
            self.note("home", q=np.asarray(q), dry_run=self.dry_run)
            if not self.dry_run:
                self.arm.home(q, self._watch)
                while not self.arm.grip(True):
                    self._watch()
                    time.sleep(0.01)
            self.gripper = 1.0
        except self.arm.errors as error:
            self._recover(error)  # so that the next attempt finds an arm that listens
            self._stop(f"homing: {error}")
        except (Unsafe, RobotError) as error:
            self._stop(str(error))
        return self.resume()

    def resume(self):
        """Start, or go on after a pause, from where the arm is now. Returns the observation."""
        self.verdict = None
        return self._guard(self._start)

    def _start(self):
        obs = self._observe()
        self.T = self.state.M.copy()
        self._pace()
        return obs

    def _pace(self):
        """The next tick is one period from now; what was late before does not count."""
        self.misses.clear()
        self.next_tick = self.clock() + 1 / self.config.hz

    def rest(self):
        """Between rollouts: the arm comes to rest and holds by itself."""
        with contextlib.suppress(Stopped):
            self._stop("rollout is over")

    def step(self, action, render=True):
        """One action (7,) and the wait for the next tick: observation, 0.0, False, info.
        Raises Stopped, with the arm at rest, or KeyboardInterrupt. render: for the simulators."""
        return self._guard(self._step, np.asarray(action, float)), 0.0, False, self.get_info()

    def follow(self, gripper: float):
        """Instead of a step while a person guides the arm: the commanded pose is the measured one,
        only the hand is commanded. Returns the observation."""
        return self._guard(self._step, np.r_[np.zeros(6), gripper], True)

    def get_obs(self):
        """What the cameras see and the arm feels now."""
        return self._guard(self._observe)

    def get_info(self):
        """The operator's verdict, for the oracle; the hand's command and the arm's pose."""
        return {"operator": self.verdict, "gripper_action": self.gripper, "target": self.T}

    # -------------------------------------------------------------- inside a tick
    def _guard(self, work, *args):
        """Whatever goes wrong in a tick ends here: recovered, or the arm at rest and Stopped."""
        began = time.monotonic()
        try:
            return work(*args)
        except self.arm.errors as error:
            self._recover(error)
            if (lost := time.monotonic() - began) > self.config.patience:
                self._stop(f"{type(error).__name__}: {error}; it took {lost:.1f} s to recover")
        except (Unsafe, RobotError) as error:
            self._stop(str(error))
        return self._guard(self._observe)

    def _watch(self):
        """Ctrl-C and the operator's keys."""
        if self.interrupted:
            try:
                self._stop("Ctrl-C")
            except Stopped:
                raise KeyboardInterrupt from None
        key = self.key()
        if key == "s":
            self.verdict = "success"
        elif key and key in "far":
            self._stop({"f": "failed", "a": "abort", "r": "repeat"}[key])

    def _stop(self, reason: str):
        """The arm to rest, the reason into the log, and out."""
        self.note("stopping", reason=reason)
        began = time.monotonic()
        if not self.dry_run:
            try:
                self.arm.stop()
            except self.arm.errors as error:
                self.note("stop failed", error=str(error))
                print(f"WARNING: the arm did not confirm its stop: {error}", flush=True)
        self.note("stopped", reason=reason, seconds=time.monotonic() - began)
        raise Stopped(reason)

    def _recover(self, error):
        """A reflex, a pre-emption, a lost connection: clear it and go on from the measured pose."""
        self.recoveries += 1
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, getattr(self.arm, "lost", ())):
            with contextlib.suppress(*self.arm.errors):
                text += f" (mode {self.arm.state().mode})"
        self.note("error", error=text, count=self.recoveries)
        print(f"the arm reports {text}", flush=True)
        if self.dry_run or self.recoveries > self.config.max_recoveries:
            self._stop(text)
        try:
            self.arm.recover(error)
            s = self.arm.state()
            self._pace()
        except (*self.arm.errors, RobotError) as again:
            self._stop(f"{text}; and then {again}")
        if s.mode.startswith(("UserStopped", "Guiding")):  # somebody's hand is on it
            self._stop(f"{text}; the arm is {s.mode}")
        self.T = s.M.copy()
        self.note("recovered", measured=s.M[:3, 3], q=s.q)

    def _frames(self):
        read, now = {k: camera.read() for k, camera in self.cameras.items()}, time.monotonic()
        return {k: x for k, (x, _) in read.items()}, {k: now - t for k, (_, t) in read.items()}

    def _observe(self):
        """Fresh state and frames, as an observation. While something is stale the arm holds its
        last target; after `patience` the rollout ends."""
        c, began, held = self.config, time.monotonic(), None
        while True:
            self._watch()
            s, now = self.arm.state(), time.monotonic()
            if s.time != self.robot_time[0]:
                self.robot_time = (s.time, now)
            self.images, self.ages = self._frames()
            stale = [f"{k} is {t:.2f} s old" for k, t in self.ages.items() if t > c.max_frame_age]
            if (age := now - self.robot_time[1]) > c.max_state_age:
                stale.append(f"the arm's state is {age:.2f} s old")
            if not stale:
                break
            if held is None:
                held = stale
                self.note("hold", reason=stale)
            if now - began > c.patience:
                self._stop("; ".join(stale))
            time.sleep(0.01)
        if held:
            self.note("resumed", after=now - began)
            self._pace()
        self.state = s
        robot = [*s.M[:3, 3], *to_euler(s.M[:3, :3]), self.arm.width, *s.q, self.gripper]
        rgb = {k: resize_area(x, c.policy_size) for k, x in self.images.items()}
        return {"rgb_obs": rgb, "robot_obs": np.array(robot)}

    def _step(self, action, guided=False):
        c, s = self.config, self.arm.state()
        if guided:
            self.T, notes = s.M.copy(), ["guided"]
            check_state(dataclasses.replace(c, box_slack=np.inf), s.M, s.q)
        else:
            self.T, notes = safe_target(c, self.T, action, s.M, s.q)
            if not self.dry_run:
                self.arm.send(self.T)
        grip = gripper_command(c, action[6], self.gripper)
        if grip != self.gripper and (self.dry_run or self.arm.grip(grip > 0)):
            self.gripper = grip
        late = self.clock() - self.next_tick
        self.misses.append(late > 0.5 / c.hz)
        if sum(self.misses) >= c.max_misses:
            self._stop(
                f"{sum(self.misses)} of {len(self.misses)} ticks were late, the last by "
                f"{late:.3f} s: a faster policy or computer is needed"
            )
        now, seen = self.clock(), (0.0, time.monotonic())
        while now < self.next_tick:
            self._watch()
            if now != seen[0]:
                seen = (now, time.monotonic())
            elif time.monotonic() - seen[1] > c.max_state_age:
                break  # the arm's clock stands still: _observe holds, and paces anew
            time.sleep(min(self.next_tick - now, 0.002))
            now = self.clock()
        self.next_tick = max(self.next_tick + 1 / c.hz, now)  # after an overrun no burst
        obs = self._observe()
        self.note(
            "tick",
            t=now,
            late=late,
            action=action,
            target=self.T,
            measured=self.state.M,
            q=self.state.q,
            gripper=self.gripper,
            ages=self.ages,
            notes=notes,
        )
        return obs


# ------------------------------------------------------------------ recording
class Recorder:
    """Frames of one split of a recording in CALVIN's format, at hz / thin (App. E: 30 Hz to 15).

    Frame ids grow over both splits. Each frame is a file as soon as its action is known; frames
    that a crash left behind become an episode when the same folder is opened again.
    """

    def __init__(self, folder, split: str, c: RobotConfig, thin: int = 2):
        self.place, self.thin, self.pending, self.count = Path(folder) / split, thin, None, 0
        self.clipped = 0  # of this episode's actions
        scale = tuple(round(s * thin, 9) for s in c.action_scale)
        self.c = dataclasses.replace(c, action_scale=scale)
        about = {"source": "robot", "renderer": "camera", "hz": c.hz // thin}
        about |= {"action_scale": list(scale), "frame": c.frame}
        path = self.place / "recording.json"
        old = json.loads(path.read_text()) if path.exists() else about
        if any(old.get(k) != x for k, x in about.items()):
            raise RobotError(f"{path} is of another recording: {old}, not {about}. Another folder.")
        self.place.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(old))
        self.table = self.place / "ep_start_end_ids.npy"
        self.episodes = np.load(self.table).tolist() if self.table.exists() else []
        known = max((e[1] for e in self.episodes), default=-1)
        left = [i for i in self._ids(self.place) if i > known]
        self.first = left[0] if left else 0
        self.next = 1 + max(map(self._last, Path(folder).glob("*/")), default=-1)
        if left:
            self.next = left[-1] + 1
            self.end()
            self.next = 1 + max(map(self._last, Path(folder).glob("*/")), default=-1)
        self.first = self.next

    @staticmethod
    def _ids(place) -> list[int]:
        return sorted(int(p.stem[8:]) for p in place.glob("episode_*.npz"))

    def _last(self, place) -> int:
        return max(self._ids(place), default=-1)

    def add(self, T, gripper: float, images: dict, robot_obs):
        """One tick [D21]: commanded pose (4, 4) and gripper in force, images, state (15,)."""
        self.count += 1
        if self.count % self.thin != 1 % self.thin:
            return
        if self.pending is not None:  # now that frame's action is known: it led to this one
            T_before, frame = self.pending
            a = relative_action(self.c, T_before, T, gripper)
            frame["rel_actions"] = np.clip(a, -1, 1)
            self.clipped += bool(np.abs(a).max() > 1.001)
            frame["actions"] = np.r_[T[:3, 3], to_euler(T[:3, :3]), gripper]
            path = self.place / f"episode_{self.next:07d}.npz"
            np.savez(self.place / "part.npz", **frame)
            os.replace(self.place / "part.npz", path)
            self.next += 1
        self.pending = (T.copy(), dict(images) | {"robot_obs": np.array(robot_obs, float)})

    def end(self) -> int:
        """Closes the episode; its number of frames, 0 if it was too short to keep."""
        first, n = self.first, self.next - self.first
        self.pending, self.count = None, 0
        if n < SHORTEST:
            for i in range(first, self.next):
                (self.place / f"episode_{i:07d}.npz").unlink(missing_ok=True)
            self.next = first
            return 0
        self.episodes.append([first, self.next - 1])  # CALVIN's bounds are inclusive
        for name, x in (
            ("ep_start_end_ids", self.episodes),
            ("ep_lens", [b - a + 1 for a, b in self.episodes]),
        ):
            np.save(self.place / "part.npy", np.array(x))
            os.replace(self.place / "part.npy", self.place / f"{name}.npy")
        self.first = self.next
        return n


def record(env: RealEnv, folder, split: str, source=None, thin: int = 2) -> int:
    """One episode of play, until the source returns None or the operator presses n. The hand begins
    as it is. Returns its frames, and prints which they are and how many actions were clipped.

    source(obs) -> action (7,) of env.config's scale at its rate, by any teleoperation; None: a
    person guides the arm by its buttons, and g opens and closes the hand.
    """
    recorder, obs, more = Recorder(folder, split, env.config, thin), env.resume(), True
    keys, pressed, gripper = env.key, [], env.gripper

    def key():
        pressed.append(keys() or "")
        return "" if pressed[-1] in ("n", "g") else pressed[-1]

    env.key = key  # the environment goes on watching for its own keys
    try:
        while more:
            recorder.add(env.T, env.gripper, env.images, obs["robot_obs"])
            if source is None:
                gripper = -gripper if pressed.count("g") % 2 else gripper
                pressed = [k for k in pressed if k != "g"]
                obs = env.follow(gripper)
            elif (action := source(obs)) is not None:
                obs = env.step(action)[0]
            else:
                break
            more = "n" not in pressed
    finally:  # whatever ended it, what was recorded stays
        env.key, n = keys, recorder.end()
        env.note("episode", frames=n, clipped=recorder.clipped)
        if n:
            share, first = recorder.clipped / n, recorder.first - n
            print(f"frames {first} to {first + n - 1} are kept; {share:.0%} of the actions were "
                  "clipped", flush=True)  # fmt: skip
        else:
            print(f"fewer than {SHORTEST} frames: none is kept", flush=True)
    return n


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "look at everything, move nothing"),
        ("record", "play by hand guiding, in CALVIN's format"),
    ):
        p = commands.add_parser(name, help=text)
        p.add_argument("setup", help="JSON file of RobotConfig's fields")
        if name == "record":
            p.add_argument("folder")
            p.add_argument("split", choices=("training", "validation"))
    a = parser.parse_args(argv)
    env = None
    try:
        c, looks = load_config(a.setup), a.command == "check"
        env = RealEnv(c if looks else recording(c), dry_run=looks)
        env.check("check.png", moves="you move the arm, g moves the hand")
        while a.command == "record" and env.ask("n: a new episode, q: enough", "nq") == "n":
            print("recording; n ends the episode, g opens and closes the hand", flush=True)
            try:
                record(env, a.folder, a.split)
            except Stopped as stop:
                print(f"stopped: {stop}", flush=True)
    except (RobotError, Unsafe) as error:
        sys.exit(f"robot.py: {error}")
    except KeyboardInterrupt:
        sys.exit("Ctrl-C: all that was recorded is kept; the same command adds to it")
    finally:
        if env:
            env.close()


if __name__ == "__main__":
    main()
