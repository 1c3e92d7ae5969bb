"""The reactive operator that plays with the table, and the recorder. LUMOS Sec. V-B, App. E.

rates      python teleop.py rates --n 20 --procs 2       success and steps of each of the 34 tasks
record     python teleop.py record DIR --frames N --val-frames M --procs P --seed S --skip 2
           long unsegmented play in CALVIN's on-disk format, with language from the oracle
both take  --env calvin        and play in CALVIN's own simulator, with its own oracle

`act(task, seen)` is a pure function: it has no way-points, no phases and no memory. One idea
carries every skill: the hand keeps a distance from its goal that grows with its error beside the
goal (a cone). Approach, correction and retry are then one law, and whatever pushes the hand aside
is answered from what is seen.

             want = slope * (off - tol)            high while off the axis, down where on it
    funnel   to a point along an axis              to grasp, to put down, to press
    stroke   the same, and on along a way          to push, to slide, to pull

frame      t                t+1              rel_actions[t]: commanded at t, held for `skip` steps
           o_t -- a_t -->   o_{t+1}          actions[t]: the tcp pose of frame t+1, and the gripper
Copy this file together with sim.py, calvin.py and data.py. Needs: numpy, scipy, tqdm.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import calvin
import sim

BLOCKS = ("block_red", "block_blue", "block_pink")
SIZES = {
    "block_red": (0.056, 0.04, 0.04),
    "block_blue": (0.04,) * 3,
    "block_pink": (0.08, 0.04, 0.04),
}
UP, SLOPE = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.5, 0.866])  # the second: up the cabinet
DOWN = np.array([np.pi, 0.0, 1.5])  # euler xyz: fingers down, opening along the world's x
NEUTRAL = np.array([0.026, -0.231, 0.571])  # m, the benchmark's start
OPEN, CLOSE = 1, -1
SPEED, TURN, GAIN = 0.036, 0.1, 0.35  # m, rad and share of the error, per action
LEASH = 0.05  # m, how far the commanded pose may be ahead of the hand
GATE = 0.015  # m beside a block at which the fingers close: a third of it is a learner's error
TABLE_X, TABLE_Y = (0.02, 0.30), (-0.14, -0.07)  # m, where a block may be put down on the table
SHELVES = {"left": (-0.28, -0.20), "right": (-0.02, 0.09)}  # m, x ranges of the cabinet's halves
ROOM = np.array([(-0.25, -0.26, 0.45), (0.32, 0.0, 0.58)])  # m, where a burst may lead the hand
BURSTS = ("push", 6), ("fingers", 6), ("belief", 15), ("astray", 12)  # most frames of each
EPISODE = 200, 600  # steps, then a new scene: what a world model finds hard is scenes, not motion
SPAN = 64  # steps that an annotated span has at most, as CALVIN's
LANG = "lang_paraphrase-MiniLM-L3-v2"
PATIENCE = 180  # steps, then a skill has failed
PLACES = (0.40, 0.13, 0.13, 0.22, 0.12)  # a block on the table, left, right, in the drawer, on top
ASSETS = Path(__file__).resolve().parent / "assets"


# ------------------------------------------------------------------------------------ what is seen
class Seen(NamedTuple):
    """Arm and table as cameras and arm show them. Metres and radians."""

    tcp: np.ndarray  # (3,)
    euler: np.ndarray  # (3,) xyz
    width: float  # between the fingers
    grip: int  # OPEN or CLOSE, the last command
    door: float
    drawer: float
    button: float
    switch: float
    led: int
    at: dict  # block: its position (3,)
    axes: dict  # block: its rotation (3, 3)
    target: np.ndarray  # (3,) the commanded position, which an arm knows


def see(env, obs):
    """An environment's observation -> Seen."""
    robot, scene = obs["robot_obs"], obs["scene_obs"]
    poses = dict(zip(BLOCKS, scene[6:].reshape(3, 6), strict=True))
    return Seen(
        robot[:3], robot[3:6], robot[6], int(robot[14]), *scene[:4], int(scene[5]),
        {b: pose[:3] for b, pose in poses.items()},
        {b: Rotation.from_euler("xyz", pose[3:]).as_matrix() for b, pose in poses.items()},
        np.array(env.target_pos),
    )  # fmt: skip


