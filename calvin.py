"""CALVIN: the benchmark's tasks and chains, and its own simulator. LUMOS Sec. V-A.

    TASKS, oracle(start_info, info, task) -> bool     the 34 tasks, and when each is done
    chain(n) -> start state, five tasks               the 1000 chains, n from 0 to 999
    start_pose(state) -> robot_obs, scene_obs         where a chain begins
    Table, make_oracle                                calvin_env and its own oracle

The oracle reads the infos of sim.PlayTable and of calvin_env. Neither tacto nor calvin_agent is
needed: the tactile camera is left out.
Copy this file alone. Needs: numpy, scipy; for Table also calvin_env and what that needs (INSTALL).
"""

import difflib
import functools
import importlib
import importlib.util
import itertools
import json
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.spatial.transform import Rotation

# The names of the table's joints and links.
SLIDE, DRAWER, BUTTON, SWITCH = "base__slide", "base__drawer", "base__button", "base__switch"
TOP, SHELF, TRAY = "base_link", "plank_link", "drawer_link"  # where blocks lie
# fmt: off
# The benchmark's first robot state; a default scene: red, blue on the table, pink on the shelf.
ROBOT_OBS0 = np.array([
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963, -1.21779124,
    1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0])
SCENE_OBS0 = np.array([
    0, 0, 0, 0, 0, 0, 0.05, -0.12, 0.45999, 0, 0, np.pi / 2, 0.23, -0.12, 0.45999, 0, 0, 0,
    0.0703, 0.0924, 0.46099, 0, 0, np.pi / 2])
# fmt: on
BLOCKS = ("red_block", "blue_block", "pink_block")
# m, where a chain's blocks lie: on the table; in the two slots of the cabinet behind the door.
TABLE_PLACES = (0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.119995140, 0.459990010)
SHELF_PLACES = {"slider_left": (-0.240851662, 0.0924044687, 0.460990009),
                "slider_right": (0.0703416330, 0.0924044687, 0.460990009)}  # fmt: skip
State = namedtuple("State", ("led", "lightbulb", "slider", "drawer", *BLOCKS))
INSTALL = """To install it (docs/calvin.md):
  pip install pybullet gym==0.26.2 hydra-core scipy
  pip install opencv-python-headless numpy-quaternion gitpython
  git clone https://github.com/mees/calvin_env
  pip install --no-deps -e calvin_env      (or give --calvin-env calvin_env)"""
SCENE = "calvin_scene_D_eval"  # environment D; every reset places doors, lights and blocks anyway
RENDERERS = ("egl", "tiny")  # the dataset's, on a GPU or by Mesa; Bullet's own, with other shadows
CAMERAS = ("static", "gripper")


# ------------------------------------------------------------------ the 34 tasks
def facts(info):
    """An info in short. Of a block or the robot: touches {(body, link)}, bodies {body}."""
    scene, robot = info["scene_info"], SimpleNamespace(**info["robot_info"])
    blocks = {name: SimpleNamespace(**block) for name, block in scene["movable_objects"].items()}
    for thing in (robot, *blocks.values()):
        thing.touches = {(contact[2], contact[4]) for contact in thing.contacts}
        thing.bodies = {body for body, _ in thing.touches}
    table = scene["fixed_objects"]["table"]
    parts = {name: (table["uid"], link) for name, link in table["links"].items()}
    return SimpleNamespace(robot=robot, blocks=blocks, parts=parts, scene=scene)


def rotated(start, end, block, sign):
    """Turned by over 60° about z, upright, within 0.1 m, resting on something besides the robot."""
    a, b = start.blocks[block], end.blocks[block]
    turn = Rotation.from_quat(b.current_orn) * Rotation.from_quat(a.current_orn).inv()
    roll, pitch, yaw = turn.as_euler("xyz", degrees=True)
    turned = 60 < sign * yaw < 180 and max(abs(roll), abs(pitch)) < 30
    near = np.linalg.norm(np.subtract(b.current_pos, a.current_pos)) <= 0.1
    return turned and near and b.bodies - {start.robot.uid}


def pushed(start, end, block, sign):
    """Moved by over 0.1 m in x, lying on something at both times, and still on all it lay on."""
    a, b = start.blocks[block], end.blocks[block]
    under, still = ({x for x in c.touches if x[0] != start.robot.uid} for c in (a, b))
    return under and under <= still and sign * (b.current_pos[0] - a.current_pos[0]) > 0.1


