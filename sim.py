"""The embedded play table: a twin of CALVIN's environment D from primitive shapes. LUMOS Sec. V-A.

Physics at 240 Hz, control at 30 Hz. Frames, places, state vectors, tasks and rules are CALVIN's, so
states, instruction chains and the scripted operator work in both. Metres and radians throughout.

action (7,)                                  scene_obs (24,)
  [0:3]  moves the target xyz, 1 = 0.02 m      [0]        sliding door, 0 right .. 0.28 left
  [3:6]  its euler xyz, 1 = 0.05 rad           [1]        drawer, 0 closed .. 0.22 open
  [6]    gripper: -1 close, +1 open            [2]        button, 0 .. 0.02 pressed
robot_obs (15,)                                [3]        switch, 0 .. 0.088 on
  [0:3]  tcp xyz, between the finger tips      [4] [5]    light bulb, led: 0 off, 1 on
  [3:6]  tcp euler xyz                         [6:12]     red block: xyz, euler xyz
  [6]    gripper opening width, 0 .. 0.08      [12:18]    blue block
  [7:14] arm joints    [14] gripper action     [18:24]    pink block

obs_t -> target pose += action_t -> inverse kinematics -> 8 physics steps -> lights -> obs_t+1
Copy this file together with calvin.py. Needs: numpy, scipy, pybullet.
"""

import os
import re
import tempfile
from functools import partial
from types import SimpleNamespace

import numpy as np

from calvin import BUTTON, DRAWER, ROBOT_OBS0, SCENE_OBS0, SHELF, SLIDE, SWITCH, TOP, TRAY
from calvin import TASKS as TASKS  # so that a user of this file finds them here
from calvin import oracle as oracle

PHYSICS_HZ, CONTROL_HZ = 240, 30
POS_SCALE, EULER_SCALE = 0.02, 0.05  # m, rad per unit of action
ROBOT_BASE, TCP_Z = (-0.34, -0.46, 0.24), 0.14  # CALVIN's tcp is 35 mm beyond pybullet_data's
# fmt: off
# Modified Denavit-Hartenberg rows (a, d, α): the Panda's seven joints, then the tcp (no joint).
PANDA_DH = [(0, 0.333, 0), (0, 0, -np.pi / 2), (0, 0.316, np.pi / 2), (0.0825, 0, np.pi / 2),
            (-0.0825, 0.384, -np.pi / 2), (0, 0, np.pi / 2), (0.088, 0, np.pi / 2),
            (0, 0.107 + TCP_Z, 0)]
JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
# fmt: on
ARM_MOTOR = {"force": 200, "maxVelocity": 2, "positionGain": 0.3}  # N m, rad/s, error per step
GRIP_FORCE, OPEN_FORCE, HOLD_FORCE = 200, 10, 4  # N; the last holds doors, lifts the button
TRAVEL = {SLIDE: 0.28, DRAWER: 0.22, BUTTON: 0.02, SWITCH: 0.088}  # m, in scene_obs's order
LIGHTS = {"lightbulb": ("light_link", (1, 0.95, 0.1)), "led": ("led_link", (0.1, 0.95, 0.15))}

