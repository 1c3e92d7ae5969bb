"""The reactive operator that plays with the table, and the recorder. LUMOS Sec. V-B, App. E.

    python teleop.py rates --n 20 --procs 2    success and steps of each of the 34 tasks
    python teleop.py record DIR --frames N --val-frames M --procs P --seed S --skip 2
                                               long play in CALVIN's format, with language

Both take --env calvin, and then play in CALVIN's own simulator, with its own oracle.

`act(task, seen)` is a pure function: no way-points, no phases, no memory. One idea carries every
skill: the hand keeps a distance from its goal that grows with its error beside the goal (a cone).
Approach, correction and retry are then one law.

             want = slope * (off - tol)            high while off the axis, down where on it
    funnel   to a point along an axis              to grasp, to put down, to press
    stroke   the same, and on along a way          to push, to slide, to pull

    frame    t                t+1            rel_actions[t]: commanded at t, held for `skip` steps
             o_t -- a_t -->   o_{t+1}        actions[t]: the tcp pose of frame t+1, and the gripper

Copy this file together with sim.py, calvin.py and data.py. Needs: numpy, scipy, torch, tqdm, tyro.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import calvin
import data
import sim

BLOCKS = ("block_red", "block_blue", "block_pink")
SIZES = {b: (length, 0.04, 0.04) for b, length in zip(BLOCKS, (0.056, 0.04, 0.08), strict=True)}
UP, SLOPE = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.5, 0.866])  # the second: up the cabinet
DOWN = np.array([np.pi, 0.0, 1.5])  # euler xyz: fingers down, opening along the world's x
OPEN, CLOSE = 1, -1
SPEED, TURN, GAIN = 0.036, 0.1, 0.35  # m, rad and share of the error, per action
LEASH = 0.05  # m, how far the commanded pose may be ahead of the hand
GATE = 0.015  # m beside a block at which the fingers close: a third of it is a learner's error
PRESS = 0.008  # m below its resting height to which a block is sent as it is turned
TABLE_X, TABLE_Y = (0.02, 0.30), (-0.14, -0.07)  # m, where a block may be put down on the table
SHELVES = {"left": (-0.28, -0.20), "right": (-0.02, 0.09)}  # m, x ranges of the cabinet's halves
FRONT = (0.05, 0.32)  # m, x of a block that is pushed straight into the drawer
ROOM = np.array([(-0.25, -0.26, 0.45), (0.32, 0.0, 0.58)])  # m, where a burst may lead the hand
BURSTS = ("push", 6), ("fingers", 6), ("belief", 15), ("astray", 12)  # most frames of each
EPISODE = 200, 600  # steps, then a new scene: what a world model finds hard is scenes, not motion
SPAN = 64  # steps that an annotated span has at most, as CALVIN's
PATIENCE = 180  # steps, then a skill has failed
PLACES = (0.40, 0.13, 0.13, 0.22, 0.12)  # a block on the table, left, right, in the drawer, on top
OFTEN = {"stack_block": 2}  # what is hardest is tried, and told, up to twice as often


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
    robot, scene, poses = obs["robot_obs"], obs["scene_obs"], obs["scene_obs"][6:].reshape(3, 6)
    hand = robot[:3], robot[3:6], robot[6], int(robot[14])
    at = dict(zip(BLOCKS, poses[:, :3], strict=True))
    turns = Rotation.from_euler("xyz", poses[:, 3:]).as_matrix()
    axes = dict(zip(BLOCKS, turns, strict=True))
    return Seen(*hand, *scene[:4], int(scene[5]), at, axes, np.array(env.target_pos))


def wrap(angle):
    """Angles to [-π, π)."""
    return (np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi


def unit(*v):
    return np.array(v) / np.linalg.norm(v)


def held(seen):
    """The block between the closed fingers, or None."""
    if seen.grip == OPEN or not 0.03 < seen.width < 0.062:
        return None
    low = [b for b in BLOCKS if abs(seen.at[b][2] - seen.tcp[2]) < 0.048]
    return nearest(seen, [b for b in low if gap(seen, b, seen.tcp) < 0.008])


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
def cone(goal, axis, aside, along, off, far, slope, tol=0.010):
    """The one idea: kept from `goal` along `axis`, at most by `far`, by slope times what is off.
    Sideways only as far as it is high enough. aside (3,), along: the hand from the goal, across
    and along the axis."""
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
    return cone(goal, axis, aside, along, off, far, slope, tol), off, along


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
    ahead, back: how far before and behind `at` along the way the hand may be to go on (m)."""
    rel, cosine = seen.tcp - at, way @ axis
    t, along = np.linalg.solve([[1, cosine], [cosine, 1]], [rel @ way, rel @ axis])
    aside = rel - t * way - along * axis
    wrong = max(0.0, t - ahead, -t - back)
    off = amiss(seen, aside, euler, seen.width - 0.01) + wrong
    aside = aside + t * way * (wrong > 0)
    pos = cone(at, axis, aside, along, off, far, slope)
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
    return pos, euler, OPEN if aside < GATE and turned < 0.3 else grip  # astride of the block