def wrap(angle):
    """Angles to [-π, π)."""
    return (np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi


def unit(*v):
    return np.array(v) / np.linalg.norm(v)


def held(seen):
    """The block between the closed fingers, or None."""
    if seen.grip == OPEN or not 0.03 < seen.width < 0.062:
        return None
    level = [b for b in BLOCKS if abs(seen.at[b][2] - seen.tcp[2]) < 0.048]
    return nearest(seen, [b for b in level if gap(seen, b, seen.tcp) < 0.008])


def nearest(seen, blocks):
    return min(blocks, key=lambda b: np.linalg.norm(seen.at[b] - seen.tcp), default=None)


def place_of(seen, block):
    """'table', 'left', 'right' (half of the cabinet), 'drawer', 'top' (of a block), 'lost'."""
    x, y, z = seen.at[block]
    if z < 0.42:
        inside = z > 0.3 and 0 < x < 0.36 and -0.157 - seen.drawer < y < -0.15
        return "drawer" if inside else "lost"
    if y > 0.03:
        return "left" if x < -0.12 else "right"
    if not (-0.42 < x < 0.42 and y > -0.18 and z < 0.6):
        return "lost"
    return "top" if z > 0.485 else "table"


def lying(seen, *places):
    """The blocks in these places that are not in the hand."""
    return [b for b in BLOCKS if place_of(seen, b) in places and b != held(seen)]


def half_size(seen, block, axis):
    """Half of a block's extent along a world axis (0, 1 or 2)."""
    return np.abs(seen.axes[block][axis]) @ SIZES[block] / 2


def gap(seen, block, point):
    """Horizontal distance from a point to a block's outline, 0 inside."""
    axes = seen.axes[block]
    beyond = np.abs((point - seen.at[block]) @ axes) - np.array(SIZES[block]) / 2
    return np.linalg.norm(np.maximum(beyond, 0) * (np.abs(axes[2]) < 0.6))


def clear(seen):
    """Height at which the hand passes over everything on the table."""
    tops = [seen.at[b][2] + 0.02 for b in lying(seen, "table", "top")]
    return min(max([0.48, *tops]), 0.56) + 0.035 + 0.03 * (held(seen) is not None)


# ----------------------------------------------------------------------------------------- the laws
# A law returns where the hand should go: position (3,), euler (3,), gripper.
def cone(seen, goal, axis, aside, along, off, far, slope, tol=0.010):
    """The one idea: kept from `goal` along `axis`, at most by `far`, by slope times what is off.

    aside (3,), along: where the hand is, across and along the axis from the goal. Sideways it goes
    only as far as it is high enough.
    """
    want = np.clip(slope * (off - tol), 0, far)
    share = np.clip(1 - (want - along - 0.008) / 0.05, 0.03, 1)
    return goal + want * axis + (1 - share) * aside


def amiss(seen, aside, euler, fingers):
    """How much is off (m): across, turned by more than 0.1 rad, the fingers by `fingers` (m)."""
    turned = np.abs(wrap(euler - seen.euler)).max()
    return np.linalg.norm(aside) + 0.04 * max(0, turned - 0.1) + 0.5 * max(0, fingers)


def funnel(seen, goal, axis, far, euler, fingers=0.0, tol=0.010, slope=2.5):
    """To a point against an axis: position (3,), what is off (m), distance along the axis (m)."""
    along = (seen.tcp - goal) @ axis
    aside = seen.tcp - goal - along * axis
    off = amiss(seen, aside, euler, fingers)
    return cone(seen, goal, axis, aside, along, off, far, slope, tol), off, along


def travel(seen, pos, off, euler, grip):
    """From far off: out of the cabinet, up, across. Beside a block the fingers stay as they are."""
    tcp = seen.tcp
    far, high = np.clip((off - 0.03) / 0.04, 0, 1), clear(seen)
    low = far * np.clip((high - tcp[2]) / 0.04, 0, 1)
    across = pos[:2] + low * (tcp[:2] - pos[:2])
    pos = np.array([*across, pos[2] + far * max(0, high + 0.005 - pos[2])])
    inside = far * np.clip((tcp[1] + 0.04) / 0.03, 0, 1) * (tcp[2] < 0.70)
    back = np.array([tcp[0], -0.12, max(tcp[2] + 0.02, 0.5)])
    pos = pos + inside * (back - pos)
    euler = euler + inside * wrap(upright(seen) - euler)
    for block in BLOCKS:
        x, y, z = seen.at[block] - tcp
        if np.hypot(x, y) < 0.06 and -0.032 < z < 0.05:
            grip = seen.grip
    return pos, euler, grip


def stroke(seen, at, way, axis, far, euler, lead, ahead=0.025, back=0.03, slope=2.5):
    """Closed fingers come to `at` against `axis`, then go on along `way`, `lead` per action.

    ahead, back: how far before and behind `at` along the way the hand may be to go on (m).
    """
    rel, cosine = seen.tcp - at, way @ axis
    t, along = np.linalg.solve([[1, cosine], [cosine, 1]], [rel @ way, rel @ axis])
    aside = rel - t * way - along * axis
    wrong = max(0.0, t - ahead, -t - back)
    off = amiss(seen, aside, euler, seen.width - 0.01) + wrong
    aside = aside + t * way * (wrong > 0)
    pos = cone(seen, at, axis, aside, along, off, far, slope)
    push = np.clip(1.5 - along / 0.012, 0, 1) * np.clip(1.7 - off / GATE, 0, 1)
    return travel(seen, pos + way * (push * (max(t, 0) + lead)), off, euler, CLOSE)


def rise(seen):
    return travel(seen, np.array([*seen.tcp[:2], 0.56]), 1.0, upright(seen), OPEN)


def upright(seen):
    return np.array([np.pi, *seen.euler[1:]])


def lean(pos):
    """Euler of a hand at pos (3,): far from the base it leans back towards it."""
    far = np.hypot(pos[0] + 0.34, pos[1] + 0.46) + 0.3 * max(0, pos[2] - 0.47)
    return np.array([np.pi, -6 * np.clip(far - 0.70, 0, 0.08), 1.5])


def grasp_yaw(seen, block, turn):
    """The hand's yaw that puts the fingers across a block. turn: the rotation to come."""
    at, axes, best = seen.at[block], seen.axes[block], (np.inf, 1.5)
    others = [b for b in BLOCKS if b != block and seen.at[b][2] - at[2] > -0.02]
    for i, width in enumerate(SIZES[block]):
        if width > 0.06 or abs(axes[2, i]) > 0.6:  # too wide, or upright
            continue
        across = np.arctan2(axes[1, i], axes[0, i]) - np.pi / 2
        for half_turn in (0, np.pi):
            off = float(wrap(across + half_turn - 1.5))
            f = np.array([-np.sin(1.5 + off), np.cos(1.5 + off), 0.0])
            tips = [at + side * (width / 2 + 0.025) * f for side in (-1, 1)]
            hits = sum(gap(seen, b, tip) < 0.012 for b in others for tip in tips)
            if at[2] < 0.42:  # the drawer's walls and the table's edge
                rear = -0.14 - seen.drawer
                hits += sum(not (0.02 < x < 0.34 and rear < y < -0.2) for x, y, _ in tips)
            if at[1] > 0.03 and abs(off) > 0.8:  # the hand cannot turn in the cabinet
                continue
            # Little turning, none to the wrist's limits, the short side, no neighbours.
            here = abs(float(wrap(1.5 + off - seen.euler[2])))
            cost = abs(off + turn / 2) + 0.3 * here + 3 * hits + 12 * (width - 0.04)
            cost += 8 * max(0, abs(off) - 2.6, abs(off + turn) - 2.6)
            best = min(best, (cost, 1.5 + off))
    return best[1]


def take(seen, block, turn=0.0):
    """Goes to a block and closes the fingers."""
    at, yaw = seen.at[block], grasp_yaw(seen, block, turn)
    if at[1] > 0.03:  # in the cabinet the hand leans out, and grasps high: it must clear the door
        euler = np.array([np.pi, -0.9, np.clip(yaw, 1.25, 1.75)])
        goal, axis = at - (0, 0.008, -0.010), unit(0, -0.15, 0.07)
        far, slope = 0.19, 4.0
    else:
        euler = np.array([np.pi, lean(at)[1], yaw])
        goal, axis, slope = at + 0.004 * UP, UP, 2.5
        far = max(0.065, (clear(seen) if at[2] > 0.42 else 0.495) - at[2])
    pos, off, along = funnel(seen, goal, axis, far, euler, 0.07 - seen.width, slope=slope)
    aside = np.linalg.norm(seen.tcp - goal - along * axis)
    turned = np.abs(wrap(euler - seen.euler)).max()
    if aside < GATE and abs(along) < 0.012 and turned < 0.25:
        return goal, euler, CLOSE
    pos, euler, grip = travel(seen, pos, off, euler, OPEN)
    astride = aside < GATE and turned < 0.3
    return pos, euler, OPEN if astride else grip


def put(seen, block, xy, z, pitch, yaw=None, far=0.06, axis=UP, gate=GATE, slope=2.5):
    """Brings the held block's centre to (xy, z) and lets go."""
    euler = np.array([np.pi, pitch, seen.euler[2] if yaw is None else yaw])
    goal = np.array([*xy, z + 0.004]) + seen.tcp - seen.at[block]
    goal[2] = max(goal[2], z + 0.001)  # not with the finger tips into what is below
    pos, off, along = funnel(seen, goal, axis, far, euler, tol=0.6 * gate, slope=slope)
    if off < gate and along < 0.010:
        return seen.tcp, euler, OPEN
    pos, euler, _ = travel(seen, pos, off, euler, CLOSE)
    return pos, euler, CLOSE


def spot(seen, block, xs, ys):
    """The place (2,) in the ranges with most room, and rather near."""
    others = [seen.at[b][:2] for b in BLOCKS if b != block]
    grid = [np.array([x, y]) for x in np.linspace(*xs, 9) for y in np.linspace(*ys, 3)]
    room = [min([0.09, *(np.linalg.norm(g - o) for o in others)]) for g in grid]
    cost = [0.1 * np.linalg.norm(g - seen.at[block][:2]) for g in grid]
    return grid[int(np.argmax(np.subtract(room, cost)))]


def level(seen, block):
    """Pitch at which the held block is level: undoes the tilt it was grasped with."""
    axes, yaw = seen.axes[block], seen.euler[2]
    up = axes[:, np.argmax(np.abs(axes[2]))]
    up = up * np.sign(up[2])
    hinge = np.array([-np.sin(yaw), np.cos(yaw), 0.0])  # the axis that pitch turns about
    tilt = np.arctan2(hinge @ np.cross(UP, up), up[2])
    return np.clip(seen.euler[1] - tilt, -0.9, 0.5)


def set_down(seen, block):
    return put(seen, block, spot(seen, block, TABLE_X, TABLE_Y), 0.46, level(seen, block))


def lift(seen, block):
    if held(seen) != block:
        return take(seen, block)
    x, y, z = seen.tcp
    if y > -0.05:  # in the cabinet: up a little, then out
        out = np.clip((z - 0.49) / 0.03, 0, 1)
        way = np.array([0, -0.1 - 0.8 * out, 0.8 - 0.4 * out])
        return seen.tcp + 0.09 * way, upright(seen), CLOSE
    return np.array([x, y, min(z + 0.09, max(0.62, z))]), upright(seen), CLOSE


def rotate(seen, block, sign):
    """Turned where it lies, until the rule is content or the wrist at its limit."""
    if held(seen) != block:
        return take(seen, block, 1.27 * sign)
    euler = np.array([np.pi, lean(seen.at[block])[1], seen.euler[2] + 0.3 * sign])
    limit = sign * wrap(seen.euler[2] - 1.5) > 2.6
    pos = seen.tcp + (0.46 - seen.at[block][2]) * UP
    return pos, euler, OPEN if limit else CLOSE


def beside(seen, block, sign):
    """Where the fingers stand to push a block along x."""
    half = half_size(seen, block, 0) + 0.03  # and a finger
    return np.array([seen.at[block][0] - sign * half, seen.at[block][1], 0.462])


def push(seen, block, sign):
    at = beside(seen, block, sign)
    way = np.array([sign, 0.0, 0.0])
    return stroke(seen, at, way, UP, clear(seen) - 0.462, lean(at), 0.055)


def push_into_drawer(seen, free):
    """free: the blocks that lay on the table alone at the start: CALVIN's rule counts no others."""
    ok = [b for b in lying(seen, "table") if b in free and 0.02 < seen.at[b][0] < 0.34]
    if not ok:
        return rise(seen)
    block = min(ok, key=lambda b: seen.at[b][1])  # the nearest to it, more so when it is pushed
    y = min(seen.at[block][1] + half_size(seen, block, 1) + 0.026, 0.0)
    at = np.array([seen.at[block][0], y, 0.466])
    return stroke(seen, at, np.array([0, -1.0, 0]), UP, clear(seen) - 0.466, DOWN, 0.10)


def slider(seen, left):
    sign = -1 if left else 1
    at = np.array([0.04 - seen.door - sign * 0.05, -0.018, 0.51])
    euler, way = np.array([np.pi, -0.45, 1.5]), np.array([sign, 0.0, 0.0])
    return stroke(seen, at, way, unit(0, -1, 0.3), 0.07, euler, 0.08, ahead=0.03)


def drawer(seen, opens):
    if opens:  # the fingers hook behind the handle
        at, way = np.array([0.17, -0.212 - seen.drawer, 0.352]), np.array([0, -1.0, 0])
        return stroke(seen, at, way, UP, 0.148, DOWN, 0.08, 0.026, 0.018, slope=4.0)
    at, way = np.array([0.18, -0.283 - seen.drawer, 0.367]), np.array([0, 1.0, 0])
    return stroke(seen, at, way, UP, 0.10, DOWN, 0.08, 0.022, 0.06)


def led(seen, on):
    done = seen.button > 0.008 or seen.led == on  # a button that is pressed must come up first
    goal = np.array([-0.12, -0.12, 0.53 if done else 0.43])
    pos, off, _ = funnel(seen, goal, UP, 0.06, DOWN, seen.width - 0.01, slope=3.0)
    return travel(seen, pos, off, DOWN, CLOSE)


def bulb(seen, on):
    """The switch slides along the cabinet's front: pushed up from below, down from above."""
    if on:
        at, euler = np.array([0.29, 0.015, 0.475]), np.array([np.pi, -0.9, 1.5])
        axis, at = unit(0, -0.866, 0.5), at + SLOPE * seen.switch
        return stroke(seen, at, SLOPE, axis, 0.115, euler, 0.07, 0.032)
    at, euler = np.array([0.27, 0.082, 0.655]), np.array([np.pi, -0.7, 1.5])
    axis, at = unit(0, -1, 0.2), at - SLOPE * (0.088 - seen.switch)
    return stroke(seen, at, -SLOPE, axis, 0.17, euler, 0.07, 0.035)


def fetch(seen, *places):
    """The hand is empty: away from a block that it has just let go of, or to the nearest one."""
    block = nearest(seen, BLOCKS)
    near = np.linalg.norm(seen.at[block] - seen.tcp) < 0.035
    if near and place_of(seen, block) not in places:
        back = np.array([0, -0.03, 0.03]) if seen.at[block][1] > 0.03 else 0.04 * UP
        return seen.tcp + 1.5 * back, upright(seen), OPEN
    block = nearest(seen, lying(seen, *places))
    return take(seen, block) if block else rise(seen)


def place(seen, where):
    block = held(seen)
    if not block:
        return fetch(seen, "table", "top")
    pitch, yaw = level(seen, block), np.clip(seen.euler[2], 0.9, 2.1)
    if where == "drawer":
        xy = spot(seen, block, (0.07, 0.29), (-0.10 - seen.drawer, -0.245))
        return put(seen, block, xy, 0.367, pitch, far=0.12, gate=0.025)
    xy = spot(seen, block, (0.0, 0.08) if seen.door > 0.14 else (-0.27, -0.20), (0.07, 0.085))
    how = {"far": 0.2, "axis": unit(0, -0.117, 0.08), "gate": 0.02, "slope": 4.0}
    return put(seen, block, xy, 0.474, min(pitch, -0.35), yaw, **how)


def stack(seen):
    block = held(seen)
    base = nearest(seen, lying(seen, "table"))
    if not block or not base:
        return fetch(seen, "table")
    return put(seen, block, seen.at[base][:2], 0.502, level(seen, block), far=0.05, gate=0.014)


def unstack(seen):
    block, tops = held(seen), lying(seen, "top")
    if block and tops:
        return set_down(seen, block)
    if block or tops:
        return lift(seen, block or max(tops, key=lambda b: seen.at[b][2]))
    return rise(seen)


def law(task, seen, free):
    """Where the hand should go now to do `task`."""
    kind, *_, last = words = task.split("_")
    block = next((b for b in BLOCKS if b[6:] in words), None)
    in_hand = held(seen)
    if kind == "place":
        return place(seen, last)
    if kind in ("stack", "unstack"):
        return stack(seen) if kind == "stack" else unstack(seen)
    if in_hand and (in_hand != block or kind == "push"):
        return set_down(seen, in_hand)
    if kind == "lift":
        return lift(seen, block)
    if kind == "rotate":
        return rotate(seen, block, 1 if last == "left" else -1)
    if kind == "push" and block:
        return push(seen, block, 1 if last == "right" else -1)
    if kind == "push":
        return push_into_drawer(seen, free)
    if kind == "turn":
        return led(seen, words[1] == "on") if last == "led" else bulb(seen, words[1] == "on")
    return slider(seen, last == "left") if kind == "move" else drawer(seen, kind == "open")


def act(task, seen, free=BLOCKS, skip=2):
    """The operator: action (7,), to be held for `skip` steps. A pure function."""
    if task not in sim.TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(sim.TASKS)}")
    return towards(seen, *law(task, seen, free), skip)


