"""CALVIN's own simulator behind the interface of sim.PlayTable. LUMOS Sec. V-A.

    path, scene -> configuration -> PlayTableSimEnv -> Table: reset, step, get_obs, get_info
    path        -> conf/tasks    -> its Tasks       -> oracle(start_info, info, task)

calvin_env is not on PyPI: README, "CALVIN's own simulator", says how to install it. None of its
files is edited, and neither tacto nor calvin_agent is needed: the tactile camera is left out, and
the look-up of its git commit, which fails outside a clone, is answered here. A reset loads the
scene anew, for Bullet keeps a solver history: the same start and actions give the same numbers.
One Table per process: some of calvin_env's calls go to the process's first simulation, whichever
Table they are for.
Copy this file alone. Needs: numpy, calvin_env and what that needs.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

INSTALL = """To install it (README: CALVIN's own simulator):
  pip install pybullet gym==0.26.2 hydra-core scipy
  pip install opencv-python-headless numpy-quaternion gitpython
  git clone https://github.com/mees/calvin_env
  pip install --no-deps -e calvin_env      (or give --calvin-env calvin_env)"""
SCENE = "calvin_scene_D_eval"  # environment D; every reset places doors, lights and blocks anyway
RENDERERS = ("egl", "tiny")  # the dataset's, on a GPU or by Mesa; Bullet's own, with other shadows
CAMERAS = ("static", "gripper")


def home(path=None) -> Path:
    """calvin_env's clone, with conf/ and data/ beside the package: at `path`, or where Python finds
    it. Puts `path` on Python's. Raises ImportError, which says what to install."""
    if path and (Path(path) / "calvin_env" / "__init__.py").exists():
        sys.path.insert(0, str(Path(path).resolve()))
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


def configuration(root: Path, scene):
    """Of PlayTableSimEnv and what it is made of, with static and gripper camera.

    scene: a folder of CALVIN's dataset (task_D_D, or its training or validation folder), for the
    configuration it was rendered with; or a name in calvin_env's conf/scene. Raises ValueError.
    """
    load = needed("omegaconf").OmegaConf.load
    if Path(scene).is_dir():
        found = [Path(scene) / split / ".hydra/merged_config.yaml" for split in ("validation", "")]
        if not any(file.exists() for file in found):
            raise ValueError(f"--scene {scene}: no {found[0]}, as a folder of CALVIN's dataset has")
        config = load(next(file for file in found if file.exists()))
    else:
        conf, known = root / "conf", sorted(x.stem for x in (root / "conf/scene").glob("*.yaml"))
        if str(scene) not in known:
            raise ValueError(f"--scene {scene}: neither a folder nor one of {', '.join(known)}")
        robot = load(conf / "robot/panda.yaml")
        robot.merge_with(load(conf / "robot/panda_longer_finger.yaml"))
        config = needed("omegaconf").OmegaConf.create({"data_path": "data", "use_vr": False})
        config.robot, config.scene = robot, load(conf / f"scene/{scene}.yaml")
        config.cameras = {name: load(conf / f"cameras/cameras/{name}.yaml") for name in CAMERAS}
        config.env = load(conf / "env/play_table_env.yaml")
    for name in set(config.cameras) - set(CAMERAS):
        del config.cameras[name]
    return config


def make_oracle(path=None):
    """calvin_env's oracle: function(start_info, info, task) -> bool. KeyError: no such task."""
    file = home(path) / "conf/tasks/new_playtable_tasks.yaml"
    load, instantiate = needed("omegaconf").OmegaConf.load, needed("hydra.utils").instantiate
    tasks = instantiate(load(file)).tasks  # {name: function(start_info=, end_info=)}
    return lambda start, info, task: bool(tasks[task](start_info=start, end_info=info))


class Table:
    """The real PlayTableSimEnv; target_pos (3,), target_euler (3,) are the pose that actions move.

    Observations, actions, infos: those of sim.PlayTable, whose docstring has the shapes and units.
    """

    def __init__(self, scene=SCENE, renderer="tiny", render=True, path=None, shrink=None):
        """renderer: "egl" or "tiny". render=False: no images, whatever step is asked.
        shrink: what to do to each image, (200, 200, 3) static and (84, 84, 3) gripper, uint8.
        Raises ImportError, ValueError, and RuntimeError where EGL or a second Table fails.
        """
        root = home(path)
        module = needed("calvin_env.envs.play_table_env")
        module.get_git_commit_hash = lambda *_: "unknown"  # it raises where there is no clone
        if renderer not in RENDERERS:
            raise ValueError(f"renderer is {renderer!r}, expected one of {', '.join(RENDERERS)}")
        if module.p.getConnectionInfo(0)["isConnected"]:
            raise RuntimeError("this process has a PyBullet simulation: close it, or use another")
        config = configuration(root, scene)
        config.cameras = config.cameras if render else {}
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

    @property
    def target_euler(self):
        return np.array(self.env.robot.target_orn)

    def reset(self, robot_obs=None, scene_obs=None):
        """Restore robot_obs (15,), scene_obs (24,); None: the configuration's."""
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


def make(cameras: bool, args, shrink=None):
    """(environment, oracle) for the options that `add_options` added."""
    renderer = args.renderer or "tiny"
    table = Table(args.scene, renderer, cameras, args.calvin_env, shrink)
    return table, make_oracle(args.calvin_env)


def add_options(parser):
    """--calvin-env, --scene, --renderer of evaluate.py and teleop.py."""
    add = parser.add_argument
    add("--calvin-env", metavar="CLONE", help="of mees/calvin_env, where it is not installed")
    add("--scene", default=SCENE, help="--env calvin: a folder of its dataset, or a scene's name")
    add("--renderer", choices=RENDERERS, help="--env calvin: tiny by default; a checkpoint's own")