def put(seen, block, xy, z, pitch, yaw=None, far=0.06, axis=UP, gate=GATE, slope=2.5):
    """Brings the held block's centre to (xy, z) and lets go."""
    euler = np.array([np.pi, pitch, seen.euler[2] if yaw is None else yaw])
    goal = np.array([*xy, z + 0.004]) + seen.tcp - seen.at[block]
    goal[2] = max(goal[2], z + 0.001)  # not with the finger tips into what is below
    pos, off, along = funnel(seen, goal, axis, far, euler, tol=0.6 * gate, slope=slope)
    if off < gate and along < 0.010:
        return seen.tcp, euler, OPEN
    return travel(seen, pos, off, euler, CLOSE)


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
    """Turns a block where it lies, until the wrist is at its limit; presses it down by PRESS, for
    an imitator's hand drifts up, and a turn in the air does not count."""
    if held(seen) != block:
        return take(seen, block, 1.27 * sign)
    euler = np.array([np.pi, lean(seen.at[block])[1], seen.euler[2] + 0.3 * sign])
    limit = sign * wrap(seen.euler[2] - 1.5) > 2.6
    pos = seen.tcp + (0.46 - PRESS - seen.at[block][2]) * UP
    return pos, euler, OPEN if limit else CLOSE


def beside(seen, block, sign):
    """Where the fingers stand to push a block along x."""
    half = half_size(seen, block, 0) + 0.03  # and a finger
    return np.array([seen.at[block][0] - sign * half, seen.at[block][1], 0.462])


def push(seen, block, sign):
    at, way = beside(seen, block, sign), np.array([sign, 0.0, 0.0])
    return stroke(seen, at, way, UP, clear(seen) - 0.462, lean(at), 0.055)


def push_into_drawer(seen, free):
    """free: the blocks that lay on the table alone at the start: CALVIN's rule counts no others."""
    ok = [b for b in lying(seen, "table") if b in free and -0.14 < seen.at[b][0] < 0.40]
    if not ok:
        return rise(seen)
    # Those in front of the drawer first, the nearest first; to push it keeps it the nearest.
    left, right = FRONT
    block = min(ok, key=lambda b: (not left <= seen.at[b][0] <= right, seen.at[b][1]))
    x = seen.at[block][0]
    if not left <= x <= right:  # beside the drawer; at the left this may press the led's button
        return push(seen, block, 1 if x < left else -1)
    y = min(seen.at[block][1] + half_size(seen, block, 1) + 0.026, 0.0)
    at = np.array([seen.at[block][0], y, 0.466])
    return stroke(seen, at, np.array([0, -1.0, 0]), UP, clear(seen) - 0.466, DOWN, 0.10)


def slider(seen, sign):
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


def fetch(seen, *places, base=None):
    """The hand is empty: away from a block that it has just let go of, or to the nearest one in
    these places that is not `base`."""
    block = nearest(seen, BLOCKS)
    near = np.linalg.norm(seen.at[block] - seen.tcp) < 0.035
    if near and place_of(seen, block) not in places:
        back = np.array([0, -0.03, 0.03]) if seen.at[block][1] > 0.03 else 0.04 * UP
        return seen.tcp + 1.5 * back, upright(seen), OPEN
    block = nearest(seen, [b for b in lying(seen, *places) if b != base])
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


def bare(seen):
    """The blocks that lie on the table with nothing on top."""
    tops = [seen.at[b] for b in lying(seen, "top")]
    return [b for b in lying(seen, "table") if all(gap(seen, b, at) > 0.02 for at in tops)]


def stack(seen):
    """On the largest block, wherever the hand is: the nearest would change midway between two. An
    empty hand takes another, also when it was the largest that it has dropped."""
    block = held(seen)
    base = max(bare(seen), key=lambda b: SIZES[b][0], default=None)
    if not block or not base:
        return fetch(seen, "table", base=base)
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
    in_hand, sign = held(seen), 1 if last == "right" else -1
    if kind == "place":
        return place(seen, last)
    if kind in ("stack", "unstack"):
        return stack(seen) if kind == "stack" else unstack(seen)
    if in_hand and (in_hand != block or kind == "push"):
        return set_down(seen, in_hand)
    if kind == "lift":
        return lift(seen, block)
    if kind == "rotate":
        return rotate(seen, block, -sign)
    if kind == "push":
        return push(seen, block, sign) if block else push_into_drawer(seen, free)
    if kind == "turn":
        return led(seen, words[1] == "on") if last == "led" else bulb(seen, words[1] == "on")
    return slider(seen, sign) if kind == "move" else drawer(seen, kind == "open")