# Plain colours. What is small and worth seeing is bright, what is large differs in shades: with
# half the squared error as -log p (Eq. 2), a world model draws contrast times area first. Other
# colours are another LOOK, so that no policy is tried in a table that it has never seen.
LOOK = "tiny-grey"
WOOD, CABINET, INSIDE = (0.56, 0.555, 0.54), (0.49, 0.505, 0.50), (0.53, 0.545, 0.54)
DOOR, BROWN, SAND = (0.68, 0.53, 0.38), (0.45, 0.40, 0.36), (0.62, 0.60, 0.53)
BLACK, WHITE, OFF = (0.37, 0.37, 0.375), (0.60, 0.6, 0.595), (0.45, 0.45, 0.455)
FLOOR = (0.50, 0.50, 0.505)
ARM, HAND, FINGER = (0.57, 0.575, 0.58), (0.48, 0.48, 0.49), (0.43, 0.59, 0.59)
RED, BLUE, PINK, SKY = (1, 0.05, 0.05), (0.05, 0.12, 1), (1, 0.1, 0.95), (124, 124, 125)
# Name: colour, length in x; width and height are 0.04 m.
BLOCKS = {"block_red": (RED, 0.056), "block_blue": (BLUE, 0.04), "block_pink": (PINK, 0.08)}
# CALVIN's static camera, 1° wider to see the open drawer whole. The gripper's is
# mounted on the hand; it looks along its own +y, with -z up.
STATIC_EYE, STATIC_AT = (2.871459, -2.166602, 2.555160), (0.03, -0.076, 0.432)
STATIC_UP, STATIC_FOV = (0.404140, 0.226298, 0.886262), 11
GRIPPER_XYZ, GRIPPER_RPY, GRIPPER_FOV = (-0.1, 0, 0), (1.3, 0, -1.57), 75
SHADING = {"lightDirection": (1, -1.5, 3), "lightAmbientCoeff": 0.75, "lightDiffuseCoeff": 0.25,
           "lightSpecularCoeff": 0, "shadow": 0}  # fmt: skip

# The table in world coordinates, joints at 0. A "box" is colour, x0, x1, y0, y1, z0, z1. A "slope"
# leans with the cabinet's front: in place of y, z it has u, up the slope along (0, 1/2, √3/2), and
# n, out of it, both from the edge y = 0.02, z = 0.44.
SIDE = (("slope", 0, 0.24, -0.045, 0), ("box", 0.08, 0.18, 0.42, 0.53),
        ("box", 0.11, 0.18, 0.53, 0.59), ("box", 0.135, 0.18, 0.59, 0.648))  # fmt: skip