def lifted(start, end, block, metres, part):
    """Risen by over `metres` from a contact with the table's `part`; touched by the robot alone."""
    a, b = start.blocks[block], end.blocks[block]
    held = b.bodies == {start.robot.uid} and start.parts[part] in a.touches
    return held and b.current_pos[2] - a.current_pos[2] > metres


def placed(start, end, part):
    """The one thing the robot held, a block that touched nothing else, let go, touches `part`."""
    for a, b in zip(start.blocks.values(), end.blocks.values(), strict=True):
        if start.robot.bodies == {a.uid} and a.uid not in end.robot.bodies:
            return a.bodies == {start.robot.uid} and end.parts[part] in b.touches
    return False


def slid(start, end, door, metres):
    """Door or drawer moved by over `metres`, in its direction."""
    a, b = (facts.scene["doors"][door]["current_state"] for facts in (start, end))
    return (b - a) * np.sign(metres) > abs(metres)


def switched(start, end, light, state):
    """The light came to `state`, 0 or 1, from the other."""
    a, b = (facts.scene["lights"][light]["logical_state"] for facts in (start, end))
    return (a, b) == (1 - state, state)


def stacked(start, end):
    """A block clear of others comes to rest on blocks alone, slower than 1 m/s and 1 rad/s."""
    blocks = {block.uid for block in start.blocks.values()}
    for a, b in zip(start.blocks.values(), end.blocks.values(), strict=True):
        slow = np.abs([b.current_lin_vel, b.current_ang_vel]).max() < 1
        if slow and b.bodies and b.bodies <= blocks and not a.bodies & blocks:
            return True
    return False


def dropped(start, end):
    """A block that lay on the table top alone touches the drawer, without the robot."""
    for a, b in zip(start.blocks.values(), end.blocks.values(), strict=True):
        fell = a.touches == {start.parts[TOP]} and end.parts[TRAY] in b.touches
        if fell and start.robot.uid not in b.bodies:
            return True
    return False


_COLOURS, _SIDES = ("red", "blue", "pink"), (("right", 1), ("left", -1))
_LIFTS = {"table": (0.05, TOP), "slider": (0.03, SHELF), "drawer": (0.05, TRAY)}
_RULES = {
    **{f"rotate_{c}_block_{to}": (rotated, f"block_{c}", -s) for c in _COLOURS for to, s in _SIDES},
    **{f"push_{c}_block_{to}": (pushed, f"block_{c}", s) for c in _COLOURS for to, s in _SIDES},
    "move_slider_left": (slid, SLIDE, 0.15), "move_slider_right": (slid, SLIDE, -0.15),
    "open_drawer": (slid, DRAWER, 0.12), "close_drawer": (slid, DRAWER, -0.12),
    **{f"lift_{c}_block_{x}": (lifted, f"block_{c}", *_LIFTS[x]) for c in _COLOURS for x in _LIFTS},
    "place_in_slider": (placed, SHELF), "place_in_drawer": (placed, TRAY),
    "stack_block": (stacked,), "unstack_block": (lambda start, end: stacked(end, start),),
    "turn_on_lightbulb": (switched, "lightbulb", 1),
    "turn_off_lightbulb": (switched, "lightbulb", 0),
    "turn_on_led": (switched, "led", 1), "turn_off_led": (switched, "led", 0),
    "push_into_drawer": (dropped,),
}  # fmt: skip
TASKS = tuple(_RULES)  # in the order of CALVIN's task table


def check(*tasks) -> None:
    """ValueError: a task is not one of the 34, or comes twice."""
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"a task comes twice: {', '.join(tasks)}")
    for task in tasks:
        if task not in _RULES:
            close = difflib.get_close_matches(str(task), TASKS, cutoff=0.3) or TASKS[:3]
            raise ValueError(f"unknown task {task!r}; there are, for example, {', '.join(close)}")


def oracle(start_info, info, task):
    """Whether `task` was done between two infos."""
    check(task)
    rule, *arguments = _RULES[task]
    return bool(rule(facts(start_info), facts(info), *arguments))


# ------------------------------------------------------------------ the benchmark's 1000 chains
@functools.cache
def start_states() -> tuple[State, ...]:
    """The 192 initial states: two blocks on the table, or one on it and one in either slot."""
    doors = itertools.product((0, 1), (0, 1), ("right", "left"), ("closed", "open"))
    blocks = itertools.product(("table", "slider_right", "slider_left"), repeat=3)
    blocks = [at for at in blocks if at.count("table") == 2 or len(set(at)) == 3]
    return tuple(State(*door, *at) for door, at in itertools.product(doors, blocks))