def act(task, seen, free=BLOCKS, skip=2):
    """The operator: action (7,), to be held for `skip` steps. A pure function."""
    calvin.check(task)
    return towards(seen, *law(task, seen, free), skip)


def towards(seen, pos, euler, grip, skip, speed=SPEED):
    """The action that brings the hand nearer, by a share of the way; the target stays on its
    leash."""
    move = pos - seen.tcp
    far = np.linalg.norm(move)
    move = move * min(GAIN, speed / max(far, 1e-9))
    turn = np.clip(GAIN * wrap(euler - seen.euler), -TURN, TURN)
    lead = seen.target + move - seen.tcp
    length = np.linalg.norm(lead)
    if length > LEASH:
        move = seen.tcp + lead * (LEASH / length) - seen.target
    arm = np.concatenate([move / sim.POS_SCALE, turn / sim.EULER_SCALE]) / skip
    return np.append(np.clip(arm, -1, 1), grip)


def free_blocks(info):
    """The blocks that lie on the table top alone, for push_into_drawer."""
    facts = calvin.facts(info)
    return [b for b in BLOCKS if facts.blocks[b].touches == {facts.parts[calvin.TOP]}]


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
    alone: `free_blocks` now."""
    in_hand, free = held(seen), bare(seen)
    ajar = {"left": seen.door < 0.06, "right": seen.door > 0.22}  # the halves that stand open
    ok = {
        "move_slider_left": seen.door < 0.1, "move_slider_right": seen.door > 0.18,
        "open_drawer": seen.drawer < 0.08, "close_drawer": seen.drawer > 0.14,
        f"turn_{'off' if seen.switch > 0.044 else 'on'}_lightbulb": True,
        f"turn_{'off' if seen.led else 'on'}_led": True, "unstack_block": bool(lying(seen, "top")),
        "place_in_slider": in_hand and (ajar["left"] or ajar["right"]),
        "place_in_drawer": in_hand and seen.drawer > 0.17, "stack_block": in_hand and free,
        "push_into_drawer": seen.drawer > 0.17 and any(-0.08 < seen.at[b][0] < 0.37 for b in alone),
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
            ok[f"rotate_{name}_block_{side}"] = loose and x > -0.05 and far < 0.76
    return [task for task in sim.TASKS if ok.get(task)]


# ----------------------------------------------------------------------------------------- scenes
def random_scene(rng, task=None):
    """A random scene_obs (24,): doors, lights, blocks; with a task, one in which it can be done,
    or in which the block that it needs in the hand can be picked up."""
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
    put = {}  # block: its position; first the one that the task is about
    for block in sorted(rng.permutation(BLOCKS), key=lambda b: b[6:] not in words):
        kind = str(rng.choice(["table", "left", "right", "drawer", "top"], p=PLACES))
        if task and not put:
            lifted = words[-1] if words[0] == "lift" else "table"
            kind = inside if lifted == "slider" else lifted
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
                x, y = rng.uniform(0.05, 0.31), rng.uniform(-0.11 - scene[1], -0.23)
                at = np.array([x, y, 0.363])
            elif kind != "table":  # turned as the operator or the benchmark leaves it
                deep = 0.158 - np.hypot(*SIZES[block][:2]) / 2  # the wall is at 0.16
                y = rng.uniform(0.08, min(deep, 0.125))
                at = np.array([rng.uniform(*SHELVES[kind]), y, 0.462])
                yaw = np.pi / 2 + rng.uniform(-1, 1) * np.pi / 8
            elif rng.random() < 0.5:  # the benchmark's two places, roughly
                x = rng.choice([0.05, 0.23]) + rng.uniform(-0.02, 0.02)
                at = np.array([x, rng.uniform(-0.14, -0.1), 0.46])
            else:
                at = np.array([rng.uniform(*TABLE_X), rng.uniform(*TABLE_Y), 0.46])
            others = [p for b, p in put.items() if not (kind == "top" and b == low[0])]
            if all(np.linalg.norm((at - p)[:2]) > 0.08 for p in others):
                break
            if put or not task:
                kind = str(rng.choice(["table", "left", "right"]))
        put[block] = at
        i = 6 + 6 * BLOCKS.index(block)
        scene[i : i + 6] = *at, 0, 0, yaw
    return scene


# -------------------------------------------------------------------------------- in many processes
@dataclass(frozen=True)
class Where:
    """The simulator that is played in."""

    env: Literal["sim", "calvin"] = "sim"
    calvin_env: Path | None = None  # clone of mees/calvin_env; None: in this folder, or installed
    scene: str = calvin.SCENE  # CALVIN's: a folder of its dataset, or a name in conf/scene
    renderer: Literal["egl", "tiny"] = "tiny"  # CALVIN's

    def make(self, cameras):
        """(environment, oracle)."""
        if self.env == "sim":
            return sim.PlayTable(render=cameras), sim.oracle
        table = calvin.Table(self.scene, self.renderer, cameras, self.calvin_env)
        return table, calvin.make_oracle(self.calvin_env)

    def about(self, skip):
        """What recording.json says of it."""
        about = {"source": self.env, "renderer": sim.LOOK, "hz": 30, "action_scale": [0.02, 0.05]}
        if self.env == "calvin":
            about |= {"renderer": self.renderer, "scene": self.scene}
        if skip > 1:
            about |= {"hz": 30 / skip, "skip": skip}
        return about


TWIN = Where()
_worker = []  # of a worker process: its environment and its oracle


def _start(where, cameras):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.extend(where.make(cameras))


def _end_with_parent():
    """Who repeats the command of a killed parent must not meet its workers at the same files."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(function, job):
    return function(*_worker, *job)


