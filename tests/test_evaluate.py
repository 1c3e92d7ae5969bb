"""Evaluation: the benchmark's chains, CALVIN's protocol, the record that resumes, the tables."""

import hashlib
import json
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import calvin
import data
import evaluate as E
import sim
import teleop
import train

# sha256 of what CALVIN's own code draws (numpy 2.4, with pyhash): see `line` below.
BENCHMARK = "d710427c76f1b1c2accd3fabbc3fed33e233dd56473f19ca2ccdf1f59cddd97d"


def line(state, tasks, robot_obs, scene_obs):
    numbers = [np.round(x, 9).tolist() for x in (robot_obs, scene_obs)]
    return json.dumps([list(state), list(tasks), *numbers]) + "\n"


@pytest.fixture(scope="module")
def chains():
    return [calvin.chain(n) for n in range(1000)]


# ------------------------------------------------------------------ the benchmark's 1000 chains
def test_chains_and_initial_states_are_the_benchmarks_own(chains):
    digest = hashlib.sha256()
    for state, tasks in chains:
        digest.update(line(state, tasks, *calvin.start_pose(state)).encode())
    assert digest.hexdigest() == BENCHMARK


def test_chains_json_holds_the_benchmarks_chains(tmp_path):
    E.main(["--chains-json", str(tmp_path / "chains.json")])
    digest = hashlib.sha256()
    for row in json.loads((tmp_path / "chains.json").read_text()):
        assert list(row["initial_state"])[4:] == [*calvin.BLOCKS, "grasped"]
        state = list(row["initial_state"].values())[:-1]
        digest.update(line(state, row["tasks"], row["robot_obs"], row["scene_obs"]).encode())
    assert digest.hexdigest() == BENCHMARK


def test_192_states_start_1000_chains_40_of_them_six_and_the_rest_five(chains):
    states = calvin.start_states()
    assert len(set(states)) == 192
    counts = Counter(state for state, _ in chains)
    assert [counts[state] for state in states] == [6] * 40 + [5] * 152


def test_every_task_of_a_chain_is_possible_after_those_before_it(chains):
    """Against a little world of its own: blocks, what the hand holds, doors and lights."""
    kinds = Counter()
    for state, tasks in chains:
        where = {c: getattr(state, f"{c}_block") for c in ("red", "blue", "pink")}
        on = {"led": state.led == 1, "lightbulb": state.lightbulb == 1}
        slider, drawer, hand, tower = state.slider, state.drawer == "open", None, None
        for task in tasks:
            words = task.split("_")
            colour = next((c for c in where if c in words), None)
            kinds[words[0]] += 1
            if hand:
                assert words[0] in ("place", "stack")
            if words[0] == "lift":
                place = {
                    "table": {"table"},
                    "drawer": {"drawer"},
                    "slider": {"slider_left", "slider_right"},
                }
                assert where[colour] in place[words[-1]]
                assert words[-1] != "slider" or where[colour] != f"slider_{slider}"  # not behind it
                assert words[-1] != "drawer" or drawer
                where[colour], hand = "hand", colour
            elif words[0] == "place":
                assert hand and (drawer or words[-1] == "slider")
                where[hand], hand = "drawer" if words[-1] == "drawer" else f"slider_{slider}", None
            elif task == "stack_block":
                below = [c for c in where if where[c] == "table"]
                assert hand and len(below) == 1
                tower, where[hand], where[below[0]], hand = (hand, below[0]), "tower", "tower", None
            elif task == "unstack_block":
                assert tower
                where |= dict.fromkeys(tower, "table")
            elif task == "push_into_drawer":
                alone = [c for c in where if where[c] == "table"]
                assert drawer and len(alone) == 1
                where[alone[0]] = "drawer"
            elif colour:
                assert where[colour] == "table"
            elif words[0] == "move":
                assert slider != words[-1]
                slider = words[-1]
            elif words[0] in ("open", "close"):
                assert drawer == (words[0] == "close")
                drawer = not drawer
            else:
                assert on[words[-1]] == (words[1] == "off")
                on[words[-1]] = not on[words[-1]]
    assert sum(kinds.values()) == 5000 and len(kinds) == 10