@functools.cache
def outcomes(state: State, task: str) -> tuple[State, ...]:
    """The states that `task` can lead to: none if it is impossible, several if it is ambiguous."""
    at = state._asdict()
    kind, *_, last = words = task.split("_")
    held = [b for b in BLOCKS if at[b] == "grasped"]
    on_table = [b for b in BLOCKS if at[b] == "table"]
    changes = []  # one {what: its new value} per way of doing it
    if kind == "place":  # the benchmark names the slot after the side where the door is
        where = "drawer" if last == "drawer" else f"slider_{state.slider}"
        changes = [{b: where} for b in held if where != "drawer" or state.drawer == "open"]
    elif kind == "stack":
        changes = [{b: "top", under: "bottom"} for b in held for under in on_table]
    elif held:
        pass  # everything else needs an empty gripper
    elif kind == "unstack":
        tower = [b for b in BLOCKS if at[b] in ("top", "bottom")]
        changes = [dict.fromkeys(tower, "table")] if tower else []
    elif task == "push_into_drawer":  # with the other two blocks out of the way, in the cabinet
        if state.drawer == "open" and sum(at[b] in SHELF_PLACES for b in BLOCKS) == 2:
            changes = [{b: "drawer"} for b in on_table]
    elif kind in ("turn", "move", "open", "close"):
        what = {"turn": last, "move": "slider"}.get(kind, "drawer")
        after = {"turn": int(words[1] == "on"), "move": last, "open": "open"}.get(kind, "closed")
        changes = [{what: after}] if at[what] != after else []
    else:  # lift, push or rotate a block of one colour
        block = f"{words[1]}_block"
        far = "slider_left" if state.slider == "right" else "slider_right"  # what the door bares
        source = {"slider": far, "drawer": "drawer"}.get(last, "table")
        if at[block] == source and (source != "drawer" or state.drawer == "open"):
            changes = [{block: "grasped"} if kind == "lift" else {}]
    return tuple(state._replace(**change) for change in changes)


@functools.cache
def category(task: str) -> str:
    """The five tasks of a chain are of five different categories, out of eleven."""
    kind, *_, last = task.split("_")
    if kind in ("rotate", "push") and last != "drawer":
        return "turn or push a block"
    return {"lift": f"lift from {last}", "open": "drawer", "close": "drawer"}.get(kind, kind)


def possible(state: State, tasks) -> bool:
    """Each task in turn has exactly one outcome."""
    for task in tasks:
        after = outcomes(state, task)
        if len(after) != 1:
            return False
        state = after[0]
    return True


@functools.cache
def chains_from(i: int, count: int, among=TASKS) -> list[tuple[str, ...]]:
    """The first `count` possible draws of 5 tasks in state i, by RandomState(i). Of all 34, no two
    are of one category. ValueError: there are too few such chains."""
    check(*among)
    if len(among) < 5:
        raise ValueError(f"a chain needs five tasks, not {len(among)}: give more")
    state, rng, found = start_states()[i], np.random.RandomState(i), []
    for _ in range(200_000):  # some 16,000; a choice without replacement is a permutation
        tasks = tuple(among[k] for k in rng.permutation(len(among))[:5].tolist())
        apart = len({category(task) for task in tasks}) == 5 or among != TASKS
        if apart and possible(state, tasks):
            found.append(tasks)
        if len(found) == count:
            return found
    tasks = ", ".join(among)
    raise ValueError(f"hardly any five of {tasks} can be done in turn from {state}: give more")


def chain(number: int, among=TASKS) -> tuple[State, tuple[str, ...]]:
    """Chain `number` (0 to 999) of the benchmark: its start state and its five tasks; or five
    `among` fewer tasks, from the same state."""
    parts = np.array_split(np.arange(1000), len(start_states()))  # 6 chains of each of 40, then 5
    place = np.random.RandomState(0).permutation(1000)[number]  # before they are shuffled
    i = next(i for i, part in enumerate(parts) if place in part)
    return start_states()[i], chains_from(i, len(parts[i]), among)[place - parts[i][0]]


def start_pose(state: State) -> tuple[np.ndarray, np.ndarray]:
    """robot_obs (15,) and scene_obs (24,) of a start state; the blocks' poses are drawn for it."""
    seed = 0  # FNV-1, 32 bit, of the state as Python prints it; the last 0: nothing is grasped
    for byte in f"dict_values({[*state, 0]})".encode("utf-16-le"):
        seed = (seed * 0x01000193) % 2**32 ^ byte
    rng, table, scene = np.random.RandomState(seed), list(TABLE_PLACES), np.zeros(24)
    rng.shuffle(table)
    scene[0] = 0.28 * (state.slider == "left")  # m
    scene[1] = 0.22 * (state.drawer == "open")  # m
    scene[3] = 0.088 * state.lightbulb  # m, the switch
    scene[4:6] = state.lightbulb, state.led
    places = (0, int(state.red_block == "table"), 1)  # blue takes what red and pink leave it
    for k, (block, place) in enumerate(zip(BLOCKS, places, strict=True)):
        scene[6 + 6 * k : 9 + 6 * k] = SHELF_PLACES.get(getattr(state, block), table[place])
        scene[11 + 6 * k] = rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)  # yaw
    return ROBOT_OBS0.copy(), scene