def in_parallel(function, jobs, procs, where, cameras):
    """Yields function(env, oracle, *job) of every job as it is done, in `procs` processes, each
    with an environment of its own. Under EGL, which keeps 12.5 MB at each reset, the processes are
    new after eight jobs each."""
    if procs < 1:
        raise ValueError(f"--procs {procs}: at least 1")
    if where.env == "calvin":
        calvin.home(where.calvin_env)  # an error here is clearer than one of a worker
    context, leaks = multiprocessing.get_context("spawn"), cameras and where.renderer == "egl"
    size = 8 * procs if leaks else len(jobs)
    for some in (jobs[i : i + size] for i in range(0, len(jobs), size)):
        with ProcessPoolExecutor(procs, context, _start, (where, cameras)) as pool:
            try:
                for future in as_completed([pool.submit(_work, function, job) for job in some]):
                    yield future.result()
            except KeyboardInterrupt:  # to leave the pool is to wait until blocks are full
                print("\nteleop.py: stopped; to repeat the command of a recording goes on with it")
                os._exit(130)  # the workers end with their parent
            finally:
                pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------- rates
def _one_rate(env, oracle, task, n, seed):
    """Trial n of a task in a random scene. Half of them begin at the benchmark's start pose, a
    quarter where another skill has ended, a quarter, and where it is needed, with a block in the
    hand."""
    in_hand = n % 4 == 3 or task == "stack_block" or task.startswith("place")
    for again in range(30):
        rng = np.random.default_rng([seed, sim.TASKS.index(task), n, again])
        obs = env.reset(sim.ROBOT_OBS0, random_scene(rng, task))
        for _ in range(4):
            obs, _, _, info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]), render=False)
        now = feasible(see(env, obs), free_blocks(info))
        if in_hand or n % 4 == 1:
            before = [t for t in now if t != task and t.startswith("lift") == in_hand]
            before = [t for t in before if not in_hand or t.split("_")[1] not in task]
            if not before or not attempt(env, oracle, str(rng.choice(before)))[0]:
                continue
            seen = see(env, env.get_obs(render=False))
            now = feasible(seen, free_blocks(env.get_info()))
        if task in now:
            return task, *attempt(env, oracle, task)
    raise RuntimeError(f"{task}: no feasible start in 30 random scenes (seed {seed}, trial {n})")


def rates(n: int = 20, procs: int = 2, seed: int = 0, out: Path | None = None, where: Where = TWIN):
    """Success and steps of every task.

    Args:
        n: trials of each task
        procs: processes
        seed: of the scenes
        out: JSON file to write
    """
    if n < 1:
        raise ValueError(f"--n {n}: at least 1")
    jobs = [(task, k, seed) for task in sim.TASKS for k in range(n)]
    done = in_parallel(_one_rate, jobs, procs, where, cameras=False)
    rows = [*tqdm(done, "rates", len(jobs), mininterval=1)]
    table = {}
    print(f"{'task':26s} {'n':>5s} {'success':>8s} {'median':>7s} {'95 %':>6s} {'<= 64':>7s}")
    for task in (*sim.TASKS, "all"):
        some = [row for row in rows if task in (row[0], "all")]
        steps = np.array([row[2] for row in some])  # a failure counts as the whole budget
        share, within = np.mean([row[1] for row in some]), np.mean(steps <= SPAN)
        median, p95 = np.percentile(steps, (50, 95))
        table[task] = {"success": share, "median": median, "p95": p95, "within64": within}
        print(f"{task:26s} {len(some):5d} {share:8.3f} {median:7.0f} {p95:6.0f} {within:7.2f}")
    if out:
        data.write_json(out, {"seed": seed, "n": n, "tasks": table})