def towards(seen, pos, euler, grip, skip, speed=SPEED):
    """The action that brings the hand nearer, by a share of the way."""
    move = pos - seen.tcp
    far = np.linalg.norm(move)
    move = move * min(GAIN, speed / max(far, 1e-9))
    turn = np.clip(GAIN * wrap(euler - seen.euler), -TURN, TURN)
    return action(seen, move, turn, grip, skip)


def action(seen, move, turn, grip, skip):
    """move (3,) m and turn (3,) rad in `skip` steps -> (7,); the target stays on its leash."""
    lead = seen.target + move - seen.tcp
    length = np.linalg.norm(lead)
    if length > LEASH:
        move = seen.tcp + lead * (LEASH / length) - seen.target
    arm = np.concatenate([move / sim.POS_SCALE, turn / sim.EULER_SCALE]) / skip
    return np.append(np.clip(arm, -1, 1), grip)


def free_blocks(info):
    """The blocks that lie on the table top alone, for push_into_drawer."""
    scene = info["scene_info"]
    table = scene["fixed_objects"]["table"]
    alone = {(table["uid"], table["links"]["base_link"])}
    blocks = scene["movable_objects"]
    return [b for b in BLOCKS if {(c[2], c[4]) for c in blocks[b]["contacts"]} == alone]


