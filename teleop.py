"""The scripted operator that plays with the table, and the recorder. LUMOS Sec. V-B, App. E.

rates      python teleop.py rates --n 20 --procs 2       success and frames of each of the 34 tasks
record     python teleop.py record DIR --frames N --val-frames M --procs P --seed S
           long unsegmented play in CALVIN's on-disk format, with language from the oracle
           --skip 2: a frame for every second step only, 15 a second
both take  --env calvin        and play in CALVIN's own simulator, with its own oracle

Operator moves the *target pose* along way-points that it passes without stopping, so that a skill
fits into one span of 64 frames. Skills are generators of way-points: what went wrong is seen and
answered between two of them, and aborting one, or going on after its success, is trivial. It knows
the environment by reset, step, get_obs, get_info and the target pose alone.

frame      t                t+1              rel_actions[t]: commanded at t, noise included
           o_t -- a_t -->   o_{t+1}          actions[t]: the tcp pose of frame t+1, and the gripper
Copy this file together with sim.py and calvin.py. Needs: numpy, tqdm.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from functools import partial
from itertools import chain, islice, pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import calvin
import sim

BLOCKS = ("block_red", "block_blue", "block_pink")
SIZES = dict(
    zip(BLOCKS, np.array([[0.056, 0.04, 0.04], [0.04] * 3, [0.08, 0.04, 0.04]]), strict=True)
)
DOWN = np.array([np.pi, 0.0, 1.5])  # neutral orientation: fingers down, opening along the world's x
# In the cabinet the hand, 0.2 m wide, must stay clear of the door: it leans out, and grasps high.
CABINET_PITCH, CABINET_DOWN = -0.9, np.array([0.0, -0.008, 0.010])
NEUTRAL = np.array([0.026, -0.231, 0.571])  # the benchmark's start
OPEN, CLOSE = 1, -1
UP = np.array([0.0, 0.0, 1.0])
TABLE_X, TABLE_Y = (0.02, 0.30), (-0.14, -0.07)  # where a block may be put down on the table
SHELVES = {"left": (-0.28, -0.20), "right": (-0.02, 0.09)}  # x ranges of the cabinet's two halves
EPISODE = 200, 600  # steps, then a new scene: what a world model finds hard is scenes, not motion
PLACES = (0.40, 0.13, 0.13, 0.22, 0.12)  # a block on the table, left, right, in the drawer, on top
ROOM = (-0.40, -0.50, 0.38), (0.42, 0.22, 0.75)  # low, high: where noise may push the target pose
SETTLE = 12  # steps behind a success, at most, in which the motion that brought it is completed
LANG = "lang_paraphrase-MiniLM-L3-v2"
ASSETS = Path(__file__).resolve().parent / "assets"


def wrap(a):
    """Angles to [-π, π)."""
    return (np.asarray(a) + np.pi) % (2 * np.pi) - np.pi


def rotation(euler):
    """(3,) euler xyz (PyBullet's: R = Rz Ry Rx) -> (3, 3)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(euler), np.sin(euler)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


def reach(pos, pitch=0.0):
    """Orientation (3,) of a tool at pos (3,): far from the base the hand leans back towards it."""
    far = np.hypot(pos[0] + 0.34, pos[1] + 0.46) + 0.3 * max(0, pos[2] - 0.47)
    return np.array([np.pi, min(pitch, -6 * np.clip(far - 0.70, 0, 0.08)), 1.5])


class Way(NamedTuple):
    """One way-point of the target pose."""

    pos: tuple | np.ndarray  # (3,) m
    orn: tuple | np.ndarray  # (3,) euler xyz, rad
    grip: int  # OPEN or CLOSE, commanded on the way there
    speed: float = 0.028  # m per frame; each axis is limited to 0.02 by the action itself
    tol: float = 0.012  # passed when the target is this near: corners are cut, nothing stops
    settle: int = 0  # frames to wait at most for the arm to catch up with the target
    hold: int = 0  # frames to stay, for the gripper


class Operator:
    """Solves one task at a time from wherever the arm is.

    env: sim.PlayTable or its like. rng: numpy Generator (used only where style() asks for it).
    on_step(action (7,), obs, info) is called after every step; render=True: obs carries pictures.
    """

    def __init__(self, env, rng=None, oracle=sim.oracle, on_step=None, render=False):
        self.env, self.rng, self.oracle, self.on_step = env, rng, oracle, on_step
        self.render, self.rest, self.grip, self.tries = render, None, OPEN, 0
        self.style()

    def style(self, vary=0.0, noise=0.0, astray=0, haste=0.0):
        """How the next skills are done. vary: 0 is the quickest way, 1 varies speeds, approaches
        and grasps as a person would; noise: standard deviation of correlated noise on the arm's six
        numbers; astray: for how many frames the next skill goes wrong; haste: 0 waits for the arm,
        1 moves the target twice as fast, if actions can, and lets it lead the arm by some 8 cm."""
        r = self.rng
        self.noise, self.ou, self.astray, self.vary = noise, np.zeros(6), astray, vary
        self.pace = 1.0 if not vary else r.uniform(0.55, 1.0) if r.random() < 0.4 else 1.0
        self.pace, self.lead = self.pace * (1 + haste), 0.026 + 0.054 * haste

    def _jit(self, *scale):
        """Gaussian offset of the given scales (m or rad), none unless this style varies."""
        if not self.vary:
            return np.zeros(len(scale))
        return self.vary * self.rng.normal(size=len(scale)) * scale

    # ---- what the operator sees ----
    def refresh(self):
        """Reads the environment's state; needed after a reset or after somebody else has acted."""
        self.obs, self.info = self.env.get_obs(render=False), self.env.get_info()
        return self

    @property
    def scene(self):
        return self.obs["scene_obs"]

    def block(self, name):
        """Position (3,) and rotation (3, 3) of a block."""
        i = 6 + 6 * BLOCKS.index(name)
        return self.scene[i : i + 3], rotation(self.scene[i + 3 : i + 6])

    def touching(self, name):
        return {c[2] for c in self.info["scene_info"]["movable_objects"][name]["contacts"]}

    def touched(self):
        """Names of the blocks that the robot touches."""
        return {b for b in BLOCKS if self.info["robot_info"]["uid"] in self.touching(b)}

    def held(self):
        """Name of the block that only the robot touches, or None."""
        uid = self.info["robot_info"]["uid"]
        return next((b for b in BLOCKS if self.touching(b) == {uid}), None)

    def place_of(self, name):
        """'table', 'left', 'right' (half of the cabinet), 'drawer', 'top' (of a block), 'lost'."""
        x, y, z = self.block(name)[0]
        if z < 0.42:
            inside = z > 0.3 and 0.0 < x < 0.36 and -0.157 - self.scene[1] < y < -0.15
            return "drawer" if inside else "lost"
        if y > 0.03:
            return "left" if x < -0.12 else "right"
        if not (-0.42 < x < 0.42 and y > -0.18 and z < 0.6):
            return "lost"
        return "top" if z > 0.485 else "table"

    def feasible(self):
        """The tasks that make sense now, by CALVIN's conditions (and the free hand they assume)."""
        self.refresh()
        s, held, touched = self.scene, self.held(), self.touched()
        where = {b: self.place_of(b) for b in BLOCKS}
        at = {b: self.block(b)[0] for b in BLOCKS}
        table = [b for b in BLOCKS if where[b] == "table" and b != held]
        top = [b for b in BLOCKS if where[b] == "top" and b != held]
        free = [b for b in table if all(np.hypot(*(at[b] - at[t])[:2]) > 0.04 for t in top)]
        if held:
            ok = {
                "place_in_slider": s[0] < 0.06 or s[0] > 0.22,
                "place_in_drawer": s[1] > 0.17,
                "stack_block": bool(free),
            }
            return sorted(t for t in ok if ok[t])
        ok = {
            "move_slider_left": s[0] < 0.1,
            "move_slider_right": s[0] > 0.18,
            "open_drawer": s[1] < 0.08,
            "close_drawer": s[1] > 0.14,
            f"turn_{'off' if s[4] else 'on'}_lightbulb": True,
            f"turn_{'off' if s[5] else 'on'}_led": True,
            "unstack_block": bool(top),
            "push_into_drawer": False,
        }
        for b in BLOCKS:
            name, (x, y, _), loose = b[6:], at[b], b in free
            half, far = {"left": s[0] < 0.06, "right": s[0] > 0.22}, np.hypot(x + 0.34, y + 0.46)
            ok[f"lift_{name}_block_table"] = loose and far < 0.77
            ok[f"lift_{name}_block_drawer"] = where[b] == "drawer" and s[1] > 0.17
            ok[f"lift_{name}_block_slider"] = half.get(where[b], False)
            ok[f"push_{name}_block_right"] = loose and x < 0.27
            ok[f"push_{name}_block_left"] = loose and x > 0.04
            apart = loose and b not in touched and 0.04 < x < 0.32 and y < -0.06
            ok["push_into_drawer"] |= apart and s[1] > 0.17
            for d in ("left", "right"):
                ok[f"rotate_{name}_block_{d}"] = loose and x > -0.05 and far < 0.76
        return sorted(t for t in ok if ok[t])

    # ---- motion: everything goes through env.step ----
    def _act(self, dpos, dorn, grip):
        """One frame: target moves by dpos (m) and dorn (rad), plus the style's correlated noise."""
        a = np.concatenate([dpos / 0.02, dorn / 0.05, [grip]])
        if self.noise:  # Ornstein-Uhlenbeck, stationary deviation = noise
            self.ou = 0.85 * self.ou + self.noise * np.sqrt(1 - 0.85**2) * self.rng.normal(size=6)
            low, high = np.array(ROOM)
            lost = (self.env.target_pos < low).any() or (self.env.target_pos > high).any()
            if lost or rotation(self.env.target_euler)[2, 2] > -0.5:
                self.ou[:] = 0  # clumsy, but not looking away from the table
            a[:6] += self.ou
        a[:6] = np.clip(a[:6], -1, 1)
        self.grip = grip
        self.obs, _, _, self.info = self.env.step(a, render=self.render)
        self.steps += 1
        if self.on_step:
            self.on_step(a, self.obs, self.info)

    def _follow(self, way):
        """Moves the target to one way-point; yields after every step."""
        env, tol, patience = self.env, way.tol + 0.01 * self.noise, 15
        while patience > 0:
            dp, do = way.pos - env.target_pos, wrap(way.orn - env.target_euler)
            d, turn = np.linalg.norm(dp), np.abs(do).max()
            if d <= tol and turn <= 0.02 + 8 * tol:
                break
            # Position and orientation arrive together. The target waits for an arm that lags:
            # something is in its way, or a joint is at its fastest.
            lag = np.linalg.norm(self.obs["robot_obs"][:3] - env.target_pos)
            pace = self.pace * np.clip((self.lead - lag) / 0.02, 0.1, 1)
            frames = max(d / way.speed, np.abs(dp).max() / 0.02, turn / 0.05) / pace
            patience -= lag > 0.012
            self._act(dp / max(frames, 1), do / max(frames, 1), way.grip)
            yield
        for k in range(way.settle + way.hold):
            tcp = self.obs["robot_obs"]
            if k >= way.hold and np.linalg.norm(tcp[:3] - way.pos) < 0.006:
                break
            dp, do = way.pos - env.target_pos, wrap(way.orn - env.target_euler)
            self._act(np.clip(dp, -0.004, 0.004), np.clip(do, -0.03, 0.03), way.grip)
            yield

    def _along(self, ways, wrong=0.0, turn=0.0, flip=1):
        """Follows way-points, all of them `wrong` (3,) m off and turned by `turn` rad, with the
        gripper's command times flip (1 or -1); yields the present one every step."""
        for way in ways:
            pos, orn = np.add(way.pos, wrong), np.add(way.orn, (0, 0, turn))
            there = way._replace(pos=pos, orn=orn, grip=way.grip * flip)
            for _ in self._follow(there):
                yield way

    def run(self, ways, max_steps):
        """Follows way-points without any goal; returns False if max_steps came first."""
        self.refresh().steps = 0
        return not any(self.steps >= max_steps for _ in self._along(ways))

    def attempt(self, task, max_steps=360):
        """Tries, and tries again, until the oracle agrees. Returns (success, steps).

        After a success `self.rest` iterates over the way-points that would complete the motion, for
        run(): first the one that the hand is still on its way to, then, mostly, its retreat.
        """
        start = self.refresh().info
        self.start, self.start_touched = self.scene.copy(), self.touched()
        self.steps, self.rest, self.tries, idle = 0, None, -1, 0
        mistake = self._mistake() if self.astray else ()
        while idle < 3:
            self.tries += 1
            before = self.began = self.steps
            ways = self._skill(task)
            along = self._along(ways, *mistake)
            while way := next(along, None):
                if self.oracle(start, self.info, task):
                    self.rest = chain([way], ways)
                    return True, self.steps
                if self.steps >= max_steps:
                    return False, self.steps
                if self.steps == self.astray:  # sees its mistake: begins anew, or mends it
                    mistake, self.astray, self.began = (), 0, self.steps
                    if self.rng.random() < 0.5:
                        self.tries -= 1
                        break
                    along = self._along(chain([way], ways))
            idle = idle + 1 if self.steps == before else 0  # nothing that could be done
        return False, self.steps

    def _mistake(self):
        """An offset (3,) m, mostly sideways, that puts a hand beside the thing; an angle (rad), in
        half of the cases, that it is turned by; and, if the hand is empty, in half of the cases
        fingers that are closed where they should be open, or open where they should be closed,
        there or in the right place."""
        a, far = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.01, 0.06)
        flip = -1 if self.rng.random() < 0.5 and not self.held() else 1
        if flip < 0 and self.rng.random() < 0.5:
            far = 0.0
        turn = 0.6 * self.rng.normal() if self.rng.random() < 0.5 else 0.0
        return far * np.array([np.cos(a), np.sin(a), self.rng.uniform(-0.5, 0.5)]), turn, flip

    def target(self):
        return np.array(self.env.target_pos), np.array(self.env.target_euler)

    # ---- parts of skills: generators of way-points ----
    def _clear(self):
        """Height (m) at which the hand passes over everything on the table."""
        high = max([0.48] + [self.block(b)[0][2] + 0.02 for b in BLOCKS if b != self.held()])
        return min(high, 0.56) + 0.035 + 0.03 * bool(self.held())

    def leave(self, grip=None, top=None):
        """From wherever the last skill ended to where the hand can travel freely."""
        pos, orn = self.target()
        top = self._clear() if top is None else top
        grip = self.grip if grip is None else grip
        tcp, width = self.obs["robot_obs"][:3], self.obs["robot_obs"][6]
        near = min(np.linalg.norm(self.block(b)[0] - tcp) for b in BLOCKS)
        if near < 0.035 and width > 0.015 and not self.held() and pos[1] < 0.03:
            # A block lies between the fingers: let go, straight up.
            yield Way(pos, orn, OPEN, hold=3 * (width < 0.07))
            yield Way(pos + 0.045 * UP, orn, OPEN)
            pos = pos + 0.045 * UP
        if pos[1] > -0.065:  # at the cabinet: straight back first
            pos = np.array([pos[0], -0.085, max(pos[2] + 0.02, 0.50)])
            yield Way(pos, orn, self.grip)
        if pos[2] < top - 0.01:
            if near < 0.08 and grip != self.grip:  # moving fingers would knock a block away
                pos = pos + 0.035 * UP
                yield Way(pos, orn, self.grip)
            yield Way((*pos[:2], max(pos[2], top)), orn, grip, tol=0.02)

    def home(self):
        """Back to the benchmark's start pose."""
        yield from self.set_down()
        yield from self.leave(OPEN)
        yield Way(NEUTRAL, DOWN, OPEN, tol=0.002, settle=8)

    def spot(self, xs, ys, gap=0.09):
        """The place (2,) in the ranges with most room (up to gap), and rather near the hand."""
        held, tcp = self.held(), self.obs["robot_obs"]
        others = [self.block(b)[0][:2] for b in BLOCKS if b != held]
        grid = [np.array([x, y]) for x in np.linspace(*xs, 9) for y in np.linspace(*ys, 3)]
        room = [min(gap, *(np.linalg.norm(g - o) for o in others)) for g in grid]
        cost = [0.05 * np.linalg.norm(g - tcp[:2]) for g in grid]
        return grid[int(np.argmax(np.subtract(room, cost) + self._jit(*[0.05] * len(grid))))]

    def level(self, name):
        """Pitch at which the held block is level: undoes the tilt it was grasped with."""
        euler, r = self.obs["robot_obs"][3:6], self.block(name)[1]
        up = r[:, np.argmax(np.abs(r[2]))]
        up = up * np.sign(up[2])
        f = np.array([-np.sin(euler[2]), np.cos(euler[2]), 0.0])  # the axis that pitch turns about
        tilt = np.arctan2(np.dot(f, np.cross([0, 0, 1], up)), up[2])
        return float(np.clip(self.env.target_euler[1] - tilt, -0.9, 0.5))

    def set_down(self):
        """Puts a held block down on the table, so that the hand is free."""
        held = self.held()
        if held is None:
            return
        xy = self.spot(TABLE_X, TABLE_Y)
        yield from self._put(held, xy, 0.46, self.level(held))

    def _put(self, held, xy, z, pitch, yaw=None, over=0.05):
        """Lets go of the held block with its centre at (xy, z) (m)."""
        o = (np.pi, pitch, self.target()[1][2] if yaw is None else yaw)
        yield from self.leave(CLOSE, max(self._clear(), z + over + 0.02))
        off = self.obs["robot_obs"][:3] - self.block(held)[0]
        yield Way(np.array([*xy, z + over]) + off, o, CLOSE, tol=0.008)
        off = self.obs["robot_obs"][:3] - self.block(held)[0]  # again: the tilt has changed it
        p = np.array([*xy, z + 0.004]) + off
        yield Way(p, o, CLOSE, speed=0.014, tol=0.003, settle=3)
        yield Way(p, o, OPEN, hold=4)
        yield Way(p + 0.06 * UP, o, OPEN)

    def _grasps(self, name, turn=0.0):
        """[(yaw, shift (3,) from the block's centre)] that put the fingers across the block, best
        first; turn: rotation to come (rad)."""
        p, r = self.block(name)
        here, out = float(wrap(self.target()[1][2] - 1.5)), []
        # What a neighbour must be away from a finger, which is thicker above; not what lies below.
        high = {b: self.block(b)[0][2] - p[2] for b in BLOCKS if b != name}
        near = {b: 0.03 if z > 0.02 else 0.011 for b, z in high.items() if z > -0.02}
        flat = [i for i in range(3) if abs(r[2, i]) < 0.6]
        for i in flat:
            if (width := SIZES[name][i]) > 0.06:
                continue
            across = np.arctan2(r[1, i], r[0, i]) - np.pi / 2
            # Along the block, where a neighbour leaves no room for the fingers at its centre.
            along = [(SIZES[name][j] / 2 - 0.008) * r[:, j] for j in flat if j != i]
            aside = along[0] if along else np.zeros(3)  # none of a block that lies askew
            for off, k in product(wrap(across + np.array([0, np.pi]) - 1.5), (0, -1, 1)):
                if p[1] > 0.03 and abs(off) > 0.8:  # the hand cannot turn in the cabinet
                    continue
                f = np.array([-np.sin(1.5 + off), np.cos(1.5 + off), 0.0])
                tips = [p + k * aside + side * (width / 2 + 0.025) * f for side in (-1, 1)]
                hits = sum(self._gap(b, t) < gap for b, gap in near.items() for t in tips)
                if p[2] < 0.42:  # the drawer's walls and the table's edge
                    back = -0.14 - self.scene[1]
                    hits += sum(not (0.02 < t[0] < 0.34 and back < t[1] < -0.2) for t in tips)
                # Little turning now, none to the wrist's limits, the block's short side. Who is to
                # turn the block has no time to spare, and needs the limits of this wrist: 2.7 rad.
                cost = 0.6 * abs(off) + 0.4 * abs(wrap(off - here)) + 3 * max(0, abs(off) - 1.7)
                if turn:
                    cost = abs(off - here) + 6 * (abs(off - here) > np.pi)  # through the limit
                    cost += 8 * max(0, abs(off) - 2.7, abs(off + turn) - 2.7)
                cost += 3 * hits + 12 * (width - 0.04) + 2 * abs(k)
                out.append((cost, 1.5 + off, k * aside))
        return [g[1:] for g in sorted(out, key=lambda g: g[0])] or [(1.5, np.zeros(3))]

    def _gap(self, name, at):
        """Horizontal distance (m) from a point to a block's outline, 0 inside."""
        p, r = self.block(name)
        out = np.abs((at - p) @ r) - SIZES[name] / 2
        return np.linalg.norm(np.maximum(out, 0) * (np.abs(r[2]) < 0.6))

    def _grasp(self, name, turn=0.0):
        """Takes hold of a block where it lies; another way of doing so if the best one fails."""
        yield from self.set_down()
        yield from self.leave(OPEN)
        grasps = self._grasps(name, turn=turn)
        for k in range(3):
            (yaw, shift), p = grasps[(self.tries + k) % len(grasps)], np.full(3, np.inf)
            # A sliding block is followed.
            while np.linalg.norm(self.block(name)[0] + shift - p) > 0.008:
                p = self.block(name)[0] + shift
                if p[1] - shift[1] > 0.03:  # in the cabinet
                    o, down, back = (
                        (np.pi, CABINET_PITCH, np.clip(yaw, 1.25, 1.75)),
                        CABINET_DOWN,
                        -0.1,
                    )
                    over = np.array([p[0], -0.06, p[2] + 0.07])
                else:
                    o, down, back = (np.pi, reach(p)[1], yaw), 0.004 * UP, 0.0
                    high = self._clear() if p[2] > 0.42 else 0.495  # above what lies there
                    over = np.array([*p[:2], max(p[2] + 0.065, high)])
                yield Way(over + self._jit(0.006, 0.006, 0.012), o, OPEN, tol=0.008)
            p = p + down + self._jit(0.003, 0.003, 0.003)
            yield Way(p, o, OPEN, speed=0.016, tol=0.003, settle=5)
            if np.linalg.norm(self.obs["robot_obs"][:3] - self.env.target_pos) < 0.012:
                yield from self._close(p, o)
                if self.obs["robot_obs"][6] > 0.012:
                    return
            yield Way((p[0], p[1] + back, p[2] + 0.07), o, OPEN)

    def _close(self, p, o):
        """Closes the fingers and waits no longer than they move."""
        last = 1.0
        for k in range(7):
            yield Way(p, o, CLOSE, tol=0.02, hold=1)
            width = self.info["robot_info"]["gripper_opening_width"]
            if k >= 2 and last - width < 0.001:
                break
            last = width

    # ---- the skills ----
    def _skill(self, task):
        words = task.split("_")
        name = next((b for b in BLOCKS if b[6:] in words), None)
        if task not in sim.TASKS:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(sim.TASKS)}")
        if words[0] == "lift":
            return self._lift(name)
        if words[0] == "rotate":
            return self._rotate(name, 1 if words[-1] == "left" else -1)
        if words[0] == "push" and name:
            return self._push(name, 1 if words[-1] == "right" else -1)
        if words[0] == "turn":
            return self._button() if words[2] == "led" else self._switch(words[1] == "on")
        if task.startswith("move_slider"):
            return self._slider(words[-1] == "left")
        return getattr(self, f"_{task}")()

    def _free(self, grip=CLOSE):
        """Hand empty and high enough to travel, fingers closing on the way when they only push."""
        yield from self.set_down()
        yield from self.leave(grip)

    def _lift(self, name):
        yield from self._grasp(name)
        pos, orn = self.target()
        if pos[1] > 0.0:  # in the cabinet: up a little, then out
            yield Way((pos[0], pos[1] - 0.01, pos[2] + 0.06), orn, CLOSE, speed=0.014)
            yield Way((pos[0], -0.12, pos[2] + 0.12), orn, CLOSE, speed=0.018)
        else:
            yield Way(pos + 0.09 * UP, orn, CLOSE, speed=0.016)
            yield Way((*pos[:2], max(0.56, pos[2] + 0.1)), orn, CLOSE)

    def _rotate(self, name, sign):
        i = 11 + 6 * BLOCKS.index(name)

        def turn():  # what is left to do, after an earlier try or a knock
            done = float(wrap(self.scene[i] - self.start[i]))
            return np.clip(1.27 * sign - done, -2, 2)

        yield from self._grasp(name, turn=turn())
        pos, orn = self.target()
        turned = orn + turn() * UP
        yield Way(pos, turned, CLOSE, tol=0.002, settle=3)
        yield Way(pos, turned, OPEN, hold=4)
        yield Way(pos + 0.08 * UP, turned, OPEN)

    def _push(self, name, sign):
        """Closed fingers beside the block, then along x."""
        yield from self._free()
        p, r = self.block(name)
        half = np.abs(r[0]) @ SIZES[name] / 2 + 0.022  # half the block along x, and a finger
        y, z = p[1] + self._jit(0.004)[0], 0.462 + self._jit(0.003)[0]
        x = p[0] - sign * (half + 0.008)
        a, b = np.array([x - sign * 0.012, y, z]), np.array([x + sign * 0.15, y, z])
        yield Way(a + 0.06 * UP + self._jit(0.008, 0.008, 0.01), reach(a), CLOSE)
        yield Way(a, reach(a), CLOSE, speed=0.018)
        yield Way(b, reach(b), CLOSE, speed=0.012, tol=0.003)
        yield Way(b + 0.06 * UP, reach(b), CLOSE)

    def _push_into_drawer(self):
        held = self.held()
        at = {b: self.block(b)[0] for b in BLOCKS if self.place_of(b) == "table" and b != held}
        # What was in the hand at the start does not count.
        ok = [b for b in at if 0.02 < at[b][0] < 0.34 and b not in self.start_touched]
        if not ok:
            return
        yield from self._free()
        name = min(ok, key=lambda b: abs(at[b][1] + 0.1))  # the easiest: well in front
        p, r = self.block(name)
        y = min(p[1] + np.abs(r[1]) @ SIZES[name] / 2 + 0.02, -0.005)
        yield Way((p[0], y + 0.005, 0.53), DOWN, CLOSE)
        yield Way((p[0], y + 0.005, 0.468), DOWN, CLOSE, speed=0.018, tol=0.006)
        yield Way((p[0], -0.185, 0.468), DOWN, CLOSE, speed=0.013, tol=0.003, settle=2)
        yield Way((p[0], -0.17, 0.53), DOWN, CLOSE, hold=10)

    def _slider(self, left):
        s = self.scene[0]
        yield from self._free()
        x, sign = 0.04 - s, -1 if left else 1
        o = (np.pi, -0.45, 1.5)
        goal = 0.04 - 0.28 if left else 0.04
        z = 0.51 + self._jit(0.004)[0]
        yield Way(
            np.array([x - sign * 0.06, -0.05, z + 0.01]) + self._jit(0.005, 0.008, 0.008),
            o,
            CLOSE,
            tol=0.015,
        )
        yield Way((x - sign * 0.05, -0.018, z), o, CLOSE, tol=0.005)
        yield Way((goal - sign * 0.02, -0.018, z), o, CLOSE, speed=0.017, tol=0.003, settle=2)
        yield Way((goal - sign * 0.04, -0.09, 0.54), o, CLOSE)

    def _open_drawer(self):
        s = self.scene[1]
        yield from self._free()
        x, y = 0.17 + self._jit(0.025)[0], -0.212 - s
        yield Way((x, y, 0.50), DOWN, CLOSE, tol=0.012)  # over the blocks at the table's edge
        yield Way((x, y, 0.352), DOWN, CLOSE, speed=0.02, tol=0.005)  # deep: 3 cm of either way
        yield Way((x, -0.212 - 0.232, 0.352), DOWN, CLOSE, speed=0.017, tol=0.003, settle=2)
        yield Way((x, -0.212 - 0.205, 0.39), DOWN, CLOSE)
        yield Way((x, -0.212 - 0.2, 0.52), DOWN, CLOSE)

    def _close_drawer(self):
        s = self.scene[1]
        yield from self._free()
        x, y = 0.18 + self._jit(0.03)[0], -0.261 - s
        yield Way((x, y - 0.03, 0.46), DOWN, CLOSE, tol=0.015)
        yield Way((x, y - 0.03, 0.367), DOWN, CLOSE, tol=0.01)
        yield Way((x, -0.261 - 0.002, 0.367), DOWN, CLOSE, speed=0.017, tol=0.003, settle=2)
        yield Way((x, -0.32, 0.45), DOWN, CLOSE)

    def _button(self):
        yield from self._free()
        p = np.array([-0.12, -0.12, 0.0]) + self._jit(0.006, 0.006, 0)
        yield Way(p + 0.51 * UP, DOWN, CLOSE, tol=0.006)
        yield Way(p + 0.456 * UP, DOWN, CLOSE, speed=0.01, tol=0.003, settle=4)
        yield Way(p + 0.55 * UP, DOWN, CLOSE)

    def _switch(self, on):
        """The switch slides along (0, 0.5, 0.866): pushed up from below, down from above."""
        yield from self._free()
        slope = np.array([0.0, 0.5, 0.866])
        if on:
            x, o = 0.29 + self._jit(0.008)[0], (np.pi, -0.9, 1.5)
            low = np.array([x, 0.015, 0.475])
            yield Way((x, -0.07, 0.53), o, CLOSE)  # over the blocks in front of it
            yield Way(low, o, CLOSE, speed=0.018, tol=0.006)
            yield Way(low + 0.112 * slope, o, CLOSE, speed=0.013, tol=0.003, settle=2)
            yield Way((x, -0.09, 0.60), o, CLOSE)
        else:
            x, o = 0.27 + self._jit(0.008)[0], (np.pi, -0.7, 1.5)
            high = np.array([x, 0.082, 0.655])
            yield Way((x, -0.01, 0.675), o, CLOSE, tol=0.02)
            yield Way(high, o, CLOSE, tol=0.008)
            yield Way(high - 0.12 * slope, o, CLOSE, speed=0.014, tol=0.003, settle=2)
            yield Way((x, -0.09, 0.58), o, CLOSE)

    def _held_or_grasp(self, options):
        """The block to place is in the hand; or it was dropped, and the nearest is picked up."""
        if self.held() is None and options:
            pos, _ = self.target()
            yield from self._lift(
                min(options, key=lambda b: np.linalg.norm(self.block(b)[0] - pos))
            )

    def _place_in_slider(self):
        yield from self._held_or_grasp([b for b in BLOCKS if self.place_of(b) in ("table", "top")])
        held = self.held()
        if held is None:
            return
        xs = SHELVES["right" if self.scene[0] > 0.14 else "left"]
        xy = self.spot(xs, (0.07, 0.085))
        o = (np.pi, min(self.level(held), -0.35), np.clip(self.target()[1][2], 0.9, 2.1))
        yield from self.leave(CLOSE, 0.56)
        off = self.obs["robot_obs"][:3] - self.block(held)[0]
        yield Way(np.array([xy[0], -0.04, 0.55]) + off, o, CLOSE, tol=0.015)
        off = self.obs["robot_obs"][:3] - self.block(held)[0]
        p = np.array([*xy, 0.47]) + off
        yield Way(p, o, CLOSE, speed=0.016, tol=0.004, settle=2)
        yield Way(p, o, OPEN, hold=4)
        yield Way((p[0], -0.05, p[2] + 0.06), o, OPEN, hold=2)

    def _place_in_drawer(self):
        yield from self._held_or_grasp([b for b in BLOCKS if self.place_of(b) in ("table", "top")])
        held, s = self.held(), self.scene[1]
        if held is not None:
            xy = self.spot((0.07, 0.29), (-0.10 - s, -0.235))
            yield from self._put(held, xy, 0.367, self.level(held), over=0.12)

    def _stack_block(self):
        yield from self._held_or_grasp([b for b in BLOCKS if self.place_of(b) == "table"])
        held = self.held()
        bases = [b for b in BLOCKS if b != held and self.place_of(b) == "table"]
        if held is None or not bases:
            return
        base = min(bases, key=lambda b: np.linalg.norm(self.block(b)[0] - self.target()[0]))
        p, _ = self.block(base)
        yaws, here = [yaw for yaw, _ in self._grasps(base)], self.target()[1][2]
        yaw = min(yaws, key=lambda a: abs(a - here))
        yield from self._put(held, p[:2], 0.502, self.level(held), yaw=yaw, over=0.035)

    def _unstack_block(self):
        tops = [b for b in BLOCKS if self.place_of(b) == "top" and b != self.held()]
        if not tops:
            return
        name = max(tops, key=lambda b: self.block(b)[0][2])
        if self.vary and self.rng.random() < 0.5:  # taken off
            yield from self._lift(name)
            return
        yield from self._free()  # pushed off, towards the middle of the table
        p, r = self.block(name)
        sign = 1 if p[0] < 0.15 else -1
        x = p[0] - sign * (np.abs(r[0]) @ SIZES[name] / 2 + 0.03)
        yield Way((x, p[1], p[2] + 0.05), DOWN, CLOSE)
        yield Way((x, p[1], p[2] + 0.01), DOWN, CLOSE, speed=0.018, tol=0.006)
        yield Way((x + sign * 0.12, p[1], p[2] + 0.01), DOWN, CLOSE, speed=0.012, tol=0.003)
        yield Way((x + sign * 0.09, p[1], p[2] + 0.06), DOWN, CLOSE)