def test_five_tasks_are_of_five_categories_out_of_eleven(chains):
    assert {len({calvin.category(task) for task in tasks}) for _, tasks in chains} == {5}
    assert len({calvin.category(task) for task in sim.TASKS}) == 11


def test_scene_obs_sets_the_scene_in_which_the_first_task_can_be_done(chains):
    env = sim.PlayTable(render=False)
    for state, tasks in chains[:100]:
        robot_obs, scene_obs = calvin.start_pose(state)
        obs = env.reset(robot_obs, scene_obs)
        np.testing.assert_allclose(obs["scene_obs"], scene_obs, atol=2e-5)
        assert tasks[0] in teleop.Operator(env).feasible()
    env.close()


# ------------------------------------------------------------------ CALVIN's protocol
class FakeEnv:
    """Counts. The oracle says yes at the step that `plan` holds for the attempt under way."""

    def __init__(self, plan=(), stop_at_reset=None):
        self.plan, self.stop_at_reset, self.log = list(plan), stop_at_reset, []
        self.resets, self.judged, self.attempts, self.t = 0, [], -1, 0

    def reset(self, robot_obs=None, scene_obs=None):
        self.resets += 1
        if self.resets == self.stop_at_reset:
            raise KeyboardInterrupt
        self.scene = scene_obs
        return self.get_obs()

    def get_info(self):
        self.attempts, self.t = self.attempts + 1, 0
        return ("start", self.attempts)

    def get_obs(self, render=True):
        image = np.full((64, 64, 3), self.t % 256, np.uint8)
        return {"rgb_obs": {"rgb_static": image, "rgb_gripper": image}} if render else {}

    def step(self, action, render=True):
        self.t += 1
        self.log.append((float(action[0]), render))
        return self.get_obs(render), 0.0, False, ("now", self.t)

    def oracle(self, start, info, task):
        assert start == ("start", self.attempts) and info == ("now", self.t)
        self.judged.append((task, self.t))
        return self.plan[self.attempts % len(self.plan)] == self.t if self.plan else False


class FakePolicy:
    def __init__(self, skip=1):
        self.skip, self.resets, self.seen, self.sample = skip, 0, [], True

    def reset(self):
        self.resets += 1

    def seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def act(self, obs, embedding):
        assert obs["rgb_obs"]["rgb_static"].shape == (64, 64, 3)
        self.seen.append(embedding)
        return np.array([len(self.seen), 0, 0, 0, 0, 0, 1.0])


def test_an_attempt_fails_after_360_steps_each_of_them_judged():
    env, policy = FakeEnv(), FakePolicy()
    assert E.attempt(env, env.oracle, policy, {"open_drawer": "words"}, "open_drawer") == (
        False,
        360,
    )
    assert env.judged == [("open_drawer", t) for t in range(1, 361)]
    assert policy.resets == 1 and policy.seen == ["words"] * 360


def test_an_attempt_ends_at_the_step_where_the_oracle_agrees():
    env, policy = FakeEnv([7]), FakePolicy()
    assert E.attempt(env, env.oracle, policy, {"open_drawer": 0}, "open_drawer") == (True, 7)
    assert len(env.log) == 7