# ---------------------------------------------------------------------------------------- recording
class Full(Exception):
    """The block of frames that a worker was to record is full."""


class Recorder:
    """Plays and records one block of consecutive frames: an episode, or more if a scene got stuck.
    It writes under final names, and the same arguments give the same files: after a crash it is
    repeated. A frame lasts `skip` steps of the simulator. Time t counts frames."""

    def __init__(self, env, oracle, folder, first, length, rng, skip, pictures, tasks=sim.TASKS):
        self.env, self.oracle, self.folder, self.rng = env, oracle, folder, rng
        self.skip, self.pictures, self.tasks = skip, pictures, tasks
        self.t, self.end, self.last = first, first + length, None
        self.episodes, self.spans, self.disturbed, self.rows = [], [], [], []
        self.infos = {}  # frame: what the oracle wants to know of it
        self.count, self.pairs = Counter(), Counter()  # tasks; (the last kind of task, task)

    @property
    def seen(self):
        return see(self.env, self.obs)

    def tick(self, action, start=None, task=None, disturbed=False):
        """Holds an action for one frame and writes it; whether the oracle sees `task` done."""
        before = self.obs
        for k in range(self.skip):
            render = self.pictures and k == self.skip - 1
            self.obs, _, _, info = self.env.step(action, render=render)
        row = {"actions": np.append(self.obs["robot_obs"][:6], action[6]), "rel_actions": action}
        state = {key: before[key] for key in ("robot_obs", "scene_obs")}
        self.rows.append(row | state)
        if self.pictures:  # no fsync: a block without its part file is recorded again
            name = f"episode_{self.t:07d}.npz"
            with data.naming(self.folder / name, data.MAKE_ROOM):
                np.savez(self.folder / f"part_{name}", **row, **before["rgb_obs"], **state)
                os.replace(self.folder / f"part_{name}", self.folder / name)
        if disturbed:
            self.disturbed.append(self.t)
        self.t += 1
        self.infos[self.t] = info
        self.infos.pop(self.t - SPAN - 1, None)
        if self.t == self.end:
            raise Full
        return task is not None and self.oracle(start, info, task)

    def play(self):
        """Fills the block. Returns what the parent must know about it, as plain numbers."""
        while self.t < self.end:
            start = self.t
            with suppress(Full):
                self.episode()
            self.episodes.append((start, self.t - 1))
            self.spans = [s for s in self.spans if s[2] < self.t]  # whose last frame it still holds
        states = {k: np.array([row[k] for row in self.rows]) for k in self.rows[0]}
        both, actions = np.hstack([states["robot_obs"], states["scene_obs"]]), states["actions"]
        part = {
            "episodes": self.episodes, "spans": self.spans, "disturbed": self.disturbed,
            "sums": [both.sum(0).tolist(), (both**2).sum(0).tolist()],
            "low": actions.min(0).tolist(), "high": actions.max(0).tolist(),
        }  # fmt: skip
        return part, states

    def episode(self):
        """A new scene, and play in it until it is long enough, stuck, or has lost a block, unless
        this episode or the next would be too short."""
        start, shortest, stuck = self.t, EPISODE[0] // self.skip, 0
        task = self.choose(self.tasks)
        full = start + self.rng.integers(*EPISODE) // self.skip
        scene = random_scene(self.rng, task if self.rng.random() < 0.7 else None)
        # The first frame carries the state that it was reset to, not what the reset's one step of
        # physics made of it, so that a replay from there is exact.
        state = {"robot_obs": sim.ROBOT_OBS0, "scene_obs": scene}
        self.obs = self.env.reset(*state.values()) | state
        self.infos = {self.t: self.env.get_info()}
        self.idle(2)  # blocks come to rest
        if self.rng.random() < 0.5:  # half of the episodes begin away from the start pose
            self.wander()
        while (stuck < 4 and self.t < full) or min(self.t - start, self.end - self.t) < shortest:
            kind, done = self.rng.random(), True
            if kind < 0.03:
                self.idle(self.rng.integers(2, 12))
            elif kind <= 0.17:
                self.wander(home=kind > 0.09)
            else:
                done = self.skill()
            stuck = (0 if done else stuck + 1) + 4 * bool(lying(self.seen, "lost"))

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
            pos, euler, speed, frames = np.array([0.026, -0.231, 0.571]), DOWN, SPEED, 25
            grip = CLOSE if held(seen) else OPEN
        for _ in range(frames):
            way = travel(seen, pos, 1.0 * home, euler, grip)
            self.tick(towards(seen, *way, self.skip, speed))
            seen = self.seen
            if np.linalg.norm(seen.tcp - pos) < 0.01:
                break

    def choose(self, tasks):
        """A task, the rather the rarer it is, by itself and after what was done before."""
        rare = [(1 + 2 * self.count[t]) ** -1.5 / (1 + self.pairs[self.last, t]) for t in tasks]
        return str(self.rng.choice(tasks, p=np.array(rare) / sum(rare)))

    def skill(self):
        """Does one task, disturbed in bursts or not; annotates it if the oracle agrees."""
        rng, seen, start = self.rng, self.seen, self.infos[self.t]
        free = free_blocks(start)
        tasks = [t for t in feasible(seen, free) if t in self.tasks]
        if not tasks:
            return False
        if held(seen) and rng.random() < 0.7:  # mostly it is put somewhere
            tasks = [t for t in tasks if t.startswith(("place", "stack"))] or tasks
        task = self.choose(tasks)
        # Whatever comes of it: else what fails would be tried again and again.
        self.count[task] += 1 / OFTEN.get(task, 1)
        self.pairs[self.last, task] += 1
        self.last = task.rsplit("_", 1)[0]
        drops = task == "stack_block" and rng.random() < 0.5
        begin, bursts = self.t, self.bursts(drops)
        for frame in range(PATIENCE // self.skip):
            burst = bursts.get(frame)
            if burst:
                a, begin = self.stray(task, free, *burst), self.t + 1
                if drops and held(self.seen) and a[6] == OPEN:  # beside; now it tries again
                    drops, bursts = False, {frame + 1 + k: b for k, b in self.bursts().items()}
            else:
                a = act(task, self.seen, free, self.skip)
            if self.tick(a, start, task, burst is not None):
                break
        else:
            return False
        solved = self.annotate(task, begin)
        # The motion that succeeded goes on for a while: it does not end at the rule's threshold.
        # Not when the hand has let go: an empty hand that leaves would say that nothing is to do.
        more = rng.random() < 0.5 and not task.startswith(("place", "stack"))
        for _ in range(int(rng.integers(0, 6)) if more else 0):
            self.tick(act(task, self.seen, free, self.skip))
            if solved and self.annotate(task, begin):
                del self.spans[-2]
        return True

    def bursts(self, drops=False):
        """{frame of the skill: (kind, numbers)}, none in 45 %; the skill may end before they come.
        What imitators do: the arm is pushed (push), the fingers go wrong (fingers), the hand is
        believed to be elsewhere (belief), or it goes to some other place (astray).
        drops: one burst, long enough for a block to be let go of beside the one below, mostly
        along x, for the table's edge is near."""
        rng, out = self.rng, {}
        if drops:
            way, first = rng.normal(size=2) * [1, 0.3], rng.integers(0, 8)
            off = np.append(rng.uniform(0.03, 0.06) * way / np.linalg.norm(way), np.zeros(4))
            return dict.fromkeys(range(first, first + 45), ("belief", off))
        for _ in range(rng.choice([0, 1, 2], p=[0.45, 0.45, 0.1])):
            kind, longest = BURSTS[rng.choice(4, p=[0.2, 0.15, 0.3, 0.35])]
            off = rng.normal(size=6) * [0.03, 0.03, 0.015, 0.1, 0.1, 0.4]  # m, rad
            if kind == "astray":
                off = np.append(rng.uniform(*ROOM), [0.1, 0.1, 0.5] * rng.normal(size=3))
            first = rng.integers(0, 25)
            out |= dict.fromkeys(range(first, first + rng.integers(1, longest)), (kind, off))
        return out

    def stray(self, task, free, kind, off):
        """What the operator does in a burst."""
        seen = self.seen
        if kind == "belief":
            at, block = seen.at, held(seen)
            if block:  # and its block, too, which it then lets go of beside the right place
                off = off * [1, 1, 0, 1, 1, 1]
                at = at | {block: at[block] + off[:3]}
            tcp, euler, target = seen.tcp + off[:3], seen.euler + off[3:], seen.target + off[:3]
            seen = seen._replace(tcp=tcp, euler=euler, target=target, at=at)
        if kind == "astray":
            grip = CLOSE if off[0] > 0 and not held(seen) else seen.grip
            return towards(seen, off[:3], DOWN + off[3:], grip, self.skip)
        a = act(task, seen, free, self.skip)
        if kind == "push":
            pos, euler = np.clip(seen.tcp + 3 * off[:3], *ROOM), seen.euler + 0.5 * off[3:]
            return towards(seen, pos, euler, a[6], self.skip)
        return a * [1, 1, 1, 1, 1, 1, -1] if kind == "fingers" else a

    def annotate(self, task, begin):
        """A span from `begin`, behind the last burst, to this success, of at most 64 steps: the
        longest that the oracle agrees with (a dropped block may lean on another at first)."""
        earliest, end = max(self.t - (SPAN - 1) // self.skip, begin), self.infos[self.t]
        for first in range(earliest, self.t):
            if self.oracle(self.infos[first], end, task):
                self.spans.append((task, first, self.t))
                return True
        return False


def _part(path):
    """What _block wrote. DataError: damaged."""
    remedy = "Remove that file: its frames are recorded again"
    part = data.read_json(path, remedy)
    if part.pop("crc", None) != data.checksum(part):
        raise data.DataError(f"{path}: its checksum is wrong. {remedy}.")
    return part


def record(
    folder: Path, frames: int = 100_000, val_frames: int = 10_000, skip: int = 1,
    pictures: bool = True, procs: int = 2, seed: int = 0, where: Where = TWIN,
    tasks: tuple[str, ...] = sim.TASKS,
):  # fmt: skip
    """Play in CALVIN's format, in folder/training and folder/validation. Killed at any moment, the
    same call goes on where it was.

    Args:
        folder: the recording's
        frames: of training/
        val_frames: of validation/
        skip: steps of 1/30 s that each frame lasts
        pictures: no: states only, for tests/imitable.py
        procs: processes
        seed: of scenes, skills and bursts
        tasks: practise only these
    """
    if not 1 <= skip <= 10:
        raise ValueError(f"--skip {skip}: 1 to 10, or episodes are shorter than a window")
    calvin.check(*tasks)
    splits = {"training": frames, "validation": val_frames}
    with data.locked(folder):
        jobs, done, how = [], 0, (skip, pictures, seed, tasks)
        for split, n in splits.items():
            claim(folder / split, where.about(skip), n, seed, pictures, tasks)
            ends = np.linspace(0, n, max(1, round(n / 2000)) + 1).astype(int).tolist()
            for k, (first, end) in enumerate(pairwise(ends)):
                if (folder / split / f"parts/{k:05d}.json").exists():
                    done += end - first
                else:
                    jobs.append((folder / split, k, first, end - first, *how))
        work = in_parallel(_block, jobs, procs, where, pictures) if jobs else []
        with tqdm(desc="recording", total=frames + val_frames, initial=done, mininterval=1) as bar:
            for length in work:
                bar.update(length)
        print(f"recorded in {folder} (seed {seed}):")
        for split in splits:
            finish(folder / split, *how)
    if pictures:
        thin = "" if skip > 1 else " --skip 2    (15 Hz, as --preset sim)"
        print(f"next: .venv/bin/python data.py pack {folder} PACKED{thin}")


def claim(place, about, n, seed, pictures, tasks):
    """Makes sure that the folder is new, or holds the beginning of the very same recording."""
    if n < SPAN:
        raise ValueError(f"{place}: {n} frames are too few, a span alone may have {SPAN}")
    file = place / "recording.json"
    about = about | {"text_encoder": data.TEXT_ENCODER, "frames": n, "seed": seed}
    about |= {"pictures": pictures, "tasks": [*tasks]}
    about["recorder"] = data.checksum(Path(__file__).read_text("utf-8"))  # another plays otherwise
    place.mkdir(parents=True, exist_ok=True)
    # Files that a kill left half written do not count.
    if not all(p.name.startswith("part_") for p in place.iterdir()):
        remedy = "Choose another folder, delete it, or repeat the command that began it"
        found = data.read_json(file, remedy)
        changed = [k for k in found | about if found.get(k) != about.get(k)]
        lines = [f"{k} {found.get(k)!s:.99}, not {about.get(k)!s:.99}" for k in changed]
        if lines:
            raise data.DataError(f"{file} has {', '.join(lines)}. {remedy}.")
    data.write_text(file, json.dumps(about))
    (place / "parts").mkdir(exist_ok=True)


def _block(env, oracle, place, index, first, length, skip, pictures, seed, tasks):
    """Records one block of frames, then its part file, which says that it is finished."""
    rng = np.random.default_rng([seed, ("training", "validation").index(place.name), index])
    part, states = Recorder(env, oracle, place, first, length, rng, skip, pictures, tasks).play()
    if not pictures:
        data.write(place / f"parts/{index:05d}.npz", lambda file: np.savez(file, **states))
    part["crc"] = data.checksum(part)
    data.write_text(place / f"parts/{index:05d}.json", json.dumps(part))
    return length


def finish(place, skip, pictures, seed, tasks):
    """Everything but the frames: episode bounds, statistics, language."""
    parts = [_part(p) for p in sorted((place / "parts").glob("*.json"))]
    episodes = np.array([e for p in parts for e in p["episodes"]])  # (E, 2), both ends inclusive
    lengths = episodes[:, 1] - episodes[:, 0] + 1
    n = lengths.sum()
    mean, square = np.sum([p["sums"] for p in parts], axis=0) / n
    std = np.sqrt(np.maximum(square - mean**2, 0))
    text = ""
    for name, part in (("robot_obs", slice(0, 15)), ("scene_obs", slice(15, 39))):
        text += f"{name}:\n  - _target_: calvin_agent.utils.transforms.NormalizeVector\n"
        text += f"    mean: {mean[part].tolist()}\n    std: {std[part].tolist()}\n"
    text += f"act_min_bound: {np.min([p['low'] for p in parts], axis=0).tolist()}\n"
    text += f"act_max_bound: {np.max([p['high'] for p in parts], axis=0).tolist()}\n"
    data.write_text(place / "statistics.yaml", text)
    disturbed = np.zeros(n, bool)
    disturbed[[t for p in parts for t in p["disturbed"]]] = True
    bounds = {"calvin_scene_D": [int(episodes.min()), int(episodes.max())]}  # whose twin this is
    spans, told = annotations(place, parts, max(1, int(skip * n // 100)), seed)
    arrays = {"ep_start_end_ids": episodes, "ep_lens": lengths, "scene_info": bounds}
    for name, array in (arrays | {"disturbed": disturbed}).items():
        data.write_array(place / f"{name}.npy", array)
    if not pictures:
        states = [np.load(p) for p in sorted((place / "parts").glob("*.npz"))]
        names = {"robot_obs": "robot_obs", "scene_obs": "scene_obs", "actions": "rel_actions"}
        arrays = {k: np.concatenate([x[name] for x in states]) for k, name in names.items()}
        arrays |= {"spans": np.array(spans), "tasks": np.array(told), "disturbed": disturbed}
        data.write(place / "states.npz", lambda file: np.savez(file, **arrays))
    files = [p.relative_to(place).as_posix() for p in place.glob("**/*.npy")]
    data.write_sums(place, ["recording.json", *sorted(files)])
    print(f"  {place.name}: {n} frames, {len(lengths)} episodes, {len(told)} annotated spans;")
    fewest = sorted(tasks, key=told.count)[:4]
    print("  fewest:", ", ".join(f"{told.count(task)} {task}" for task in fewest))


def annotations(place, parts, wanted, seed):
    """Writes CALVIN's language files. Returns spans [start, end) and their tasks: at most `wanted`,
    about one per hundred steps, in turn one of each task (OFTEN: more), while there are any."""
    rng, folder = np.random.default_rng([seed, 99]), place / data.LANGUAGE
    pool = {t: [s[1:] for p in parts for s in p["spans"] if s[0] == t] for t in sim.TASKS}
    chosen = []
    for spans in pool.values():
        rng.shuffle(spans)
    while len(chosen) < wanted and any(pool.values()):
        for task in rng.permutation([t for t in pool for _ in range(OFTEN.get(t, 1))]):
            if pool[task]:
                chosen.append((*pool[task].pop(), str(task)))
    chosen = sorted(chosen[:wanted])
    spans, tasks = [(a, b + 1) for a, b, _ in chosen], [task for *_, task in chosen]
    phrases = {t: told[1:] for t, told in calvin.sentences().items()}
    if place.name == "validation":  # the sentence of each task that is held out from training
        phrases = {t: told[:1] for t, told in calvin.sentences().items()}
        asked = {t: {"emb": data.encode(s)[None], "ann": s} for t, s in phrases.items()}
        data.write_array(folder / "embeddings.npy", asked)
    ann = [str(rng.choice(phrases[task])) for task in tasks]
    language = {"ann": ann, "task": tasks, "emb": data.encode(ann)[:, None]}
    info = {"episodes": [], "indx": spans}
    data.write_array(folder / "auto_lang_ann.npy", {"language": language, "info": info})
    return spans, tasks


def main(arguments=None):
    import tyro

    how = {"config": (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs)}
    commands = {"rates": rates, "record": record}
    with data.command("teleop.py", ImportError, RuntimeError):  # also of a killed worker
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, description=__doc__, **how)


if __name__ == "__main__":
    main()
