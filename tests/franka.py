"""A simulated FR3 on loopback for test_robot.py: franky-sim, paced, with faults on demand.

    python tests/franka.py HOST     then lines on stdin: reflex | dump FILE

It speaks libfranka's network protocol; what the arm did is written from the simulator's side, not
the client's. Faults that a process can have come from outside: SIGSTOP is a silent connection.
"""

import dataclasses
import gc
import os
import select
import sys
import time

import numpy as np
from franky_sim import SimulationServer
from franky_sim import franka_robot_protocol as protocol
from franky_sim.franka_robot_server import FrankaRobotServer
from franky_sim.mujoco_simulator import MujocoSimulator

COLLISION = 7  # index of cartesian_reflex among libfranka's errors
reflex = [False]


def break_down(server):
    """A reflex as the protocol has it: the motion is aborted, the error stays until recovery."""
    server.stop_motion()
    if server.current_motion_id:
        message = (protocol.RobotCommand.kMove, server.current_motion_id)
        protocol.BaseCommand.send_response(
            server._tcp_socket, *message, protocol.MoveStatus.kReflexAborted
        )
        server.reset_current_motion_id()
    reflex[0] = True


def patch():
    """Let the stock server report a reflex, and clear it when it is told to recover."""
    state, handle = (
        FrankaRobotServer.robot_state.fget,
        protocol.AutomaticErrorRecoveryCommand.handle,
    )

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

    FrankaRobotServer.robot_state = property(robot_state)
    protocol.AutomaticErrorRecoveryCommand.handle = recover


def serve(host):
    patch()
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
                            break_down(robot)
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
