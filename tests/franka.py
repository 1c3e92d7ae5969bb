"""Arms to test robot.py and deploy.py against: a double without dynamics, and franky-sim.

    python tests/franka.py HOST     a simulated FR3; then lines on stdin: reflex | dump FILE

franky-sim speaks libfranka's network protocol on loopback; what the arm did is written from the
simulator's side, not the client's. A silent connection is a process stopped by SIGSTOP.
"""

import dataclasses
import gc
import os
import select
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import robot as R

HOME = np.array(R.RobotConfig().neutral[0])
HAND = np.eye(4)  # the hand's tool in the flange's frame
HAND[:3, :3], HAND[2, 3] = R.Rotation.from_euler("z", -np.pi / 4).as_matrix(), 0.1034
RealEnv = R.RealEnv  # tests put something else in its place
COLLISION = 7  # index of cartesian_reflex among libfranka's errors
reflex = [False]


def act(*a) -> np.ndarray:
    """An action that begins with these numbers: the others are 0, the hand is open."""
    return np.array([*a, *[0.0] * (6 - len(a)), 1.0])


# ---------------------------------------------------------------------------- a double
class Lost(Exception):
    pass


class Double:
    """An arm without dynamics, halfway to its target at every reading. Its clock advances by 5 ms
    whenever it is read, so nothing waits for the wall's."""

    errors, lost = (Lost,), ()

    def __init__(self):
        self.M, self.q, self.t, self.width = R.flange(HOME) @ HAND, HOME.copy(), 0.0, 0.08
        self.target, self.calls, self.broken, self.mode = self.M.copy(), [], [], "Idle"

    def state(self):
        if self.broken:
            raise self.broken.pop()
        self.t += 0.005
        self.M[:3, 3] += 0.5 * (self.target[:3, 3] - self.M[:3, 3])
        self.M[:3, :3] = self.target[:3, :3]
        return R.ArmState(self.M.copy(), self.q, self.t, self.mode, HAND)

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
    """A camera whose pictures are all different, and always new; black bars are left and right."""

    spec, box = "noise", (0, 240, 40, 280)

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def read(self):
        self.frame = np.zeros((240, 320, 3), np.uint8)
        self.frame[:, 40:280] = self.rng.integers(0, 256, (240, 240, 3), np.uint8)
        return R.resize_area(self.frame[:, 40:280], 200), time.monotonic()

    def close(self):
        pass


def doubled(c=None, keys=None, dry_run=False, arm=None, log=None):
    """A RealEnv of doubles. keys: a list of what the operator presses next."""
    arm, keys = arm or Double(), [] if keys is None else keys
    c = dataclasses.replace(c or R.RobotConfig(), max_frame_age=2.0, max_state_age=2.0)
    cameras = {"rgb_static": Noise(), "rgb_gripper": Noise()}

    def key():
        return keys.pop(0) if keys else ""

    env = RealEnv(c, dry_run, arm, cameras, key, clock=lambda: arm.state().time)
    env.keys, env.log = keys, log
    return env


# ---------------------------------------------------------------------------- franky-sim
def break_down(protocol, server):
    """A reflex as the protocol has it: the motion is aborted, the error stays until recovery."""
    server.stop_motion()
    if server.current_motion_id:
        message = (protocol.RobotCommand.kMove, server.current_motion_id)
        status = protocol.MoveStatus.kReflexAborted
        protocol.BaseCommand.send_response(server._tcp_socket, *message, status)
        server.reset_current_motion_id()
    reflex[0] = True


def patch(protocol, server_class):
    """Let the stock server report a reflex, and clear it when it is told to recover."""
    state = server_class.robot_state.fget
    handle = protocol.AutomaticErrorRecoveryCommand.handle

    def robot_state(self):
        s = state(self)
        if not reflex[0]:
            return s
        flags = tuple(i == COLLISION for i in range(41))
        mode = protocol.RobotMode.kReflex
        return dataclasses.replace(s, errors=flags, reflex_reason=flags, robot_mode=mode)

    def recover(self, server):
        reflex[0] = False
        handle(self, server)

    server_class.robot_state = property(robot_state)
    protocol.AutomaticErrorRecoveryCommand.handle = recover


def serve(host):
    from franky_sim import SimulationServer
    from franky_sim import franka_robot_protocol as protocol
    from franky_sim.franka_robot_server import FrankaRobotServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    patch(protocol, FrankaRobotServer)
    rows = []  # wall, simulated time, tool xyz, largest joint speed, hand width, robot in control
    with MujocoSimulator(enable_visualization=False) as sim:
        arm = sim.add_robot(initial_hand_width=0.08)
        with SimulationServer(sim, hostname_candidates=[host]) as server:
            robot = server.robot_servers[0]
            print("READY", flush=True)
            gc.freeze()
            gc.disable()
            deadline, n = time.perf_counter(), 0
            while True:
                server.run_once(realtime=False)
                n += 1
                if n % 10 == 0:
                    s = robot.robot_state
                    p, v = s.O_T_EE[12:15], np.abs(s.dq).max()
                    busy = robot.current_motion_id > 0
                    rows.append((time.time(), n / 1000, *p, v, arm.hand_width, busy))
                    if select.select([0], [], [], 0)[0]:
                        command, *names = os.read(0, 4096).decode().split()
                        if command == "reflex":
                            break_down(protocol, robot)
                        elif command == "dump":
                            np.save(names[0] + ".part.npy", np.array(rows))
                            os.replace(names[0] + ".part.npy", names[0])
                deadline += 1e-3
                late = time.perf_counter() - deadline
                if late < 0:
                    time.sleep(-late)
                elif late > 0.05:  # never catch up in a burst
                    deadline = time.perf_counter()


if __name__ == "__main__":
    serve(sys.argv[1])