def sentences() -> dict[str, list[str]]:
    """{task: its sentences in assets/}, of which the first is held out from training."""
    text = (Path(__file__).resolve().parent / "assets/sentences.json").read_text()
    return {task: x["validation"] + x["train"] for task, x in json.loads(text)["tasks"].items()}


def plain(sentence: str) -> str:
    """Case, blanks and full stops do not matter."""
    return " ".join(sentence.lower().replace(".", " ").split())


# ------------------------------------------------------------------ CALVIN's own simulator
def home(path=None) -> Path:
    """calvin_env's clone, with conf/ and data/ beside the package: at `path`; else in the project's
    folder, or where Python finds it. Puts it on Python's path. ImportError says what to install."""
    clone = Path(path) if path else Path(__file__).resolve().parent / "calvin_env"
    if (clone / "calvin_env" / "__init__.py").exists():  # first, for a folder can hide a package
        sys.path.insert(0, str(clone.resolve()))
        importlib.invalidate_caches()
    elif path:
        raise ImportError(f"{path} is not a clone of calvin_env. {INSTALL}")
    spec = importlib.util.find_spec("calvin_env")
    if spec is None or spec.origin is None:  # None: a folder of that name, but no package
        raise ImportError(f"calvin_env is not installed, and no --calvin-env is given. {INSTALL}")
    root = Path(spec.origin).resolve().parents[1]
    if not ((root / "conf").is_dir() and (root / "data").is_dir()):
        raise ImportError(f"{root} lacks conf/ and data/: install calvin_env with -e. {INSTALL}")
    return root


def needed(name):
    """A module that calvin_env needs. Raises ImportError, which says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"calvin_env needs {error.name}, which is missing. {INSTALL}") from error


def validation(dataset) -> Path:
    """The validation folder of a dataset, which is given itself or by one of its two folders."""
    inside = Path(dataset).name in ("training", "validation")
    return (Path(dataset).parent if inside else Path(dataset)) / "validation"


def check_targets(config, where, root: Path) -> None:
    """ValueError if a configuration, plain containers, would have hydra call anything but a class
    in a file of calvin_env's clone: a stranger's file could otherwise run any code."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key == "_target_":
            module, _, name = str(value).rpartition(".")
            file = root / f"{module.replace('.', '/')}.py"
            if not (module.startswith("calvin_env.") and file.exists() and name[:1].isupper()):
                raise ValueError(f"{where}: it asks for {value}, which is refused")
        if isinstance(value, dict | list):
            check_targets(value, where, root)


def configuration(root: Path, scene):
    """Of PlayTableSimEnv and what it is made of, with static and gripper camera. Raises ValueError.
    scene: a folder of CALVIN's dataset (task_D_D, or its training or validation folder), for the
    configuration it was rendered with; or a name in calvin_env's conf/scene."""
    omegaconf = needed("omegaconf").OmegaConf
    load = omegaconf.load
    if Path(scene).is_dir():
        found = [x / ".hydra/merged_config.yaml" for x in (Path(scene), validation(scene))]
        if not any(file.exists() for file in found):
            raise ValueError(f"--scene {scene}: no {found[1]}, as a folder of CALVIN's dataset has")
        config = load(next(file for file in found if file.exists()))
    else:
        conf, known = root / "conf", sorted(x.stem for x in (root / "conf/scene").glob("*.yaml"))
        if str(scene) not in known:
            raise ValueError(f"--scene {scene}: neither a folder nor one of {', '.join(known)}")
        robot = load(conf / "robot/panda.yaml")
        robot.merge_with(load(conf / "robot/panda_longer_finger.yaml"))
        config = omegaconf.create({"data_path": "data", "use_vr": False})
        config.robot, config.scene = robot, load(conf / f"scene/{scene}.yaml")
        config.cameras = {name: load(conf / f"cameras/cameras/{name}.yaml") for name in CAMERAS}
        config.env = load(conf / "env/play_table_env.yaml")
    for name in set(config.cameras) - set(CAMERAS):
        del config.cameras[name]
    check_targets(omegaconf.to_container(config, resolve=False), scene, root)
    return config