def attempt(env, oracle, task, max_steps=360, skip=2):
    """The operator does a task from wherever the scene is: (solved, simulator steps)."""
    start, obs = env.get_info(), env.get_obs(render=False)
    free = free_blocks(start)
    for t in range(max_steps):
        if t % skip == 0:
            a = act(task, see(env, obs), free, skip)
        obs, _, _, info = env.step(a, render=False)
        if oracle(start, info, task):
            return True, t + 1
    return False, max_steps


def feasible(seen, alone):
    """The tasks that make sense now, by CALVIN's conditions; a held block can be put down first.

    alone: `free_blocks` now: what the robot or another block touches cannot be pushed into the
    drawer, by CALVIN's rule.
    """
    in_hand, table, top = held(seen), lying(seen, "table"), lying(seen, "top")
    free = [b for b in table if all(gap(seen, b, seen.at[t]) > 0.02 for t in top)]
    ajar = {"left": seen.door < 0.06, "right": seen.door > 0.22}  # the halves that stand open
    ok = {
        "move_slider_left": seen.door < 0.1, "move_slider_right": seen.door > 0.18,
        "open_drawer": seen.drawer < 0.08, "close_drawer": seen.drawer > 0.14,
        f"turn_{'off' if seen.switch > 0.044 else 'on'}_lightbulb": True,
        f"turn_{'off' if seen.led else 'on'}_led": True, "unstack_block": bool(top),
        "place_in_slider": in_hand and (ajar["left"] or ajar["right"]),
        "place_in_drawer": in_hand and seen.drawer > 0.17, "stack_block": in_hand and free,
        "push_into_drawer": seen.drawer > 0.17 and any(0.04 < seen.at[b][0] < 0.32 for b in alone),
    }  # fmt: skip
    for b in BLOCKS:
        name, where, x = b[6:], place_of(seen, b), seen.at[b][0]
        loose, far = b in free, np.hypot(x + 0.34, seen.at[b][1] + 0.46)
        ok[f"lift_{name}_block_table"] = loose and far < 0.77
        ok[f"lift_{name}_block_drawer"] = where == "drawer" and seen.drawer > 0.17 and b != in_hand
        ok[f"lift_{name}_block_slider"] = ajar.get(where, False) and b != in_hand
        for side, sign in (("right", 1), ("left", -1)):
            room = [gap(seen, o, beside(seen, b, sign)) for o in BLOCKS if o != b]
            free_way = x < 0.27 if sign > 0 else x > 0.045
            ok[f"push_{name}_block_{side}"] = loose and free_way and min(room) > 0.015
        for side in ("left", "right"):
            ok[f"rotate_{name}_block_{side}"] = loose and x > -0.05 and far < 0.76
    return [task for task in sim.TASKS if ok.get(task)]