@pytest.mark.parametrize("skip", [2, 3])
def test_each_action_is_held_for_skip_steps_and_seen_only_after_them(skip):
    env, policy = FakeEnv(), FakePolicy(skip)
    E.attempt(env, env.oracle, policy, {"open_drawer": 0}, "open_drawer", limit=4 * skip + 1)
    actions, rendered = zip(*env.log, strict=True)
    assert actions == tuple(1.0 + t // skip for t in range(4 * skip + 1))
    assert rendered == tuple((t + 1) % skip == 0 for t in range(4 * skip + 1))
    assert len(env.judged) == 4 * skip + 1  # success in mid-hold counts


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """evaluate.main on a fake environment and policy; an embedding is the sentence's length."""
    world = SimpleNamespace(env=FakeEnv(), policy=FakePolicy(), asked=None)
    checkpoint = {
        "config": {"method": "no_ditto"}, "run": {"seed": 3, "preset": "tiny"}, "step": 9,
        "seconds": 1.5, "text_encoder": "an-encoder",
        "meta": {"hz": 30, "skip": 1, "action_scale": [0.02, 0.05], "renderer": sim.LOOK},
    }  # fmt: skip

    def encode(sentences, encoder):
        world.asked = encoder
        return np.array([len(s) for s in sentences])

    monkeypatch.setattr(E, "ENVIRONMENTS", {"sim": lambda *_: (world.env, world.env.oracle)})
    monkeypatch.setattr(
        calvin, "chain", lambda n: (calvin.start_states()[n], sim.TASKS[n % 30 : n % 30 + 5])
    )
    monkeypatch.setattr(train, "load_agent", lambda *_: (world.policy, checkpoint))
    monkeypatch.setattr(data, "encode", encode)
    world.checkpoint, world.out = checkpoint, tmp_path / "out"
    world.command = ["--checkpoint", str(tmp_path / "agent.pt"), "--out", str(world.out)]
    world.run = lambda *more: E.main([*world.command, *more])
    return world


def test_a_chain_resets_the_scene_once_the_policy_per_task_and_ends_at_the_first_failure(fake):
    fake.env.plan = [5, 9, 400]  # two tasks solved, the third never
    result = fake.run("--chains", "1", "--first", "4")
    assert result["avg_len"] == 2 and fake.env.resets == 1 and fake.policy.resets == 3
    np.testing.assert_array_equal(fake.env.scene, calvin.start_pose(calvin.start_states()[4])[1])
    words = json.loads((E.HERE / "assets/sentences.json").read_text())["tasks"]
    held_out = [len(words[task]["validation"][0]) for task in sim.TASKS[4:7]]
    assert fake.policy.seen == [held_out[0]] * 5 + [held_out[1]] * 9 + [held_out[2]] * 360
    assert fake.asked == "an-encoder"  # the one that the checkpoint was trained with


def test_results_name_method_seed_training_and_commit(fake):
    fake.env.plan = [1]
    result = fake.run("--chains", "2")
    assert result == json.loads((fake.out / "results.json").read_text())
    assert (result["env"], result["method"], result["seed"]) == ("sim", "no_ditto", 3)
    assert result["success"] == [1.0] * 5 and result["avg_len"] == 5 and result["chains"] == 2
    assert result["training"]["step"] == 9 and "commit" in result
    assert result["tasks"][sim.TASKS[0]] == [1, 1] and result["tasks"][sim.TASKS[1]] == [2, 2]


@pytest.mark.parametrize(
    ("key", "value"), [("hz", 15), ("action_scale", [0.04, 0.05]), ("renderer", "egl")]
)
def test_a_policy_for_another_rate_scale_or_renderer_is_refused(fake, key, value):
    fake.checkpoint["meta"][key] = value
    with pytest.raises(SystemExit, match=f"agent.pt was trained on data with {key}.*pack"):
        fake.run("--chains", "1")
    fake.checkpoint["meta"] |= {"hz": 15, "action_scale": [0.02, 0.05], "renderer": sim.LOOK}
    fake.policy.skip, fake.env.plan = 2, [4]  # 15 Hz held for two steps is 30 Hz
    assert fake.run("--chains", "1")["avg_len"] == 5


def test_an_unusable_checkpoint_or_encoder_ends_with_its_message(fake, monkeypatch):
    def refuse(*_):
        raise data.DataError("pip install sentence-transformers")

    monkeypatch.setattr(data, "encode", refuse)
    with pytest.raises(SystemExit, match="pip install sentence-transformers"):
        fake.run("--chains", "1")


# ------------------------------------------------------------------ the record
def test_an_interrupted_run_resumes_to_the_same_result(fake):
    plan = [3, 400, 8, 2, 5, 1, 9, 400]  # differs from attempt to attempt: chains end anywhere
    fake.env = FakeEnv(plan)
    fake.run("--chains", "6")
    whole = (fake.out / "chains.jsonl").read_text()
    (fake.out / "chains.jsonl").unlink()

    fake.env = FakeEnv(plan, stop_at_reset=4)
    with pytest.raises(KeyboardInterrupt):
        fake.run("--chains", "6")
    partial = json.loads((fake.out / "results.json").read_text())
    assert partial["chains"] == 3
    with (fake.out / "chains.jsonl").open("a") as file:
        file.write('{"chain": 3, "sol')  # killed while writing
    attempts = fake.env.attempts
    fake.env = FakeEnv(plan)
    fake.env.attempts = attempts  # the fake's plan goes on where it stopped
    result = fake.run("--chains", "6")
    assert fake.env.resets == 3 and (fake.out / "chains.jsonl").read_text() == whole
    assert result["chains"] == 6

    fake.run("--chains", "6")
    assert fake.env.resets == 3  # nothing left to do
    assert fake.run("--chains", "7")["chains"] == 7 and fake.env.resets == 4  # nor lost


def test_another_configuration_in_the_same_folder_is_an_error(fake):
    fake.env.plan = [1]
    fake.run("--chains", "1")
    before = (fake.out / "chains.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"limit was 360 and is 100\. Give another"):
        fake.run("--chains", "1", "--limit", "100")
    fake.checkpoint["step"] = 10  # trained on since
    with pytest.raises(SystemExit, match="training was"):
        fake.run("--chains", "1")
    assert (fake.out / "chains.jsonl").read_text() == before


@pytest.mark.parametrize("garbage", [b'{"chain": 1, "sol', b"\xff\x00", b"3", b"{}"])
def test_a_damaged_line_of_the_record_is_told_with_its_number(fake, garbage):
    fake.env.plan, log = [1], fake.out / "chains.jsonl"
    whole = fake.run("--chains", "3")
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([*lines[:2], garbage, *lines[3:], b""]))
    with pytest.raises(SystemExit, match=r"chains\.jsonl: line 3 is damaged .*Remove it"):
        fake.run("--chains", "3")
    log.write_bytes(b"\n".join([*lines[:2], *lines[3:], b""]))
    assert fake.run("--chains", "3") == whole and fake.env.resets == 4  # one chain again


@pytest.mark.parametrize("file", ["chain_0001.gif", "results.json"])
def test_a_full_disk_names_the_file_and_the_same_command_goes_on(fake, file, monkeypatch):
    replace = E.os.replace

    def full(part, path):
        if path.name == file:
            raise OSError(28, "No space left on device")
        replace(part, path)

    fake.env.plan = [1]
    with monkeypatch.context() as patch:
        patch.setattr(E.os, "replace", full)
        with pytest.raises(SystemExit, match=f"{file}: No space left on device. Make room"):
            fake.run("--chains", "2", "--film", "2")
    assert not (fake.out / file).exists() and not list(fake.out.glob("part_*"))
    assert fake.run("--chains", "2", "--film", "2")["chains"] == 2 and (fake.out / file).exists()


def test_a_record_that_cannot_be_written_is_told_by_name(fake):
    fake.out.write_text("a file")
    with pytest.raises(SystemExit, match=r"cannot write .*out/chains\.jsonl: .*correct the path"):
        fake.run("--chains", "1")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--env", "calvin"], "give --checkpoint"),
        (["--policy", "operator", "--checkpoint", "a.pt"], "give --checkpoint"),
        (["--policy", "operator", "--instruction", "open it"], "give --checkpoint"),
        (["--policy", "operator", "--first", "990", "--chains", "20"], "there are chains 0 to 999"),
        (["--policy", "operator", "--chains", "0"], "there are chains 0 to 999"),
        (["--policy", "operator", "--env", "moon"], "invalid choice"),
        (["--policy", "operator", "--limit", "0"], "--limit 0: at least 1"),
        (["--policy", "operator", "--procs", "0"], "--procs 0: at least 1"),
        (["--policy", "operator", "--seed", "-1"], "--seed -1: at least 0"),
        (["--checkpoint", "a.pt", "--instruction", ""], "--instruction: give a sentence"),
        (["--policy", "operator", "--format", "mp4"], "pip install imageio-ffmpeg"),
    ],
)
def test_a_command_that_makes_no_sense_says_what_to_give(command, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # not installed
    with pytest.raises(SystemExit):
        E.main(command)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ tables
RECORDS = [
    {"solved": 5, "tasks": ["a", "b", "c", "d", "e"]},
    {"solved": 1, "tasks": ["b", "a", "c", "d", "e"]},
    {"solved": 0, "tasks": ["b", "a", "c", "d", "e"]},
    {"solved": 3, "tasks": ["c", "b", "a", "e", "d"]},
]


def test_success_in_a_row_average_length_and_task_rates_by_hand(monkeypatch):
    monkeypatch.setattr(calvin, "TASKS", ("a", "b", "c", "d", "e"))
    result = E.summarise(RECORDS)
    assert result["success"] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert result["avg_len"] == 2.25 == sum(result["success"])
    assert result["tasks"] == {"a": [2, 3], "b": [3, 4], "c": [2, 2], "d": [1, 1], "e": [1, 2]}


def test_the_same_figures_in_the_layout_of_the_benchmarks_results_json():
    result = {"avg_len": 1.5, "success": [1.0, 0.5, 0, 0, 0], "tasks": {"open_drawer": [3, 4]}}
    assert E.as_calvin(result | {"training": {"step": 800}}) == {
        "800": {
            "avg_seq_len": 1.5,
            "chain_sr": {"1": 1.0, "2": 0.5, "3": 0, "4": 0, "5": 0},
            "task_info": {"open_drawer": {"success": 3, "total": 4}},
        }
    }


def test_sentences_come_from_json_or_from_a_datasets_language_folder(tmp_path):
    args = SimpleNamespace(env="calvin", scene="calvin_scene_D", sentences=None)
    assert E.read_sentences(args, "an-encoder") == {}
    args.sentences = tmp_path / "mine.json"
    args.sentences.write_text(json.dumps({task: f"do {task}" for task in sim.TASKS}))
    assert E.read_sentences(args, "an-encoder")["open_drawer"] == ("do open_drawer", None)
    args.sentences.write_text("[]")
    with pytest.raises(data.DataError, match=r"mine\.json"):
        E.read_sentences(args, "an-encoder")

    folder = tmp_path / "validation" / "lang_an-encoder"
    folder.mkdir(parents=True)
    rows = {t: {"emb": np.full((1, 1, 384), k), "ann": [t]} for k, t in enumerate(sim.TASKS)}
    np.save(folder / "embeddings.npy", np.array(rows, dtype=object))
    args.sentences, args.scene = None, str(tmp_path)  # a dataset brings its own
    sentence, embedding = E.read_sentences(args, "an-encoder")[sim.TASKS[3]]
    assert sentence == sim.TASKS[3] and embedding.tolist() == [3] * 384
    args.sentences = folder
    with pytest.raises(data.DataError, match="text encoder is 'an-encoder'"):
        E.read_sentences(args, "another")
    np.save(folder / "embeddings.npy", np.array(dict(list(rows.items())[1:]), dtype=object))
    with pytest.raises(data.DataError, match=r"rotate_red_block_right.*missing"):
        E.read_sentences(args, "an-encoder")


def test_the_table_is_laid_out_like_table_i():
    result = {"method": "lumos", "chains": 1000, "avg_len": 2.344, "tasks": {"open_drawer": [3, 4]}}
    result["success"] = [0.807, 0.593, 0.426, 0.307, 0.211]
    assert E.tables(result).splitlines() == [
        "open_drawer                       3/4    75.0%",
        "",
        "                No. Instructions in a Row (1000 chains)",
        "Method          1        2        3        4        5        Avg. Len.",
        "lumos           80.7%    59.3%    42.6%    30.7%    21.1%    2.34",
    ]


def test_the_table_of_seeds_gives_mean_and_sample_deviation_by_hand(tmp_path, capsys):
    def result(name, method, seed, avg_len, first):
        r = {"env": "sim", "method": method, "chains": 200, "seed": seed, "avg_len": avg_len}
        r["training"] = {"step": 900}
        (tmp_path / name).write_text(json.dumps(r | {"success": [first, 0.5, 0.25, 0.0, 0.0]}))
        return str(tmp_path / name)

    files = [result(f"{s}.json", "lumos", s, s + 1, 0.8 + 0.1 * s) for s in range(3)]
    E.main(["--table", *files, result("alone.json", "no_ditto", 0, 1.68, 0.7)])
    head, lumos, alone = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    clean = lambda row: [cell.strip() for cell in row if cell.strip()]
    assert clean(head) == [*"Env. Method Steps Chains Seeds 1 2 3 4 5".split(), "Avg. Len."]
    # 80, 90, 100: mean 90, deviation 10 with n - 1 in the denominator; 1, 2, 3: 2 and 1
    expected = ["90.0 ± 10.0%", "50.0 ± 0.0%", "25.0 ± 0.0%", *["0.0 ± 0.0%"] * 2, "2.00 ± 1.00"]
    assert clean(lumos) == ["sim", "lumos", "900", "200", "3", *expected]
    assert clean(alone)[5:] == ["70.0%", "50.0%", "25.0%", "0.0%", "0.0%", "1.68"]
    for bad, message in ((files[0], "twice"), (str(tmp_path / "none.json"), r"none\.json")):
        with pytest.raises(SystemExit, match=message):
            E.main(["--table", *files, bad])


def test_without_a_checkpoint_the_one_in_the_tree_is_taken_and_solves_something(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert E.SHIPPED.stat().st_size < 40e6
    result = E.main(["--chains", "6"])
    assert result["method"] == "lumos" and result["chains"] == 6 and result["avg_len"] > 0
    assert sorted(p.name for p in (tmp_path / "runs/first_look").glob("*.gif")) == [
        "chain_0000.gif"
    ]
    args = E.parse([])
    assert (args.chains, args.film, args.checkpoint) == (20, 1, str(E.SHIPPED))
    assert "assets" not in str(E.parse(["--checkpoint", str(E.SHIPPED)]).out)
    args = E.parse(["--checkpoint", "run/agent.pt"])
    assert (args.chains, args.film) == (1000, 0) and E.parse(["--film", "0"]).film == 0


# ------------------------------------------------------------------ the play table itself
def test_two_processes_give_what_one_gives(tmp_path):
    command = ["--policy", "operator", "--chains", "3", "--limit", "60"]
    one = E.main([*command, "--out", str(tmp_path / "1")])
    two = E.main([*command, "--out", str(tmp_path / "2"), "--procs", "2"])
    assert one == two
    lines = [sorted((tmp_path / n / "chains.jsonl").read_text().splitlines()) for n in "12"]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_a_film_shows_what_the_policy_saw_and_changes_nothing(tmp_path):
    import imageio.v3 as imageio

    command = ["--policy", "operator", "--chains", "1", "--limit", "90", "--out", str(tmp_path)]
    plain = E.main(command)
    filmed = E.main([*command, "--film", "1"])  # only the film was missing
    assert filmed == plain and len((tmp_path / "chains.jsonl").read_text().splitlines()) == 2
    film = imageio.imread(tmp_path / "chain_0000.gif")
    assert film.shape[1:] == (304, 520, 3) and len(film) > 20
    assert (tmp_path / "chain_0000.gif").stat().st_size < 3e6

    rng = np.random.default_rng(0)
    static, gripper = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    picture = E.draw(static, gripper, "1/5  open the drawer", None)
    np.testing.assert_array_equal(picture[48:302:4, 4:258:4], static)
    np.testing.assert_array_equal(picture[48:302:4, 264:518:4], gripper)
    failed = E.draw(static, gripper, "1/5  open the drawer", False)
    assert tuple(failed[0, 0]) != tuple(picture[0, 0]) and len(np.unique(failed[:46])) > 4


def test_a_free_sentence_is_followed_to_the_limit_and_what_happened_is_reported(fake, capsys):
    fake.env.oracle = lambda start, info, task: (task, info) in (
        ("open_drawer", ("now", 5)), ("turn_on_led", ("now", 30)), ("turn_on_led", ("now", 31)),
    )  # fmt: skip
    seen = fake.run("--instruction", "pull it, then press", "--limit", "40")
    assert seen == {"open_drawer": 5, "turn_on_led": 30}
    assert fake.policy.seen == [len("pull it, then press")] * 40
    assert "turn_on_led at step 30" in capsys.readouterr().out
    assert (fake.out / "instruction.gif").stat().st_size > 0


def test_samples_depend_on_the_chain_alone(fake, monkeypatch):
    seeds, fake.env.plan = [], [1]
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    fake.run("--chains", "3")
    fake.run("--chains", "1", "--first", "2", "--out", str(fake.out / "other"))
    assert len(set(seeds[:3])) == 3 and seeds[3:] == seeds[2:3]