# ----------------------------------------------------------------------------- scenes and starts
def random_scene(rng, task=None):
    """A random scene_obs (24,): doors, lights, blocks; with a task, one in which it can be done.

    For a task that needs a block in the hand, one in which that block can be picked up.
    """
    s, words = np.zeros(24), (task or "").split("_")
    s[0] = rng.choice([0, 0.28]) if rng.random() < 0.85 else rng.uniform(0, 0.28)
    s[1] = rng.choice([0, 0.22], p=[0.4, 0.6]) if rng.random() < 0.85 else rng.uniform(0, 0.22)
    s[4:6] = rng.integers(2, size=2)
    if "drawer" in words:
        s[1] = 0 if words[0] == "open" else 0.22
    if "slider" in words:
        s[0] = {"left": 0, "right": 0.28}.get(words[-1], rng.choice([0, 0.28]))
    if words[0] == "turn":
        s[5 if words[2] == "led" else 4] = words[1] == "off"
    s[3] = 0.088 * s[4]
    order = sorted(
        rng.permutation(BLOCKS), key=lambda b: b[6:] not in words
    )  # the wanted one first
    free = "left" if s[0] < 0.14 else "right"  # the half of the cabinet that stands open
    put = {}
    for k, name in enumerate(map(str, order)):
        kind = str(rng.choice(["table", "left", "right", "drawer", "top"], p=PLACES))
        if k == 0 and task:
            kind = {"slider": free, "drawer": "drawer"}.get(
                words[-1] * (words[0] == "lift"), "table"
            )
        elif k == 1 and words[0] in ("stack", "unstack"):
            kind = "table" if words[0] == "stack" else "top"
        elif task == "push_into_drawer":
            kind = str(rng.choice(["left", "right"]))
        bases = [b for b, p in put.items() if p[2] == 0.46 and not (task and b == order[0])]
        if words[0] == "unstack":
            bases = [b for b, p in put.items() if p[2] == 0.46]
        if (kind == "drawer" and s[1] <= 0.17) or (kind == "top" and not bases):
            kind = "table"
        for _ in range(200):
            yaw = np.pi / 2 + rng.uniform(-1, 1) * np.pi / (8 if rng.random() < 0.7 else 1)
            if kind == "table" and rng.random() < 0.5:  # the benchmark's two places, roughly
                xyz = (
                    rng.choice([0.05, 0.23]) + rng.uniform(-0.02, 0.02),
                    rng.uniform(-0.14, -0.1),
                    0.46,
                )
            elif kind == "table":
                xyz = (rng.uniform(*TABLE_X), rng.uniform(*TABLE_Y), 0.46)
            elif kind == "drawer":
                xyz = (rng.uniform(0.06, 0.30), rng.uniform(-0.11 - s[1], -0.23), 0.363)
            elif kind == "top":
                xyz, yaw = put[bases[0]] + 0.041 * UP, s[11 + 6 * BLOCKS.index(bases[0])]
            else:  # turned no more than the operator, or the benchmark, would put it there
                xyz = (rng.uniform(*SHELVES[kind]), rng.uniform(0.08, 0.095), 0.462)
                yaw = np.pi / 2 + rng.uniform(-1, 1) * np.pi / 8
            others = [put[b] for b in put if not (kind == "top" and b == bases[0])]
            if all(np.linalg.norm(np.subtract(xyz, p)[:2]) > 0.095 for p in others):
                break
            if not (task and k == 0):
                kind = str(rng.choice(["table", "left", "right"]))
        put[name] = np.array(xyz)
        i = 6 + 6 * BLOCKS.index(name)
        s[i : i + 6] = *xyz, 0, 0, yaw
    return s