# ----------------------------------------------------------------------------- scenes and starts
def random_scene(rng, task=None):
    """A random scene_obs (24,): doors, lights, blocks; with a task, one in which it can be done.

    For a task that needs a block in the hand, one in which that block can be picked up.
    """
    scene, words = np.zeros(24), (task or "").split("_")
    scene[0] = rng.choice([0, 0.28]) if rng.random() < 0.85 else rng.uniform(0, 0.28)
    scene[1] = rng.choice([0, 0.22], p=[0.4, 0.6]) if rng.random() < 0.85 else rng.uniform(0, 0.22)
    scene[4:6] = rng.integers(2, size=2)
    if "drawer" in words:
        scene[1] = 0 if words[0] == "open" else 0.22
    if "slider" in words:
        scene[0] = {"left": 0, "right": 0.28}.get(words[-1], rng.choice([0, 0.28]))
    if words[0] == "turn":
        scene[5 if words[2] == "led" else 4] = words[1] == "off"
    scene[3] = 0.088 * scene[4]
    inside = "left" if scene[0] < 0.14 else "right"  # the half of the cabinet that stands open
    put = {}
    for block in sorted(rng.permutation(BLOCKS), key=lambda b: b[6:] not in words):
        kind = str(rng.choice(["table", "left", "right", "drawer", "top"], p=PLACES))
        if task and not put:  # the block that it is about
            lifted = words[-1] if words[0] == "lift" else "table"
            kind = {"slider": inside}.get(lifted, lifted)
        elif words[0] in ("stack", "unstack") and len(put) == 1:
            kind = "table" if words[0] == "stack" else "top"
        elif task == "push_into_drawer":
            kind = str(rng.choice(["left", "right"]))
        low = [b for b, p in put.items() if p[2] == 0.46]
        if task and words[0] != "unstack":
            low = low[1:]  # nothing on top of the block that it is about
        if (kind == "drawer" and scene[1] <= 0.17) or (kind == "top" and not low):
            kind = "table"
        for _ in range(200):
            yaw = np.pi / 2 + rng.uniform(-1, 1) * np.pi / (8 if rng.random() < 0.7 else 1)
            if kind == "top":
                at, yaw = put[low[0]] + 0.041 * UP, scene[11 + 6 * BLOCKS.index(low[0])]
            elif kind == "drawer":
                at = np.array(
                    [rng.uniform(0.06, 0.30), rng.uniform(-0.11 - scene[1], -0.23), 0.363]
                )
            elif kind != "table":  # turned no more than the operator, or the benchmark, puts it
                at = np.array([rng.uniform(*SHELVES[kind]), rng.uniform(0.08, 0.095), 0.462])
                yaw = np.pi / 2 + rng.uniform(-1, 1) * np.pi / 8
            elif rng.random() < 0.5:  # the benchmark's two places, roughly
                x = rng.choice([0.05, 0.23]) + rng.uniform(-0.02, 0.02)
                at = np.array([x, rng.uniform(-0.14, -0.1), 0.46])
            else:
                at = np.array([rng.uniform(*TABLE_X), rng.uniform(*TABLE_Y), 0.46])
            others = [p for b, p in put.items() if not (kind == "top" and b == low[0])]
            if all(np.linalg.norm((at - p)[:2]) > 0.095 for p in others):
                break
            if put or not task:
                kind = str(rng.choice(["table", "left", "right"]))
        put[block] = at
        i = 6 + 6 * BLOCKS.index(block)
        scene[i : i + 6] = *at, 0, 0, yaw
    return scene


def prepare(env, oracle, task, rng, kind):
    """Resets to a random scene in which the task can be done; True if it worked.

    kind 0, 2: at the benchmark's start pose (with a block in the hand, if the task needs one);
    1: where another skill has ended; 3: the same, with a block in the hand.
    """
    obs = env.reset(sim.ROBOT_OBS0, random_scene(rng, task))
    for _ in range(4):
        obs, _, _, info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]), render=False)
    now = feasible(see(env, obs), free_blocks(info))
    others = [t for t in now if t != task]
    lifts = [t for t in others if t.startswith("lift")]
    if task.startswith("place") or task == "stack_block" or kind == 3:
        others = [t for t in lifts if t.split("_")[1] not in task]
    elif kind != 1:
        return task in now
    else:
        others = [t for t in others if t not in lifts]
    done = bool(others) and attempt(env, oracle, str(rng.choice(others)))[0]
    seen = see(env, env.get_obs(render=False))
    return done and task in feasible(seen, free_blocks(env.get_info()))


# -------------------------------------------------------------------------------- in many processes
_worker = {}  # of a worker process: its environment and its oracle


def make_sim(render):
    """The embedded play table and its oracle."""
    return sim.PlayTable(render=render), sim.oracle


def _start_worker(make, render):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["env"], _worker["oracle"] = make(render)


def _end_with_parent():
    """Who repeats the command of a killed parent must not meet its workers at the same files."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(function, job):
    return function(_worker["env"], _worker["oracle"], *job)


def _parallel(function, jobs, sizes, procs, make, render, done=0, what=""):
    """function(env, oracle, *job) for every job, in `procs` processes, each with an environment of
    its own from make(render). Returns the results, in any order; the bar counts `sizes`."""
    context, out = multiprocessing.get_context("spawn"), []
    with (
        tqdm(total=done + sum(sizes), initial=done, desc=what) as bar,
        ProcessPoolExecutor(procs, context, _start_worker, (make, render)) as pool,
    ):
        futures = {pool.submit(_work, function, job): n for job, n in zip(jobs, sizes, strict=True)}
        try:
            for future in as_completed(futures):
                out.append(future.result())
                bar.update(futures[future])
        finally:
            pool.shutdown(cancel_futures=True)
    return out


# -------------------------------------------------------------------------------------------- rates
def _one_rate(env, oracle, task, n, seed):
    for again in range(30):
        rng = np.random.default_rng([seed, sim.TASKS.index(task), n, again])
        if prepare(env, oracle, task, rng, n % 4):
            return task, n, *attempt(env, oracle, task)
    raise RuntimeError(f"{task}: no feasible start in 30 random scenes (seed {seed}, trial {n})")


def rates(n=20, procs=2, seed=0, out=None, make=make_sim):
    """Attempts every task n times: prints, returns and writes to `out` (JSON) {task: figures}."""
    jobs = [(task, k, seed) for task in sim.TASKS for k in range(n)]
    rows = _parallel(_one_rate, jobs, [1] * len(jobs), procs, make, False, what="rates")
    table = {}
    print(f"{'task':26s} {'n':>5s} {'success':>8s} {'median':>7s} {'95 %':>6s} {'<= 64':>7s}")
    for task in [*sim.TASKS, "all"]:
        some = [row for row in rows if task in (row[0], "all")]
        solved = np.array([row[2] for row in some])
        steps = np.array([row[3] for row in some])  # a failure counts as the whole budget
        figures = [solved.mean(), *np.percentile(steps, (50, 95)), np.mean(steps <= 64)]
        names = ("success", "median", "p95", "within64")
        table[task] = dict(zip(names, map(float, figures), strict=True))
        line = f"{task:26s} {len(some):5d} {figures[0]:8.3f} {figures[1]:7.0f} {figures[2]:6.0f}"
        print(f"{line} {figures[3]:7.2f}")
    if out:
        text = json.dumps({"seed": seed, "n": n, "tasks": table}, indent=1)
        write(Path(out), lambda file: file.write(text.encode()))
    return table


# ---------------------------------------------------------------------------------------- recording
SIM = {"source": "sim", "renderer": sim.LOOK, "hz": 30, "action_scale": [0.02, 0.05]}
REMEDY = "Free some space (up to 150 kB a frame) or fix the permissions, and repeat the command"


def write(path, fill):
    """Writes a file beside its place and renames it, so that nobody ever sees half of it."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            fill(file)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        why = f"cannot write {path}: {error.strerror}. {REMEDY}: it goes on where it stopped"
        raise OSError(error.errno, why) from None


