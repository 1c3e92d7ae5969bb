"""Arms to test robot.py and deploy.py against: a double without dynamics, and franky-sim.

    python tests/franka.py HOST [HISTORY]     a simulated FR3; SIGUSR1 causes a reflex

franky-sim speaks libfranka's network protocol on loopback. HISTORY: a file of what the arm did, by
the simulator, not the client. A silent connection is a process stopped by SIGSTOP.
"""

import dataclasses
import gc
import os
import signal
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


def environment(c, arm, cameras=None, log=None, dry_run=False):
    """A RealEnv by the arm's clock. Its list `keys` is what the operator presses next."""
    keys = []
    env = RealEnv(c, dry_run, arm, cameras, key=lambda: keys.pop(0) if keys else "",
                  clock=lambda: arm.state().time)  # fmt: skip
    env.keys, env.log = keys, log
    return env


def doubled(c=None, arm=None, **options):
    """An environment of doubles."""
    c = dataclasses.replace(c or R.RobotConfig(), max_frame_age=2.0, max_state_age=2.0)
    cameras = {"rgb_static": Noise(), "rgb_gripper": Noise()}
    return environment(c, arm or Double(), cameras, **options)


# ---------------------------------------------------------------------------- franky-sim
def patch(protocol, server_class):
    """Lets the stock server report a reflex, and clear it when it is told to recover. Returns
    what causes one: the motion is aborted, the error stays until recovery."""
    state, recover = server_class.robot_state.fget, protocol.AutomaticErrorRecoveryCommand.handle
    flags = tuple(i == 7 for i in range(41))  # libfranka's errors: 7 is cartesian_reflex
    now = {"errors": flags, "reflex_reason": flags, "robot_mode": protocol.RobotMode.kReflex}
    server_class.broken = False

    def robot_state(self):
        return dataclasses.replace(state(self), **now) if self.broken else state(self)

    def handle(self, server):
        server.broken = False
        recover(self, server)

    def break_down(server):
        server.stop_motion()
        if server.current_motion_id:
            message = (protocol.RobotCommand.kMove, server.current_motion_id)
            status = protocol.MoveStatus.kReflexAborted
            protocol.BaseCommand.send_response(server._tcp_socket, *message, status)
            server.reset_current_motion_id()
        server.broken = True

    server_class.robot_state = property(robot_state)
    protocol.AutomaticErrorRecoveryCommand.handle = handle
    return break_down


def serve(host, history=os.devnull):
    """history: rows of float64: wall clock, simulated time, the tool's xyz, the hand's width."""
    from franky_sim import SimulationServer
    from franky_sim import franka_robot_protocol as protocol
    from franky_sim.franka_robot_server import FrankaRobotServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    asked = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append("reflex"))
    break_down = patch(protocol, FrankaRobotServer)
    with open(history, "wb", 0) as file, MujocoSimulator(enable_visualization=False) as sim:
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
                    p = robot.robot_state.O_T_EE[12:15]
                    file.write(np.array([time.time(), n / 1000, *p, arm.hand_width]).tobytes())
                    if asked:
                        asked.clear()
                        break_down(robot)
                deadline += 1e-3
                late = time.perf_counter() - deadline
                if late < 0:
                    time.sleep(-late)
                elif late > 0.05:  # never catch up in a burst
                    deadline = time.perf_counter()


if __name__ == "__main__":
    serve(*sys.argv[1:])