def prepare(env, op, task, rng, chained):
    """Resets to a random scene in which the task can be done; True if it worked.

    chained: the arm stands where another skill has just ended, else at the benchmark's start pose
    (with the block in hand, if the task needs one).
    """
    op.style()
    env.reset(sim.ROBOT_OBS0, random_scene(rng, task))
    op.run([Way(NEUTRAL, DOWN, OPEN, hold=3)], 3)
    if task.startswith("place") or task == "stack_block":
        lifts = [t for t in op.feasible() if t.startswith("lift")]
        ok = bool(lifts) and op.attempt(str(rng.choice(lifts)))[0]
        if ok and not chained:
            op.run(op.rest, 40)
            op.run([Way(NEUTRAL, DOWN, CLOSE)], 40)
    else:
        others = [t for t in op.feasible() if t != task and not t.startswith("lift")]
        ok = not chained or (bool(others) and op.attempt(str(rng.choice(others)))[0])
    return ok and task in op.feasible()


# -------------------------------------------------------------------------------- in many processes
_worker = {}  # of a worker process: its environment, its oracle and the counter of frames


def make_sim(render):
    """The embedded play table and its oracle."""
    return sim.PlayTable(render=render), sim.oracle


def _start_worker(make, render, counter):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    env, oracle = make(render)
    _worker.update(env=env, oracle=oracle, counter=counter)