class _Full(Exception):
    """The block of frames that a worker was to record is full."""


class Recorder:
    """Plays and records one block of consecutive frames: an episode, or more if a scene got stuck.

    A pure function of its arguments that writes under final names: after a crash it is repeated.
    A frame lasts `skip` steps of the simulator. Time t counts frames.
    """

    def __init__(self, env, oracle, folder, first, length, rng, skip=1, pictures=True):
        self.env, self.oracle, self.folder, self.rng, self.skip = env, oracle, folder, rng, skip
        self.t, self.end, self.pictures = first, first + length, pictures
        self.episodes, self.spans, self.bursts_at, self.rows = [], [], [], []
        self.infos = {}  # frame: what the oracle wants to know of it
        self.count = dict.fromkeys(sim.TASKS, 0)
        self.pairs, self.last = {}, None  # how often a task came after a kind of task; that kind

    @property
    def seen(self):
        return see(self.env, self.obs)

    # ---- one frame ----
    def tick(self, action, start=None, task=None, disturbed=False):
        """Holds an action for one frame and writes it; whether the oracle saw `task` done."""
        seen, solved = self.obs, False
        for k in range(self.skip):
            last = k == self.skip - 1
            obs, _, _, info = self.env.step(action, render=last and self.pictures)
            solved = solved or (task is not None and self.oracle(start, info, task))
        pose = np.append(obs["robot_obs"][:6], action[6])
        frame = {"actions": pose, "rel_actions": action} | seen.get("rgb_obs", {})
        frame |= {key: seen[key] for key in ("robot_obs", "scene_obs")}
        if self.pictures:
            path = self.folder / f"episode_{self.t:07d}.npz"
            write(path, lambda file: np.savez(file, **frame))
        self.rows.append({k: v for k, v in frame.items() if not k.startswith("rgb")})
        self.bursts_at += [self.t] * disturbed
        self.obs, self.t = obs, self.t + 1
        self.infos[self.t] = info
        self.infos.pop(self.t - SPAN - 1, None)
        if self.t == self.end:
            raise _Full
        return solved

    def reset(self, task):
        """Begins an episode. Its first frame carries the state that it was reset to, not what the
        reset's one step of physics made of it, so that a replay from there is exact."""
        start = {"robot_obs": sim.ROBOT_OBS0, "scene_obs": random_scene(self.rng, task)}
        self.obs = self.env.reset(*start.values()) | start
        self.infos = {self.t: self.env.get_info()}

    # ---- play ----
    def play(self):
        """Fills the block. Returns what the parent must know about it, as plain numbers."""
        shortest = EPISODE[0] // self.skip
        try:
            while True:
                start, stuck, task = self.t, 0, self.choose(sim.TASKS)
                full = start + self.rng.integers(*EPISODE) // self.skip
                self.reset(task if self.rng.random() < 0.7 else None)
                self.idle(2)  # blocks come to rest
                if self.rng.random() < 0.5:  # half of the episodes begin away from the start pose
                    self.wander()
                # Over when it is long enough, stuck, or has lost a block, unless this episode or
                # the next would be too short.
                while (stuck < 4 and self.t < full) or (
                    min(self.t - start, self.end - self.t) < shortest
                ):
                    stuck = 0 if self.segment() else stuck + 1
                    stuck += 4 * bool(lying(self.seen, "lost"))
                self.episodes.append((start, self.t - 1))
        except _Full:
            self.episodes.append((start, self.t - 1))
        inside = [any(a <= s[1] <= s[2] <= b for a, b in self.episodes) for s in self.spans]
        spans = [s for s, ok in zip(self.spans, inside, strict=True) if ok]
        states = {k: np.array([row[k] for row in self.rows]) for k in self.rows[0]}
        both = np.concatenate([states["robot_obs"], states["scene_obs"]], 1)
        part = {
            "episodes": self.episodes, "spans": spans, "disturbed": self.bursts_at,
            "sums": [both.sum(0).tolist(), (both**2).sum(0).tolist()],
            "low": states["actions"].min(0).tolist(), "high": states["actions"].max(0).tolist(),
        }  # fmt: skip
        return part, states

    def idle(self, frames):
        for _ in range(frames):
            self.tick(np.array([0, 0, 0, 0, 0, 0, self.obs["robot_obs"][14]]))

    def wander(self, home=False):
        """Reaches about in free space, or goes to where the benchmark starts."""
        seen, rng = self.seen, self.rng
        pos = rng.uniform([-0.28, -0.36, clear(seen)], [0.26, -0.10, 0.66])
        euler = DOWN + rng.normal(size=3) * [0.05, 0.2, 0.5]
        grip = CLOSE if held(seen) else int(rng.choice([OPEN, CLOSE]))
        speed, frames = rng.uniform(0.012, SPEED), rng.integers(4, 20)
        if home:
            pos, euler, speed, frames = NEUTRAL, DOWN, SPEED, 25
            grip = CLOSE if held(seen) else OPEN
        for _ in range(frames):
            way = travel(seen, pos, 1.0 * home, euler, grip)
            self.tick(towards(seen, *way, self.skip, speed))
            seen = self.seen
            if np.linalg.norm(seen.tcp - pos) < 0.01:
                break

    def choose(self, tasks):
        """A task, the rather the rarer it is, by itself and after what was done before."""
        rare = [
            (1 + 2 * self.count[t]) ** -1.5 / (1 + self.pairs.get((self.last, t), 0)) for t in tasks
        ]
        return str(self.rng.choice(tasks, p=np.array(rare) / sum(rare)))

    def segment(self):
        """One piece of play, mostly a skill. False if it failed."""
        kind = self.rng.random()
        if kind > 0.17:
            return self.skill()
        if kind < 0.03:
            self.idle(self.rng.integers(2, 12))
        else:
            self.wander(home=kind > 0.09)
        return True

    def skill(self):
        """Does one task, disturbed in bursts or not; annotates it if the oracle agrees."""
        rng, seen = self.rng, self.seen
        start = self.infos[self.t]
        free = free_blocks(start)
        tasks = feasible(seen, free)
        if held(seen) and rng.random() < 0.7:  # mostly it is put somewhere
            tasks = [t for t in tasks if t.startswith(("place", "stack"))] or tasks
        task = self.choose(tasks)
        self.count[task] += 1  # whatever comes of it: what fails is not tried again and again
        self.pairs[self.last, task] = self.pairs.get((self.last, task), 0) + 1
        self.last = task.rsplit("_", 1)[0]
        begin, bursts = self.t, self.bursts()
        for frame in range(PATIENCE // self.skip):
            if frame in bursts:
                a, begin = self.disturbed(task, free, *bursts[frame]), self.t + 1
            else:
                a = act(task, self.seen, free, self.skip)
            if self.tick(a, start, task, frame in bursts):
                break
        else:
            return False
        solved = self.annotate(task, begin)
        # The motion that succeeded goes on for a while: it does not end at the rule's threshold.
        for _ in range(int(rng.integers(0, 6)) if rng.random() < 0.5 else 0):
            self.tick(act(task, self.seen, free, self.skip))
            if solved and self.annotate(task, begin):
                del self.spans[-2]
        return True

    def bursts(self):
        """{frame of the skill: (kind, numbers)}, none in 45 %. What imitators do: the arm is pushed
        (push), the fingers go wrong (fingers), the hand is believed to be elsewhere (belief), or it
        goes to some other place (astray)."""
        rng, out = self.rng, {}
        for _ in range(rng.choice([0, 1, 2], p=[0.45, 0.45, 0.1])):
            kind, longest = BURSTS[rng.choice(4, p=[0.2, 0.15, 0.3, 0.35])]
            off = rng.normal(size=6) * [0.03, 0.03, 0.015, 0, 0.1, 0.4]  # m, rad
            if kind == "astray":
                off = np.append(rng.uniform(*ROOM), [0, 0.1, 0.5] * rng.normal(size=3))
            first = rng.integers(0, 15)
            out |= dict.fromkeys(range(first, first + rng.integers(1, longest)), (kind, off))
        return out

    def disturbed(self, task, free, kind, off):
        """What the operator does in a burst."""
        seen = self.seen
        if kind == "belief":
            wrong = {"tcp": seen.tcp + off[:3], "euler": seen.euler + off[3:]}
            wrong["target"] = seen.target + off[:3]
            return act(task, seen._replace(**wrong), free, self.skip)
        if kind == "astray":
            grip = CLOSE if off[0] > 0 and not held(seen) else seen.grip
            return towards(seen, off[:3], DOWN + off[3:], grip, self.skip)
        a = act(task, seen, free, self.skip)
        if kind == "fingers":
            return a * [1, 1, 1, 1, 1, 1, -1]
        inside = np.clip(seen.tcp + off[:3], *ROOM) - seen.tcp
        return action(seen, inside, 0.2 * off[3:], a[6], self.skip)

    def annotate(self, task, begin):
        """A span from `begin`, behind the last burst, to this success, of at most 64 steps."""
        first = max(self.t - (SPAN - 1) // self.skip, begin)
        solved = first < self.t and self.oracle(self.infos[first], self.infos[self.t], task)
        if solved:
            self.spans.append((task, first, self.t))
        return solved


def _block(env, oracle, folder, split, index, first, length, seed, skip, pictures):
    """Records one block of frames, then its part file, which says that it is finished."""
    rng = np.random.default_rng([seed, ("training", "validation").index(split), index])
    part, states = Recorder(env, oracle, folder, first, length, rng, skip, pictures).play()
    name = folder / "parts" / f"{index:05d}"
    if not pictures:
        write(name.with_suffix(".npz"), lambda file: np.savez(file, **states))
    part["crc"] = zlib.crc32(json.dumps(part).encode())
    write(name.with_suffix(".json"), lambda file: file.write(json.dumps(part).encode()))


def _part(path):
    """What _block wrote. DataError: damaged."""
    import data

    with data.naming(path, "Remove that file: its frames are recorded again"):
        part = dict(json.loads(path.read_text()))
        if part.pop("crc", None) != zlib.crc32(json.dumps(part).encode()):
            raise ValueError("its checksum is wrong")
    return part


def record(
    folder, frames, val_frames, procs=2, seed=0, make=make_sim, about=SIM, skip=1, pictures=True
):
    """Records play into folder/training and folder/validation; goes on where it was stopped.

    make: function(render) -> (environment, oracle). about: what recording.json says of it.
    skip: steps of the simulator, at 30 Hz, that one frame lasts.
    """
    import data  # brings torch, which no worker needs

    if skip > 10:
        raise ValueError(f"--skip {skip}: at most 10, or episodes are shorter than a window")
    with data.locked(Path(folder)):
        _record(Path(folder), frames, val_frames, procs, seed, make, about, skip, pictures)


def _record(folder, frames, val_frames, procs, seed, make, about, skip, pictures):
    jobs, done = [], 0
    about = about | ({"hz": about["hz"] / skip, "skip": skip} if skip > 1 else {})
    for split, n in (("training", frames), ("validation", val_frames)):
        place = folder / split
        _claim(place, n, seed, about)
        blocks = max(1, round(n / 2000))  # of 1000 to 3000 frames
        shares = np.random.default_rng([seed, n]).uniform(0.5, 1.5, blocks)
        ends = np.round(np.cumsum(shares) / shares.sum() * n).astype(int).tolist()
        for k, (first, end) in enumerate(pairwise([0, *ends])):
            if (place / "parts" / f"{k:05d}.json").exists():
                done += end - first
            else:
                jobs.append((place, split, k, first, end - first, seed, skip, pictures))
    if jobs:
        sizes = [job[4] for job in jobs]
        _parallel(_block, jobs, sizes, procs, make, pictures, done, "recording")
    print(f"recorded in {folder} (seed {seed}):")
    for split in ("training", "validation"):
        _finish(folder / split, split, seed, skip, pictures)
    thin = "" if skip > 1 else " --skip 2    (15 Hz, as --preset sim)"
    print(f"next: python data.py pack {folder} PACKED{thin}" if pictures else "no pictures")


def _claim(place, n, seed, about):
    """Makes sure that the folder is new, or holds the beginning of the very same recording."""
    if n < 64:
        raise ValueError(f"{place}: {n} frames are too few, a span alone may have 64")
    about = about | {"text_encoder": LANG[5:], "frames": n, "seed": seed}
    place.mkdir(parents=True, exist_ok=True)
    if any(p.suffix != ".tmp" for p in place.iterdir()):  # those a kill left half written
        try:
            found = json.loads((place / "recording.json").read_text())
        except (OSError, ValueError):
            found = "no readable recording.json"
        if found != about:
            remedy = "choose another folder, delete it, or repeat the command that began it"
            raise FileExistsError(f"{place} holds something else ({found}; not {about}): {remedy}")
    write(place / "recording.json", lambda f: f.write(json.dumps(about).encode()))
    (place / "parts").mkdir(exist_ok=True)


def _finish(place, split, seed, skip, pictures):
    """Everything but the frames: episode bounds, statistics, language."""
    parts = [_part(p) for p in sorted((place / "parts").glob("*.json"))]
    episodes = np.array([e for p in parts for e in p["episodes"]])  # (E, 2), both ends inclusive
    lengths = episodes[:, 1] - episodes[:, 0] + 1
    mean, square = np.sum([p["sums"] for p in parts], axis=0) / lengths.sum()
    std = np.sqrt(np.maximum(square - mean**2, 0))
    text = ""
    for name, part in (("robot_obs", slice(0, 15)), ("scene_obs", slice(15, 39))):
        text += f"{name}:\n  - _target_: calvin_agent.utils.transforms.NormalizeVector\n"
        text += f"    mean: {mean[part].tolist()}\n    std: {std[part].tolist()}\n"
    text += f"act_min_bound: {np.min([p['low'] for p in parts], axis=0).tolist()}\n"
    text += f"act_max_bound: {np.max([p['high'] for p in parts], axis=0).tolist()}\n"
    write(place / "statistics.yaml", lambda f: f.write(text.encode()))
    bounds = {"calvin_scene_D": [int(episodes.min()), int(episodes.max())]}  # whose twin this is
    (place / LANG).mkdir(exist_ok=True)
    language, found = _language(parts, skip * lengths.sum(), split, seed)
    arrays = {"ep_start_end_ids": episodes, "ep_lens": lengths, "scene_info": bounds}
    for name, value in (arrays | language).items():
        write(place / f"{name}.npy", lambda f, v=value: np.save(f, v, allow_pickle=True))
    chosen = language[f"{LANG}/auto_lang_ann"]["language"]["task"]
    disturbed = np.zeros(lengths.sum(), bool)
    disturbed[[t for p in parts for t in p["disturbed"]]] = True
    write(place / "disturbed.npy", lambda f: np.save(f, disturbed))
    if not pictures:
        states = [np.load(p) for p in sorted((place / "parts").glob("*.npz"))]
        spans = np.array(language[f"{LANG}/auto_lang_ann"]["info"]["indx"])
        arrays = {
            "robot_obs": np.concatenate([x["robot_obs"] for x in states]),
            "scene_obs": np.concatenate([x["scene_obs"] for x in states]),
            "actions": np.concatenate([x["rel_actions"] for x in states]),
            "spans": spans, "tasks": np.array(chosen), "disturbed": disturbed,
        }  # fmt: skip
        write(place / "states.npz", lambda f: np.savez(f, **arrays))
    import data

    names = (*arrays, *language, "disturbed") if pictures else ("disturbed",)
    data.write_sums(place, ["recording.json", *(f"{name}.npy" for name in names)])
    print(
        f"  {split}: {lengths.sum()} frames, {len(lengths)} episodes, {len(chosen)} annotated spans"
    )
    for task in sim.TASKS:
        print(f"    {task:26s} {found[task]:5d} skills, {chosen.count(task):4d} annotated")


def _language(parts, steps, split, seed):
    """CALVIN's language files {name: content}, and how many spans of each task there were."""
    import data  # brings torch, which no worker needs

    rng = np.random.default_rng([seed, 99])
    spans = {
        t: [(a, b) for p in parts for task, a, b in p["spans"] if task == t] for t in sim.TASKS
    }
    found = {t: len(s) for t, s in spans.items()}
    for s in spans.values():
        rng.shuffle(s)
    # About one span per hundred steps: in turn one of each task, as long as there are any.
    chosen, wanted = [], max(1, int(steps // 100))
    while len(chosen) < wanted and any(spans.values()):
        for task in rng.permutation([t for t in spans if spans[t]]):
            chosen.append((*map(int, spans[task].pop()), str(task)))
    chosen = sorted(chosen[:wanted])
    sentences = json.loads((ASSETS / "sentences.json").read_text())["tasks"]
    key = "train" if split == "training" else "validation"
    ann = [str(rng.choice(sentences[task][key])) for *_, task in chosen]
    files = {
        "auto_lang_ann": {
            "language": {
                "ann": ann,
                "task": [c[2] for c in chosen],
                "emb": data.encode(ann)[:, None],
            },
            "info": {"episodes": [], "indx": [(a, b + 1) for a, b, _ in chosen]},  # end exclusive
        }
    }
    if split == "validation":
        held_out = {t: sentences[t]["validation"] for t in sim.TASKS}
        files["embeddings"] = {
            t: {"emb": data.encode(s)[None], "ann": s} for t, s in held_out.items()
        }
    return {f"{LANG}/{name}": value for name, value in files.items()}, found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    r = commands.add_parser("rates", help="success and frames of every task")
    r.add_argument("--n", type=int, default=20, help="trials of each task")
    r.add_argument("--out", help="JSON file to write")
    w = commands.add_parser("record", help="record play in CALVIN's format")
    w.add_argument("folder")
    w.add_argument("--frames", type=int, default=100_000)
    w.add_argument("--val-frames", type=int, default=10_000)
    w.add_argument("--skip", type=int, default=1, help="steps of 1/30 s for each frame")
    w.add_argument("--no-pictures", action="store_true", help="states only: tests/imitable.py")
    for p in (r, w):
        p.add_argument("--procs", type=int, default=2)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--env", choices=("sim", "calvin"), default="sim")
        calvin.add_options(p)
    a = parser.parse_args(argv)
    for name, least in (("n", 1), ("procs", 1), ("skip", 1), ("seed", 0)):
        if getattr(a, name, least) < least:
            parser.error(f"--{name} {getattr(a, name)}: at least {least}")
    make, about = make_sim, SIM
    try:
        if a.env == "calvin":
            calvin.home(a.calvin_env)  # an error here is clearer than one of a worker
            make = partial(calvin.make, args=a)
            about = SIM | {"source": "calvin", "renderer": a.renderer or "tiny", "scene": a.scene}
        if a.command == "rates":
            rates(a.n, a.procs, a.seed, a.out, make)
        else:
            record(
                a.folder,
                a.frames,
                a.val_frames,
                a.procs,
                a.seed,
                make,
                about,
                a.skip,
                not a.no_pictures,
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # also of a killed worker
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