TABLE = {  # link: joint, its axis (None: fixed), mass in kg, shapes; CALVIN's link numbers, from -1
    TOP: (None, None, 0, [
        *[("box", CABINET, x, x + 0.04, y, y + 0.03, 0, 0.4)
          for x in (-0.44, 0.4) for y in (-0.18, 0.15)],
        *[(kind, CABINET, *x, *at) for x in ((-0.438, -0.36), (0.16, 0.438)) for kind, *at in SIDE],
        ("box", CABINET, -0.36, 0.16, 0.132, 0.181, 0.628, 0.648),
        ("box", CABINET, -0.42, -0.04, -0.16, 0.16, 0.3, 0.4),
        ("box", CABINET, -0.04, 0.42, 0.08, 0.16, 0.3, 0.4),
        ("box", CABINET, 0.4, 0.42, -0.16, 0.08, 0.3, 0.4),
        ("box", INSIDE, -0.36, 0.16, 0.16, 0.18, 0.42, 0.63),
        *[("box", WOOD, -0.44, 0.44, -0.18, *at) for at in ((0.18, 0.4, 0.42), (0.02, 0.42, 0.44))],
        *[("slope", BLACK, x, x + 0.02, 0.05, 0.19, -0.01, 0.001) for x in (0.24, 0.34)],
        ("box", BLACK, -0.16, -0.08, -0.16, -0.08, 0.44, 0.46)]),
    "button_link": (BUTTON, "0 0 -1", 0.154, [
        ("box", WHITE, -0.15, -0.09, -0.15, -0.09, 0.46, 0.484)]),
    "switch_link": (SWITCH, "0 0.5 0.866025", 0.239, [
        ("slope", WHITE, 0.24, 0.36, 0.06, 0.092, 0.036, 0.056),
        *[("slope", WHITE, x, x + 0.02, 0.06, 0.092, -0.008, 0.036) for x in (0.24, 0.34)]]),
    "slide_link": (SLIDE, "-1 0 0", 1.543, [
        ("slope", DOOR, -0.1, 0.18, 0, 0.22, 0, 0.02),
        ("slope", BLACK, 0.02, 0.06, 0.03, 0.19, 0.06, 0.08),
        *[("slope", BLACK, 0.02, 0.06, u, u + 0.02, 0.02, 0.06) for u in (0.03, 0.17)]]),
    TRAY: (DRAWER, "0 -1 0", 4.231, [
        ("box", BROWN, -0.04, 0.4, -0.18, -0.16, 0.3, 0.4),
        ("box", SAND, 0, 0.36, -0.16, 0.06, 0.32, 0.34235),
        ("box", BROWN, -0.02, 0.38, 0.04, 0.06, 0.32, 0.4),
        *[("box", BROWN, x, x + 0.02, -0.16, 0.06, 0.32, 0.4) for x in (-0.02, 0.36)],
        *[("box", BLACK, x, x + 0.02, -0.26, -0.18, 0.34, 0.38) for x in (0.06, 0.28)],
        ("box", BLACK, 0.08, 0.28, -0.26, -0.24, 0.34, 0.38)]),
    "led_link": ("base__led", None, 0.2, [("box", OFF, -0.2, -0.04, 0.14, 0.18, 0.648, 0.664)]),
    "light_link": ("base__light", None, 0.2, [("box", OFF, 0.27, 0.33, 0.13, 0.19, 0.648, 0.698)]),
    SHELF: ("base__plank", None, 3, [("box", INSIDE, -0.36, 0.16, 0.02, 0.16, 0.42, 0.441)]),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- bodies
def _link_urdf(name, shapes):
    """The shapes' <visual> and <collision> elements; a link's origin is the world's."""
    text, cos, sin = "", 1 / 2, 3**0.5 / 2
    for i, (kind, (red, green, blue), *at) in enumerate(shapes):
        low, high = np.array(at[::2]), np.array(at[1::2])
        (x, y, z), (a, b, c), roll = (low + high) / 2, high - low, 0
        if kind == "slope":
            y, z, roll = 0.02 + cos * y - sin * z, 0.44 + sin * y + cos * z, np.pi / 3
        box = f"""<origin xyz="{x:.6f} {y:.6f} {z:.6f}" rpy="{roll:.6f} 0 0"/>
<geometry><box size="{a:.6f} {b:.6f} {c:.6f}"/></geometry>"""
        colour = f'<material name="{name}{i}"><color rgba="{red} {green} {blue} 1"/></material>'
        text += f"<visual>{box}{colour}</visual>\n<collision>{box}</collision>\n"
    return text


def table_urdf():
    """The play table as URDF text, in short lines, which is all that PyBullet can read."""
    text = '<robot name="table">'
    for name, (joint, axis, mass, shapes) in TABLE.items():
        text += f"""
<link name="{name}"><inertial><mass value="{mass}"/>
<inertia ixx="1" ixy="0" ixz="0" iyy="1" iyz="0" izz="1"/></inertial>
{_link_urdf(name, shapes)}</link>"""
        if joint:
            text += f"""
<joint name="{joint}" type="{"prismatic" if axis else "fixed"}"><axis xyz="{axis or "0 0 0"}"/>
<parent link="{TOP}"/><child link="{name}"/>
<limit lower="0" upper="{TRAVEL.get(joint, 0)}" effort="0" velocity="0"/></joint>"""
    return text + "</robot>"


def panda_urdf(folder):
    """pybullet_data's Panda as URDF text: its collision meshes to look at, long fingers."""
    with open(os.path.join(folder, "panda.urdf")) as file:
        text = file.read()
    text = text.replace("meshes/visual", "meshes/collision").replace("package://", folder + os.sep)
    text = text.replace('xyz="0 0 0.105"', f'xyz="0 0 {TCP_Z}"')
    for name, side in (("panda_leftfinger", 1), ("panda_rightfinger", -1)):
        mount = ("box", FINGER, -0.0105, 0.0105, *sorted((0.004 * side, 0.026 * side)), 0, 0.05)
        pad = ("box", FINGER, -0.0105, 0.0105, *sorted((0, 0.014 * side)), 0.045, 0.0955)
        link = rf'(<link name="{name}">.*?</inertial>).*?</link>'
        text = re.sub(link, rf"\1{_link_urdf(name, (mount, pad))}</link>", text, flags=re.DOTALL)
    return text


# -------------------------------------------------------------------------------------- environment
def _numbers(name, values, size, choices):
    """values as float64 (size,): finite, and one of choices[i] wherever it names an index i."""
    values = np.array(values, dtype=np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(f"{name} must be {size} finite numbers, got {values.shape}: {values}")
    for i, allowed in choices.items():
        if values[i] not in allowed:
            raise ValueError(f"{name}[{i}] must be exactly one of {allowed}, got {values[i]}")
    return values


def _dh_row(a, d, alpha):
    """The constant part (4, 4) of a row of PANDA_DH."""
    c, s = np.cos(alpha), np.sin(alpha)
    return np.array([[1, 0, 0, a], [0, c, -s, -d * s], [0, s, c, d * c], [0, 0, 0, 1]])


DH_ROWS = [_dh_row(*row) for row in PANDA_DH]
DH_ROWS[0][:3, 3] += ROBOT_BASE
HAND_TURN = np.eye(4)  # the hand is mounted at -45°
HAND_TURN[:2, :2] = np.array([[1, 1], [-1, 1]]) * 0.5**0.5


def forward_kinematics(q):
    """Joints (7,) -> tcp position (3,), rotation (3, 3), Jacobian (6, 7): linear over angular."""
    turns = np.zeros((7, 4, 4))  # about each joint's z
    turns[:, 0, 0] = turns[:, 1, 1] = np.cos(q)
    turns[:, 1, 0] = np.sin(q)
    turns[:, 0, 1] = -turns[:, 1, 0]
    turns[:, 2, 2] = turns[:, 3, 3] = 1
    frames = np.empty((8, 4, 4))  # of each joint before it turns, then of the tcp
    frames[0] = DH_ROWS[0]
    for i in range(7):  # dot, for small matrices, takes a third of the time of @
        frames[i].dot(turns[i]).dot(DH_ROWS[i + 1], out=frames[i + 1])
    tcp = frames[7].dot(HAND_TURN)
    axes, (x, y, z) = frames[:7, :3, 2], (tcp[:3, 3] - frames[:7, :3, 3]).T
    jacobian = np.empty((7, 6)).T
    jacobian[0] = axes[:, 1] * z - axes[:, 2] * y  # np.cross would take as long as all the rest
    jacobian[1] = axes[:, 2] * x - axes[:, 0] * z
    jacobian[2] = axes[:, 0] * y - axes[:, 1] * x
    jacobian[3:] = axes.T
    return tcp[:3, 3], tcp[:3, :3], jacobian


def inverse_kinematics(q, pos, rot, rest, steps=8):
    """Joints near q (7,) that bring the tcp to pos (3,), rot (3, 3), or as near as they can.

    Levenberg-Marquardt on |pos error|² + (0.3 m)² |rotation error|² + 1e-5 |q - rest|²: unlike
    PyBullet's own, exact beside the joints' limits (turning the switch off) and calm out of reach.
    """
    weight, lean, damping, one = np.array([1, 1, 1, 0.3, 0.3, 0.3]), 1e-5, 1e-4, np.eye(7)

    def residual(q):
        p, r, jacobian = forward_kinematics(q)
        d = rot.dot(r.T)  # the rotation still to do
        error = np.empty(6)
        error[:3] = pos - p
        # The antisymmetric part of a small rotation is its vector.
        error[3:] = d[2, 1] - d[1, 2], d[0, 2] - d[2, 0], d[1, 0] - d[0, 1]
        error[3:] /= 2
        error *= weight
        cost = error.dot(error) + lean * np.square(rest - q).sum()
        return error, weight[:, None] * jacobian, cost

    error, jacobian, cost = residual(q)
    for _ in range(steps):
        slope = jacobian.T.dot(error) + lean * (rest - q)
        # A joint at its stop stays there while the slope pushes it further out.
        free = ~(((q <= JOINT_LOW) & (slope < 0)) | ((q >= JOINT_HIGH) & (slope > 0)))
        hessian = jacobian.T.dot(jacobian) * (free[:, None] & free) + (lean + damping) * one
        step = np.linalg.solve(hessian, slope * free)
        trial = np.minimum(np.maximum(q + step, JOINT_LOW), JOINT_HIGH)
        new = residual(trial)
        if new[2] < cost:
            q, (error, jacobian, cost), damping = trial, new, damping / 4
        else:
            damping *= 8
        if np.abs(step).max() < 1e-6:
            break
    return q


class PlayTable:
    """CALVIN's environment D; target_pos (3,), target_euler (3,) are the pose that actions move."""

    def __init__(self, static_size=64, gripper_size=64, render=True):
        """Sizes of the square images in pixels. render=False: no images, whatever step is asked."""
        try:
            import pybullet
            import pybullet_data
        except ImportError as error:
            raise ImportError("sim.PlayTable needs PyBullet: pip install pybullet") from error
        self.sizes, self.render = {"static": static_size, "gripper": gripper_size}, render
        panda = panda_urdf(os.path.join(pybullet_data.getDataPath(), "franka_panda"))
        self.urdfs = {"panda": (panda, ROBOT_BASE), "table": (table_urdf(), (0, 0, 0))}
        own = {"physicsClientId": pybullet.connect(pybullet.DIRECT)}  # several tables in a process
        bullet = {k: partial(v, **own) if callable(v) else v for k, v in vars(pybullet).items()}
        self.p = SimpleNamespace(**bullet)
        self.reset()

    def _box(self, half, colour, at, mass):
        shape = self.p.createCollisionShape(self.p.GEOM_BOX, halfExtents=half)
        look = self.p.createVisualShape(self.p.GEOM_BOX, halfExtents=half, rgbaColor=[*colour, 1])
        return self.p.createMultiBody(mass, shape, look, at)

    def _index(self, body, name):
        """{name: number} of a body's joints (name=1) or links (name=12)."""
        info = [self.p.getJointInfo(body, i) for i in range(self.p.getNumJoints(body))]
        return {i[name].decode(): i[0] for i in info}

    def _build(self):
        """A new scene, for Bullet keeps a solver history, and its saved states not all of it."""
        p = self.p
        p.resetSimulation()
        p.setPhysicsEngineParameter(1 / PHYSICS_HZ, deterministicOverlappingPairs=1)
        p.setGravity(0, 0, -9.8)
        with tempfile.TemporaryDirectory() as folder:  # PyBullet loads URDF from files only
            for name, (urdf, at) in self.urdfs.items():
                with open(os.path.join(folder, name), "w") as file:
                    file.write(urdf)
                setattr(self, name, p.loadURDF(file.name, at, useFixedBase=True))
        self._box([4, 4, 0.05], FLOOR, [0, 0, -0.05], 0)
        self.blocks = {}
        for name, (colour, length) in BLOCKS.items():
            self.blocks[name] = self._box([length / 2, 0.02, 0.02], colour, [0, 0, 1], 1)
            p.changeDynamics(self.blocks[name], -1, lateralFriction=0.7, spinningFriction=0.001)
        self.links = {**self._index(self.table, 12), TOP: -1}
        self.joints = self._index(self.table, 1)
        panda = self._index(self.panda, 12)
        self.hand, self.tcp = panda["panda_hand"], panda["panda_grasptarget"]
        self.arm = [panda[f"panda_link{i}"] for i in range(1, 8)]
        self.fingers = left, right = [panda[f"panda_{side}finger"] for side in ("left", "right")]
        for i in range(-1, left):
            p.changeVisualShape(self.panda, i, rgbaColor=[*(HAND if i >= self.arm[6] else ARM), 1])
        mirror = (self.panda, left, self.panda, right, p.JOINT_GEAR, [1, 0, 0], [0] * 3, [0] * 3)
        p.changeConstraint(p.createConstraint(*mirror), gearRatio=-1, erp=0.1, maxForce=50)
        for name in TRAVEL:  # a spring for the button; friction, a motor that wants velocity 0
            mode = p.POSITION_CONTROL if name == BUTTON else p.VELOCITY_CONTROL
            p.setJointMotorControl2(self.table, self.joints[name], mode, 0, force=HOLD_FORCE)

    def reset(self, robot_obs=None, scene_obs=None):
        """Restore robot_obs (15,), scene_obs (24,); None: the benchmark's pose, a default scene."""
        robot = ROBOT_OBS0 if robot_obs is None else robot_obs
        robot = _numbers("robot_obs", robot, 15, {14: (-1, 1)})
        scene = SCENE_OBS0 if scene_obs is None else scene_obs
        scene = _numbers("scene_obs", scene, 24, {4: (0, 1), 5: (0, 1)})
        self._build()
        p, fingers = self.p, [robot[6] / 2] * 2
        for i, q in zip(self.arm + self.fingers, [*robot[7:14], *fingers], strict=True):
            p.resetJointState(self.panda, i, q)
        for name, q in zip(TRAVEL, scene[:4], strict=True):
            p.resetJointState(self.table, self.joints[name], q)
        for body, pose in zip(self.blocks.values(), scene[6:].reshape(3, 6), strict=True):
            p.resetBasePositionAndOrientation(body, pose[:3], p.getQuaternionFromEuler(pose[3:]))
        self.lights = {}
        for light, state in zip(LIGHTS, scene[4:6], strict=True):
            self._set_light(light, int(state))
        # As in CALVIN, the first step counts a switch restored on its far side as just flipped.
        self._on_side, self._pressed = False, self._joint(BUTTON) > TRAVEL[BUTTON] / 2
        pos, orn = p.getLinkState(self.panda, self.tcp, 0, 1)[4:6]
        self.target_pos, self.target_euler = np.array(pos), np.array(p.getEulerFromQuaternion(orn))
        self.q = np.clip(robot[7:14], JOINT_LOW, JOINT_HIGH)  # where the motors want the joints
        self._drive(self.q, int(robot[14]))
        p.stepSimulation()  # as in CALVIN: what lies within 0.2 mm of a surface now touches it
        p.performCollisionDetection()
        return self.get_obs()

    def step(self, action, render=True):
        """Move the target by action (7,) and wait 1/30 s: observation, 0.0, False, info."""
        action, p = _numbers("action", action, 7, {6: (-1, 1)}), self.p
        self.target_pos = self.target_pos + POS_SCALE * action[:3]
        euler = self.target_euler + EULER_SCALE * action[3:6]
        self.target_euler = (euler + np.pi) % (2 * np.pi) - np.pi
        rot = p.getMatrixFromQuaternion(p.getQuaternionFromEuler(self.target_euler))
        rest = ROBOT_OBS0[7:14]  # the arm's spare joint leans towards its first pose
        self.q = inverse_kinematics(self.q, self.target_pos, np.reshape(rot, (3, 3)), rest)
        self._drive(self.q, int(action[6]))
        for _ in range(PHYSICS_HZ // CONTROL_HZ):
            p.stepSimulation()
        # The switch's side sets the bulb when it changes; each press of the button toggles the led.
        on_side, pressed = (self._joint(x) > TRAVEL[x] / 2 for x in (SWITCH, BUTTON))
        if on_side != self._on_side:
            self._set_light("lightbulb", int(on_side))
        if pressed and not self._pressed:
            self._set_light("led", 1 - self.lights["led"])
        self._on_side, self._pressed = on_side, pressed
        return self.get_obs(render), 0.0, False, self.get_info()

    def _drive(self, joints, gripper):
        """Servo the arm to joints (7,); close or open the fingers until something stops them."""
        p, self.gripper_action = self.p, gripper
        for i, q in zip(self.arm, joints, strict=True):
            p.setJointMotorControl2(self.panda, i, p.POSITION_CONTROL, q, **ARM_MOTOR)
        goal, force = (0.04, OPEN_FORCE) if gripper == 1 else (0, GRIP_FORCE)
        motor = {"targetPosition": goal, "force": force, "maxVelocity": 1}
        for i in self.fingers:
            p.setJointMotorControl2(self.panda, i, p.POSITION_CONTROL, **motor)

    def _set_light(self, light, state):
        self.lights[light], (link, colour) = state, LIGHTS[light]
        colour = [*(colour if state else OFF), 1]
        self.p.changeVisualShape(self.table, self.links[link], rgbaColor=colour)

    def _joint(self, name):
        return self.p.getJointState(self.table, self.joints[name])[0]

    def get_obs(self, render=True):
        """The observation now: robot_obs (15,), scene_obs (24,) and, if rendered, rgb_obs."""
        p, scene = self.p, [*map(self._joint, TRAVEL), *self.lights.values()]
        pos, orn = p.getLinkState(self.panda, self.tcp, 0, 1)[4:6]
        q = [state[0] for state in p.getJointStates(self.panda, self.arm + self.fingers)]
        robot = [*pos, *p.getEulerFromQuaternion(orn), q[7] + q[8], *q[:7], self.gripper_action]
        for body in self.blocks.values():
            pos, orn = p.getBasePositionAndOrientation(body)
            scene += [*pos, *p.getEulerFromQuaternion(orn)]
        obs = {"robot_obs": np.array(robot, float), "scene_obs": np.array(scene, float)}
        if render and self.render:
            obs["rgb_obs"] = {f"rgb_{name}": self.camera(name)[0] for name in self.sizes}
        return obs

    def camera(self, name):
        """Image (size, size, 3) uint8, "static" or "gripper"; per pixel body + (link + 1 << 24)."""
        p, size = self.p, self.sizes[name]
        if name == "static":
            view, fov = p.computeViewMatrix(STATIC_EYE, STATIC_AT, STATIC_UP), STATIC_FOV
        else:
            hand = p.getLinkState(self.panda, self.hand, 0, 1)[4:6]
            mount = GRIPPER_XYZ, p.getQuaternionFromEuler(GRIPPER_RPY)
            eye, orn = p.multiplyTransforms(*hand, *mount)
            axes = np.reshape(p.getMatrixFromQuaternion(orn), (3, 3))
            view, fov = p.computeViewMatrix(eye, eye + axes[:, 1], -axes[:, 2]), GRIPPER_FOV
        lens = p.computeProjectionMatrixFOV(fov, 1, 0.01, 10)
        how = {"renderer": p.ER_TINY_RENDERER, "flags": p.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX}
        image, _, owner = p.getCameraImage(size, size, view, lens, **SHADING, **how)[2:]
        image, owner = np.reshape(image, (size, size, 4))[..., :3], np.reshape(owner, (size, size))
        return np.where(owner[..., None] < 0, SKY, image).astype(np.uint8), owner

    def get_info(self):
        """Contacts and states in the layout of calvin_env's info: what its oracle and ours read."""
        p, blocks = self.p, {}
        keys = ("current_pos", "current_orn", "current_lin_vel", "current_ang_vel")
        for name, body in self.blocks.items():
            state = (*p.getBasePositionAndOrientation(body), *p.getBaseVelocity(body))
            touching = {"uid": body, "contacts": p.getContactPoints(body)}
            blocks[name] = touching | dict(zip(keys, state, strict=True))
        scene = {"movable_objects": blocks}
        scene["fixed_objects"] = {"table": {"uid": self.table, "links": self.links}}
        scene["doors"] = {x: {"current_state": self._joint(x)} for x in (SLIDE, DRAWER)}
        scene["lights"] = {x: {"logical_state": on} for x, on in self.lights.items()}
        robot = {"uid": self.panda, "contacts": p.getContactPoints(self.panda)}
        return {"robot_info": robot, "scene_info": scene}

    def close(self):
        """End the physics; the table is of no use afterwards."""
        if self.p.isConnected():
            self.p.disconnect()