def make_oracle(path=None):
    """calvin_env's oracle: function(start_info, info, task) -> bool. KeyError: no such task."""
    file = home(path) / "conf/tasks/new_playtable_tasks.yaml"
    load, instantiate = needed("omegaconf").OmegaConf.load, needed("hydra.utils").instantiate
    tasks = instantiate(load(file)).tasks  # {name: function(start_info=, end_info=)}
    return lambda start, info, task: bool(tasks[task](start_info=start, end_info=info))


class Table:
    """The real PlayTableSimEnv. Observations, actions, infos: those of sim.PlayTable, whose header
    has the shapes and units; target_pos (3,) is the place that actions move.
    One Table per process: some of calvin_env's calls go to the process's first simulation."""

    def __init__(self, scene=SCENE, renderer="tiny", render=True, path=None, shrink=None):
        """renderer: "egl" or "tiny". render=False: no images, whatever step is asked.
        shrink: what to do to each image, (200, 200, 3) static and (84, 84, 3) gripper, uint8.
        Raises ImportError, ValueError, and RuntimeError where EGL or a second Table fails."""
        root = home(path)
        module = needed("calvin_env.envs.play_table_env")
        module.get_git_commit_hash = lambda *_: "unknown"  # it raises where there is no clone
        if renderer not in RENDERERS:
            raise ValueError(f"renderer is {renderer!r}, expected one of {', '.join(RENDERERS)}")
        if module.p.getConnectionInfo(0)["isConnected"]:
            raise RuntimeError("this process has a PyBullet simulation: close it, or use another")
        config = configuration(root, scene)
        if not render:
            config.cameras = {}
        more = {"show_gui": False, "use_vr": False, "use_scene_info": True, "seed": 0}
        try:
            more["use_egl"] = render and renderer == "egl"
            self.env = needed("hydra.utils").instantiate(config.env, **more)
        except SystemExit:  # calvin_env's way to say so
            why = "PyBullet's EGL plugin does not load: install EGL (Debian: libegl1 and"
            why += " libgl1-mesa-dri), or use renderer tiny, if the data was made with it"
            raise RuntimeError(why) from None
        self.env.close = lambda: None  # it prints; see close()
        self.cameras, self.shrink = self.env.cameras, shrink or (lambda image: image)
        self.reset()

    @property
    def target_pos(self):
        return np.array(self.env.robot.target_pos)

    def reset(self, robot_obs=None, scene_obs=None):
        """Restore robot_obs (15,), scene_obs (24,); None: the configuration's. It loads the scene
        again, for Bullet keeps a solver history: the same start and actions repeat bit for bit."""
        env = self.env
        env.seed(0)
        env.scene.np_random = env.np_random  # of blocks whose first place is drawn
        env.load()  # a new scene; then it must be told to those who know the old one:
        for camera in self.cameras:
            camera.robot_uid = env.robot.robot_uid
        robot, scene = (None if x is None else np.array(x, float) for x in (robot_obs, scene_obs))
        env.robot.gripper_action = 1 if robot is None else int(robot[14])  # it leaves the last one
        env.cameras = []
        env.reset(robot, scene)
        return self.get_obs()

    def step(self, action, render=True):
        """Move the target by action (7,) and wait 1/30 s: observation, 0.0, False, info."""
        action = np.array(action, float)
        if action.shape != (7,) or not np.isfinite(action).all() or action[6] not in (-1, 1):
            raise ValueError(f"action must be 7 finite numbers, the last -1 or 1, got {action}")
        self.env.cameras = self.cameras if render else []
        obs, _, _, info = self.env.step(action)
        return self._tidy(obs), 0.0, False, info

    def get_obs(self, render=True):
        """The observation now: robot_obs (15,), scene_obs (24,) and, if rendered, rgb_obs."""
        self.env.cameras = self.cameras if render else []
        return self._tidy(self.env.get_obs())

    def _tidy(self, obs):
        out = {k: np.array(obs[k], float) for k in ("robot_obs", "scene_obs")}
        images = {k: self.shrink(np.array(x, np.uint8)) for k, x in obs["rgb_obs"].items()}
        return out | ({"rgb_obs": images} if images else {})

    def get_info(self):
        """Contacts and states, for the oracle."""
        return self.env.get_info()

    def close(self):
        """End the physics; the table is of no use afterwards."""
        if self.env.cid >= 0:
            self.env.p.disconnect(physicsClientId=self.env.cid)
            self.env.cid = -1