def _end_with_parent():
    """Who repeats the command of a killed parent must not meet its workers at the same files."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _parallel(function, jobs, procs, make, render, total, done=0, what=""):
    """function(*job) for every job in `procs` processes, each with what make(render) gives it: an
    environment and its oracle; the workers' counter moves the bar."""
    context = multiprocessing.get_context("spawn")
    counter, out = context.Value("q", 0), []
    with (
        tqdm(total=total, initial=done, desc=what, smoothing=0.05) as bar,
        ProcessPoolExecutor(procs, context, _start_worker, (make, render, counter)) as pool,
    ):
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            while not all(f.done() for f in futures):
                wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
                bar.update(done + counter.value - bar.n)
                for f in futures:
                    if f.done() and f.exception():
                        raise f.exception()
            out = [f.result() for f in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        bar.update(total - bar.n)
    return out


def _count():
    with _worker["counter"].get_lock():
        _worker["counter"].value += 1


# -------------------------------------------------------------------------------------------- rates
def _one_rate(task, n, seed):
    for again in range(30):
        rng = np.random.default_rng([seed, sim.TASKS.index(task), n, again])
        op = Operator(_worker["env"], rng, _worker["oracle"])
        if prepare(op.env, op, task, rng, chained=n % 2 == 1):
            ok, steps = op.attempt(task)
            _count()
            return task, bool(ok), steps
    raise RuntimeError(f"{task}: no feasible start in 30 random scenes (seed {seed}, trial {n})")


def rates(n=20, procs=2, seed=0, out=None, make=make_sim):
    """Attempts every task n times: prints, returns and writes to `out` (JSON) {task: figures}."""
    jobs = [(t, k, seed) for t in sim.TASKS for k in range(n)]
    rows = _parallel(_one_rate, jobs, procs, make, False, len(jobs), what="rates")
    table = {}
    print(f"{'task':26s} {'n':>5s} {'success':>8s} {'median':>7s} {'95 %':>6s} {'<= 64':>7s}")
    for task in [*sim.TASKS, "all"]:
        ok, frames = np.array([r[1:] for r in rows if task in (r[0], "all")]).T
        frames = np.where(ok, frames, 360)  # a failure counts as the whole budget
        f = [ok.mean(), *np.percentile(frames, (50, 95)), np.mean(frames <= 64)]
        table[task] = dict(
            zip(("success", "median", "p95", "within64"), map(float, f), strict=True)
        )
        print(f"{task:26s} {len(ok):5d} {f[0]:8.3f} {f[1]:7.0f} {f[2]:6.0f} {f[3]:7.2f}")
    if out:
        text = json.dumps({"seed": seed, "n": n, "tasks": table}, indent=1)
        write(Path(out), lambda file: file.write(text.encode()))
    return table


# ---------------------------------------------------------------------------------------- recording
SIM = {"source": "sim", "renderer": sim.LOOK, "hz": 30, "action_scale": [0.02, 0.05]}


def write(path, fill):
    """Writes a file beside its place and renames it, so that nobody ever sees half of it."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            fill(file)
        os.replace(tmp, path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        why = f"cannot write {path}: {error.strerror}. Free some space (up to 150 kB a frame)"
        why += " or fix the permissions, and run the same command again: it goes on where it"
        why += " stopped"
        raise OSError(error.errno, why) from None


# Tasks that need another one first come up less often; they are preferred when they are possible.
PRIOR = {"unstack": 8, "place_in_drawer": 4, "stack": 4, "place": 2, "close": 0.4, "rotate": 1.5}
PRIOR |= {"lift_drawer": 6, "lift_slider": 4, "lift_table": 1.5, "push": 1.5}


def prior(task):
    """Weight of a task that has not been done yet."""
    words = task.split("_")
    keys = (task, f"{words[0]}_{words[-1]}", words[0])
    return next((PRIOR[k] for k in keys if k in PRIOR), 1)


class _Full(Exception):
    """The block of frames that a worker was to record is full."""


class Recorder:
    """Plays and records one block of consecutive frames: an episode, or more if a scene got stuck.

    A pure function of its arguments that writes under final names: after a crash it is repeated.
    `skip` steps of the simulator make one frame, as in `data.py pack --skip`: what is seen before
    the first, the mean of the arm's actions, the last gripper. Time t counts the steps.
    """

    def __init__(self, env, folder, first, length, rng, oracle=sim.oracle, skip=1):
        self.env, self.folder, self.rng, self.skip = env, folder, rng, skip
        self.t, self.end, self.actions = first * skip, (first + length) * skip, []
        self.episodes, self.spans, self.infos = [], [], {}  # episodes in frames, spans in steps
        self.settling = False  # the last span's motion is being completed
        self.count = dict.fromkeys(sim.TASKS, 0)
        self.sums, self.low, self.high = np.zeros((2, 39)), np.full(7, np.inf), np.full(7, -np.inf)
        self.op = Operator(env, rng, oracle, on_step=self.on_step, render=True)

    def on_step(self, action, obs, info):
        """Frame: what was seen before its steps, the actions commanded in them, the pose they led
        to. Pictures are drawn where a frame begins only."""
        self.actions.append(action)
        self.t += 1
        if self.t % self.skip == 0:
            self.frame(np.append(np.mean(self.actions, 0)[:6], action[6]), obs["robot_obs"])
            self.obs, self.actions = obs, []
        self.op.render = (self.t + 1) % self.skip == 0
        self.infos[self.t] = info
        self.infos.pop(self.t - 128, None)  # no span reaches back further than 63 frames
        if self.settling:
            self.lengthen()
        if self.t == self.end:
            raise _Full

    def frame(self, action, nxt):
        """Writes the frame that ends now: self.obs, action (7,) and the pose nxt (6, ...)."""
        seen = self.obs
        frame = {
            "actions": np.concatenate([nxt[:6], action[6:]]), "rel_actions": action,
            "robot_obs": seen["robot_obs"], "scene_obs": seen["scene_obs"], **seen["rgb_obs"],
        }  # fmt: skip
        name = f"episode_{self.t // self.skip - 1:07d}.npz"
        write(self.folder / name, lambda f: np.savez(f, **frame))
        state = np.concatenate([seen["robot_obs"], seen["scene_obs"]])
        self.sums += [state, state**2]
        self.low = np.minimum(self.low, frame["actions"])
        self.high = np.maximum(self.high, frame["actions"])
        _count()

    def reset(self):
        """Begins an episode. Its first frame carries the state that it was reset to, not what the
        reset's one step of physics made of it, so that a replay from there is exact."""
        start, self.infos = (sim.ROBOT_OBS0, random_scene(self.rng)), {}
        self.actions, self.op.render = [], (self.t + 1) % self.skip == 0
        self.obs = self.env.reset(*start) | dict(
            zip(("robot_obs", "scene_obs"), start, strict=True)
        )
        self.infos[self.t] = self.env.get_info()

    def play(self):
        """Fills the block. Returns what the parent must know about it, as plain numbers."""
        try:
            while True:
                # An episode's last, incomplete frame is left out, and what ends in it or after.
                self.t -= self.t % self.skip
                self.spans = [s for s in self.spans if s[2] < self.t]
                start, stuck, full = self.t, 0, self.t + self.rng.integers(*EPISODE)
                self.reset()
                self.op.refresh().style()
                self.op.run([Way(*self.op.target(), OPEN, hold=5)], 5)  # blocks come to rest
                if self.rng.random() < 0.5:  # half of the episodes begin away from the start pose
                    self.op.run(self.wander(), 60)
                # Over when it is long enough, stuck, or has lost a block, unless this episode or
                # the next would be too short.
                while (stuck < 4 and self.t < full) or (
                    min(self.t - start, self.end - self.t) < EPISODE[0]
                ):
                    stuck = stuck + 1 if self.segment() else 0
                    held = self.op.held()
                    stuck += 4 * any(self.op.place_of(b) == "lost" for b in BLOCKS if b != held)
                self.episodes.append((start // self.skip, self.t // self.skip - 1))
        except _Full:
            self.episodes.append((start // self.skip, self.t // self.skip - 1))
        # In frames; a success must be in the block, not just after it.
        spans = [(task, -(-a // self.skip), b // self.skip) for task, a, b in self.spans]
        spans = [s for s in spans if any(a <= s[1] <= s[2] <= b for a, b in self.episodes)]
        return {
            "episodes": self.episodes, "spans": spans, "sums": self.sums.tolist(),
            "low": self.low.tolist(), "high": self.high.tolist(),
        }  # fmt: skip

    def segment(self):
        """One piece of play, mostly a skill done well or badly. True if it failed."""
        op, rng = self.op, self.rng
        noise = rng.uniform(0.05, 0.25) if rng.random() < 1 / 3 else 0.0
        # A quarter of the time in haste: a world model must see what becomes of an arm that is led
        # faster than it can follow.
        haste = rng.uniform() if rng.random() < 1 / 4 else 0.0
        op.refresh().style(vary=rng.choice([0.0, 0.5, 1.0]), noise=noise, haste=haste)
        kind = rng.random()
        if kind < 0.04:  # idle
            op.run([Way(*op.target(), op.grip, hold=int(rng.integers(5, 25)))], 25)
            return False
        if kind < 0.12:  # reach about in free space, sometimes clumsily
            op.noise = rng.choice([0.0, 0.3, 0.8])
            op.run(self.wander(), 60)
            return False
        if kind < 0.22:  # the next skill starts where the benchmark starts
            op.run(op.home(), 120)
            op.style(vary=rng.choice([0.0, 0.5, 1.0]), noise=noise, haste=haste)
        tasks = op.feasible()
        if op.held() and (rng.random() < 0.2 or not tasks):
            return not op.run(op.set_down(), 90)
        weights = np.array([prior(t) / (1 + 2 * self.count[t]) ** 1.5 for t in tasks])
        task = str(rng.choice(tasks, p=weights / weights.sum()))
        op.astray = int(rng.integers(8, 45)) if rng.random() < 0.35 else 0
        self.count[task] += 1  # whatever comes of it, lest what fails be tried again and again
        aborted, start = rng.random() < 0.15, self.t
        success, _ = op.attempt(task, int(rng.integers(5, 45)) if aborted else 90 + op.astray)
        if not success:
            return not aborted
        # The try that succeeded shows what was meant, unless it did so by mistake, and that it does
        # not stop at the threshold.
        self.settling = not op.astray and self.annotate(task, start + op.began)
        op.run(islice(op.rest, 1), SETTLE)
        self.settling = False
        # Retreat, or let the next skill begin from here, as in a chain of instructions.
        if rng.random() < 0.35:
            op.run(op.rest, int(rng.integers(2, 40)))
        return False

    def annotate(self, task, start) -> bool:
        """A span of at most 64 frames, as CALVIN's are, from where the try began to this success.
        What came before it says nothing of the sentence. False if the oracle does not agree."""
        first = max(self.t - 63, start)
        if solved := self.op.oracle(self.infos[first], self.infos[self.t], task):
            self.spans.append([task, first, self.t])
        return solved

    def lengthen(self):
        """Moves the last span on to now, if it ended a frame ago and is a success still. Not into
        the retreat: there one cannot see whether the hand that hovers here has yet to press."""
        task, first, end = self.spans[-1]
        later = max(first, self.t - 63)
        known = end == self.t - 1 and later in self.infos  # not in an episode that is over
        if known and self.op.oracle(self.infos[later], self.infos[self.t], task):
            self.spans[-1] = [task, later, self.t]

    def wander(self):
        op, rng = self.op, self.rng
        yield from op.leave()
        for _ in range(rng.integers(1, 4)):
            pos = rng.uniform([-0.28, -0.36, op._clear()], [0.26, -0.10, 0.66])
            orn = DOWN + rng.normal(size=3) * [0.05, 0.2, 0.5]
            grip = CLOSE if op.held() else rng.choice([OPEN, CLOSE])
            yield Way(pos, orn, int(grip), speed=rng.uniform(0.006, 0.028))


def _block(folder, split, index, first, length, seed, skip):
    """Records one block of frames, then its part file, which says that it is finished."""
    rng = np.random.default_rng([seed, ("training", "validation").index(split), index])
    part = Recorder(_worker["env"], folder, first, length, rng, _worker["oracle"], skip).play()
    write(folder / "parts" / f"{index:05d}.json", lambda f: f.write(json.dumps(part).encode()))


def record(folder, frames, val_frames, procs=2, seed=0, make=make_sim, about=SIM, skip=1):
    """Records play into folder/training and folder/validation; goes on where it was stopped.

    make: function(render) -> (environment, oracle). about: what recording.json says of it.
    skip: steps of the simulator, at 30 Hz, that one frame lasts.
    """
    folder, jobs, done = Path(folder), [], 0
    if skip > 10:
        raise ValueError(f"--skip {skip}: at most 10, or episodes are shorter than a window")
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
                jobs.append((place, split, k, first, end - first, seed, skip))
    if jobs:
        _parallel(_block, jobs, procs, make, True, frames + val_frames, done, "recording")
    print(f"recorded in {folder} (seed {seed}):")
    for split in ("training", "validation"):
        _finish(folder / split, split, seed, skip)
    thin = "" if skip > 1 else " --skip 2    (15 Hz, as --preset sim)"
    print(f"next: python data.py pack {folder} PACKED{thin}")


def _claim(place, n, seed, about):
    """Makes sure that the folder is new, or holds the beginning of the very same recording."""
    if n < 64:
        raise ValueError(f"{place}: {n} frames are too few, a span alone may have 64")
    about = about | {"text_encoder": LANG[5:], "frames": n, "seed": seed}
    if place.exists() and any(place.iterdir()):
        try:
            found = json.loads((place / "recording.json").read_text())
        except (OSError, ValueError):
            found = "no readable recording.json"
        if found != about:
            remedy = "choose another folder, delete it, or repeat the command that began it"
            raise FileExistsError(f"{place} holds something else ({found}; not {about}): {remedy}")
    (place / "parts").mkdir(parents=True, exist_ok=True)
    write(place / "recording.json", lambda f: f.write(json.dumps(about).encode()))


def _finish(place, split, seed, skip):
    """Everything but the frames: episode bounds, statistics, language."""
    parts = [json.loads(p.read_text()) for p in sorted((place / "parts").glob("*.json"))]
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
    print(
        f"  {split}: {lengths.sum()} frames, {len(lengths)} episodes, {len(chosen)} annotated spans"
    )
    for task in sim.TASKS:
        print(f"    {task:26s} {found[task]:5d} skills, {chosen.count(task):4d} annotated")


def _language(parts, steps, split, seed):
    """CALVIN's language files {name: content}, and how many spans of each task there were."""
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
    embed, key = _embeddings(), "train" if split == "training" else "validation"
    ann = [str(rng.choice(sentences[task][key])) for *_, task in chosen]
    files = {
        "auto_lang_ann": {
            "language": {"ann": ann, "task": [c[2] for c in chosen], "emb": embed(ann)[:, None]},
            "info": {"episodes": [], "indx": [(a, b + 1) for a, b, _ in chosen]},  # end exclusive
        }
    }
    if split == "validation":
        held_out = {t: sentences[t]["validation"] for t in sim.TASKS}
        files["embeddings"] = {t: {"emb": embed(s)[None], "ann": s} for t, s in held_out.items()}
    return {f"{LANG}/{name}": value for name, value in files.items()}, found


def _embeddings():
    """Function: sentences (N) -> (N, 384) float32, from the committed table."""
    path = ASSETS / "embeddings.npz"
    remedy = "restore it from the repository and repeat the command; the frames are not lost"
    if not path.exists():
        raise FileNotFoundError(f"{path}, the sentences' embeddings, is missing: {remedy}")
    with np.load(path, allow_pickle=False) as data:
        if str(data["text_encoder"]) != LANG[5:]:
            raise ValueError(f"{path} is of {data['text_encoder']}, expected {LANG[5:]}: {remedy}")
        rows, at = data["embeddings"], {str(s): i for i, s in enumerate(data["sentences"])}

    def embed(sentences):
        unknown = [s for s in sentences if s not in at]
        if unknown:
            raise ValueError(f"{path} lacks {unknown[0]!r} of sentences.json: {remedy}")
        return rows[[at[s] for s in sentences]].astype(np.float32)

    return embed


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
            record(a.folder, a.frames, a.val_frames, a.procs, a.seed, make, about, a.skip)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
