"""Evaluation: CALVIN's protocol, the record that resumes, sentences, films, tables."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import calvin
import data
import evaluate as E
import sim
import train

ACTION = [0, 0, 0, 0, 0, 0, 1.0]
OPERATOR = ["--policy", "operator"]


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
        self.log.append((action, render))
        return self.get_obs(render), 0.0, False, ("now", self.t)

    def oracle(self, start, info, task):
        assert start == ("start", self.attempts) and info == ("now", self.t)
        self.judged.append((task, self.t))
        return self.plan[self.attempts % len(self.plan)] == self.t if self.plan else False


class FakePolicy:
    """Its n-th action is n in x."""

    def __init__(self, skip=1):
        self.skip, self.resets, self.seen = skip, 0, []

    def reset(self):
        self.resets += 1

    def act(self, obs, embedding):
        assert obs["rgb_obs"]["rgb_static"].shape == (64, 64, 3)
        self.seen.append(embedding)
        return np.array([len(self.seen), *ACTION[1:]])


def test_an_attempt_fails_after_360_steps_each_of_them_judged():
    env, policy = FakeEnv(), FakePolicy()
    assert E.attempt(env, env.oracle, policy, {"led": "words"}, "led") == (False, 360)
    assert env.judged == [("led", t) for t in range(1, 361)]
    assert policy.resets == 1 and policy.seen == ["words"] * 360


def test_an_attempt_ends_at_the_step_where_the_oracle_agrees():
    env = FakeEnv([7])
    assert E.attempt(env, env.oracle, FakePolicy(), {"led": 0}, "led") == (True, 7)
    assert len(env.log) == 7


@pytest.mark.parametrize("skip", [2, 3])
def test_each_action_is_held_for_skip_steps_and_seen_only_after_them(skip):
    env, steps = FakeEnv(), range(4 * skip + 1)
    E.attempt(env, env.oracle, FakePolicy(skip), {"led": 0}, "led", len(steps))
    actions, rendered = zip(*env.log, strict=True)
    assert [a[0] for a in actions] == [1.0 + t // skip for t in steps]
    assert rendered == tuple((t + 1) % skip == 0 for t in steps)
    assert len(env.judged) == len(steps)  # success in mid-hold counts


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """evaluate.main on a fake environment and policy; an embedding is the sentence's length."""
    world = SimpleNamespace(env=FakeEnv(), policy=FakePolicy(), encoder=None, given=None)
    checkpoint = {
        "config": {"method": "no_ditto"}, "run": {"seed": 3, "preset": "tiny"}, "step": 9,
        "seconds": 1.5, "text_encoder": "an-encoder", "path": "agent.pt",
        "meta": {"hz": 30, "skip": 1, "action_scale": [0.02, 0.05], "renderer": sim.LOOK},
        "policy": {"replan": 15, "reset_on_replan": True},
    }  # fmt: skip

    def encode(sentences, encoder):
        world.encoder = encoder
        return np.array([len(s) for s in sentences])

    def load_agent(path, device, **given):
        world.given = given
        return world.policy, dict(checkpoint)

    def chain(n):
        return calvin.start_states()[n], calvin.TASKS[n % 30 : n % 30 + 5]

    monkeypatch.setattr(E, "make_environment", lambda *_: (world.env, world.env.oracle))
    monkeypatch.setattr(calvin, "chain", chain)
    monkeypatch.setattr(train, "load_agent", load_agent)
    monkeypatch.setattr(data, "encode", encode)
    world.checkpoint, world.out, world.log = checkpoint, tmp_path / "out", None
    world.log = world.out / "chains.jsonl"
    command = ["--checkpoint", str(tmp_path / "agent.pt"), "--out", str(world.out)]
    world.run = lambda *more: E.main([*command, *more])
    return world


def test_a_chain_resets_the_scene_once_the_policy_per_task_and_ends_at_the_first_failure(fake):
    fake.env.plan = [5, 9, 400]  # two tasks solved, the third never
    result = fake.run("--chains", "1", "--first", "4")
    assert result["avg_len"] == 2 and fake.env.resets == 1 and fake.policy.resets == 3
    start = calvin.start_states()[4]
    np.testing.assert_array_equal(fake.env.scene, calvin.start_pose(start)[1])
    words = json.loads((E.HERE / "assets/sentences.json").read_text())["tasks"]
    held_out = [len(words[task]["validation"][0]) for task in calvin.TASKS[4:7]]
    assert fake.policy.seen == [held_out[0]] * 5 + [held_out[1]] * 9 + [held_out[2]] * 360
    assert fake.encoder == "an-encoder"  # the one that the checkpoint was trained with


def test_results_name_all_that_they_depend_on_and_where_they_are(fake, capsys):
    fake.env.plan = [1]
    result = fake.run("--chains", "2")
    assert result == json.loads((fake.out / "results.json").read_text())
    assert (result["env"], result["method"], result["seed"]) == ("sim", "no_ditto", 3)
    assert result["success"] == [1.0] * 5 and result["avg_len"] == 5 and result["chains"] == 2
    assert result["training"]["step"] == 9 and "commit" in result
    assert result["policy"] == {"replan": 15, "reset_on_replan": True} and fake.given == {}
    assert result["sentences"]["open_drawer"] == calvin.sentences()["open_drawer"][0]
    first, second = calvin.TASKS[:2]
    assert result["tasks"][first] == [1, 1] and result["tasks"][second] == [2, 2]
    out = capsys.readouterr().out
    assert out.endswith(f"2 of 2 chains: {fake.out}/results.json\n")
    assert result["sentences"][first] in out


def test_replan_and_reset_on_replan_are_the_policys_and_stand_in_the_results(fake):
    fake.env.plan = [1]
    result = fake.run("--chains", "1", "--replan", "7", "--no-reset_on_replan")
    assert fake.given == result["policy"] == {"replan": 7, "reset_on_replan": False}


@pytest.mark.parametrize(
    ("key", "value"), [("hz", 15), ("action_scale", [0.04, 0.05]), ("renderer", "egl")]
)
def test_a_policy_for_another_rate_scale_or_renderer_is_refused(fake, key, value):
    fake.checkpoint["meta"][key] = value
    with pytest.raises(SystemExit, match=f"agent.pt was trained on data with {key}"):
        fake.run("--chains", "1")
    fake.checkpoint["meta"] |= {"hz": 15, "action_scale": [0.02, 0.05], "renderer": sim.LOOK}
    fake.policy.skip, fake.env.plan = 2, [4]  # 15 Hz held for two steps is 30 Hz
    assert fake.run("--chains", "1")["avg_len"] == 5


def test_a_policy_of_the_play_table_is_refused_in_calvin_and_one_of_calvin_keeps_its_renderer(fake):
    with pytest.raises(SystemExit, match="renderer tiny-grey, --env calvin has egl or tiny"):
        fake.run("--env", "calvin", "--chains", "1")
    fake.checkpoint["meta"]["renderer"], fake.env.plan = "egl", [1]
    result = fake.run("--env", "calvin", "--chains", "1")
    assert (result["renderer"], result["scene"]) == ("egl", calvin.SCENE)


def test_an_unusable_checkpoint_or_encoder_ends_with_its_message(fake, monkeypatch):
    def refuse(*_):
        raise data.DataError("pip install sentence-transformers")

    monkeypatch.setattr(data, "encode", refuse)
    with pytest.raises(SystemExit, match="pip install sentence-transformers"):
        fake.run("--chains", "1")


# ------------------------------------------------------------------ random numbers
def test_samples_depend_on_the_chain_alone(fake, monkeypatch):
    seeds, fake.env.plan = [], [1]
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    fake.run("--chains", "3")
    fake.run("--chains", "1", "--first", "2", "--out", str(fake.out / "other"))
    assert len(set(seeds[:3])) == 3 and seeds[3:] == seeds[2:3]


def test_a_push_moves_the_arm_for_three_actions_keeps_the_gripper_and_is_seeded(fake):
    command = ["--chains", "1", "--limit", "40", "--disturb", "0.1", "--first"]
    result = fake.run(*command, "3")
    arm = np.array([action[:6] for action, _ in fake.env.log])
    pushed = np.any(arm[:, 1:] != 0, axis=1)  # the policy itself moves along x alone
    starts = [t for t in range(40) if pushed[t] and not np.array_equal(arm[t], arm[t - 1])]
    assert len(starts) >= 2 and (np.abs(arm[pushed]) <= 1).all()
    assert all(np.array_equal(arm[t], arm[min(t + 2, 39)]) for t in starts)
    assert all(action[6] == 1 for action, _ in fake.env.log) and (~pushed).sum() > 10
    assert [a[0] for a, p in zip(arm, pushed, strict=True) if not p][:2] == [1, 2]
    assert result["disturb"] == 0.1 and "(disturb 0.1)" in E.tables(result)
    log, fake.env.log = fake.env.log, []
    fake.run(*command, "3", "--out", str(fake.out / "again"))
    np.testing.assert_array_equal(arm[pushed], np.array([a[:6] for a, _ in fake.env.log])[pushed])
    assert len(log) == 40
    with pytest.raises(SystemExit, match=r"disturb was 0.1 and is 0"):
        fake.run("--chains", "1", "--limit", "40")


# ------------------------------------------------------------------ the record
def test_an_interrupted_run_resumes_to_the_same_result(fake, capsys):
    plan = [3, 400, 8, 2, 5, 1, 9, 400]  # differs from attempt to attempt: chains end anywhere
    fake.env = FakeEnv(plan)
    fake.run("--chains", "6")
    whole = fake.log.read_text()
    fake.log.unlink()

    fake.env = FakeEnv(plan, stop_at_reset=4)
    with pytest.raises(SystemExit) as stop:
        fake.run("--chains", "6")
    assert stop.value.code == 130 and "3 of 6 chains" in capsys.readouterr().out
    assert json.loads((fake.out / "results.json").read_text())["chains"] == 3
    attempts, fake.env = fake.env.attempts, FakeEnv(plan)
    fake.env.attempts = attempts  # the fake's plan goes on where it stopped
    result = fake.run("--chains", "6")
    assert fake.env.resets == 3 and fake.log.read_text() == whole and result["chains"] == 6

    fake.run("--chains", "6")
    assert fake.env.resets == 3  # nothing left to do
    assert fake.run("--chains", "7")["chains"] == 7 and fake.env.resets == 4  # nor lost


def test_another_configuration_in_the_same_folder_is_an_error(fake, tmp_path):
    fake.env.plan = [1]
    fake.run("--chains", "1")
    before, sentences = fake.log.read_text(), tmp_path / "mine.json"
    sentences.write_text(json.dumps(dict.fromkeys(calvin.TASKS, "do it")))
    fake.checkpoint["policy"] = {"replan": 15, "reset_on_replan": True}
    others = (("--limit", "100"), ("--replan", "3"), ("--seed", "1"))
    for option, value in (*others, ("--sentences", str(sentences))):
        with pytest.raises(SystemExit, match=r"another evaluation's.*Another --out"):
            fake.run("--chains", "1", option, value)
    with pytest.raises(SystemExit, match=r"limit was 360 and is 100"):
        fake.run("--chains", "1", "--limit", "100")
    fake.checkpoint["step"] = 10  # trained on since
    with pytest.raises(SystemExit, match="training was"):
        fake.run("--chains", "1")
    assert fake.log.read_text() == before


@pytest.mark.parametrize("garbage", [b'{"chain": 1, "sol', b"\xff\x00", b"3", b"{}"])
def test_a_damaged_line_of_the_record_is_told_with_its_number(fake, garbage):
    fake.env.plan = [1]
    whole = fake.run("--chains", "3")
    lines = fake.log.read_bytes().splitlines()
    fake.log.write_bytes(b"\n".join([*lines[:2], garbage, *lines[3:], b""]))
    with pytest.raises(SystemExit, match=r"chains\.jsonl: line 3 is damaged.*Remove the line"):
        fake.run("--chains", "3")
    fake.log.write_bytes(b"\n".join([*lines[:2], *lines[3:], b""]))
    assert fake.run("--chains", "3") == whole and fake.env.resets == 4  # one chain again


@pytest.mark.parametrize("file", ["chains.jsonl", "chain_0001.gif", "results.json"])
def test_a_full_disk_names_the_file_and_the_same_command_goes_on(fake, file, monkeypatch):
    replace, names = data.os.replace, []

    def full(part, path):
        names.append(path.name)
        if names[-1] == file and names.count(file) == min(2, 1 + (file == "chains.jsonl")):
            raise OSError(28, "No space left on device")
        replace(part, path)

    fake.env.plan = [1]
    with monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", full)
        with pytest.raises(SystemExit, match=rf"{file}.*No space left on device.*Make room"):
            fake.run("--chains", "2", "--film", "2")
    assert not [x for x in fake.out.glob("*") if "part" in x.name]
    result = fake.run("--chains", "2", "--film", "2")
    assert result["chains"] == 2 and (fake.out / file).exists() and fake.env.resets <= 3


def test_a_record_that_cannot_be_written_is_told_by_name(fake):
    fake.out.write_text("a file")
    with pytest.raises(SystemExit, match=r"File exists: .*out"):
        fake.run("--chains", "1")


# ------------------------------------------------------------------ the command line
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--env", "calvin"], "give --checkpoint"),
        ([*OPERATOR, "--checkpoint", "a.pt"], "give --checkpoint"),
        ([*OPERATOR, "--instruction", "open it"], "neither --instruction nor --disturb"),
        ([*OPERATOR, "--disturb", "0.1"], "neither --instruction nor --disturb"),
        (["--checkpoint", "a.pt", "--renderer", "egl"], "needs that of its data"),
        ([*OPERATOR, "--first", "990", "--chains", "20"], "there are chains 0 to 999"),
        ([*OPERATOR, "--chains", "0"], "there are chains 0 to 999"),
        ([*OPERATOR, "--env", "moon"], "invalid choice"),
        ([*OPERATOR, "--limit", "0"], "--limit 0: at least 1"),
        ([*OPERATOR, "--procs", "0"], "--procs 0: at least 1"),
        ([*OPERATOR, "--seed", "-1"], "--seed -1: at least 0"),
        (["--replan", "0"], "--replan 0: at least 1"),
        (["--disturb", "1.5"], "a probability is 0 to 1"),
        ([*OPERATOR, "--chain", "3"], "unrecognized arguments"),
    ],
)
def test_a_command_that_makes_no_sense_says_what_to_give(command, message, capsys):
    with pytest.raises(SystemExit):
        E.main(command)
    assert message in capsys.readouterr().err


def test_help_has_two_examples_and_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        E.main(["--help"])
    text = capsys.readouterr().out
    assert text.count("    python evaluate.py") >= 2
    for line in text[text.index("options:") :].splitlines()[1:]:
        assert line.startswith(" " * 24) or len(line.split()) > 2 or len(line) > 22


def test_env_real_is_deploys_with_all_its_options(monkeypatch):
    asked = SimpleNamespace(main=lambda argv: argv)
    monkeypatch.setitem(sys.modules, "deploy", asked)
    argv = ["--checkpoint", "a.pt", "--env", "real", "--robot", "setup.json", "--dry-run"]
    assert E.main(argv) == ["rollouts", "setup.json", "--checkpoint", "a.pt", "--dry-run"]


def test_without_a_checkpoint_the_one_in_the_tree_is_taken_and_solves_something(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert E.SHIPPED.stat().st_size < 40e6
    result = E.main(["--chains", "6"])
    assert result["method"] == "lumos" and result["chains"] == 6 and result["avg_len"] > 0
    films = sorted(p.name for p in (tmp_path / "runs/first_look").glob("*.gif"))
    assert films == ["chain_0000.gif"]
    args = E.parse([])
    assert (args.chains, args.film, args.checkpoint) == (20, 1, str(E.SHIPPED))
    assert "assets" not in str(E.parse(["--checkpoint", str(E.SHIPPED)]).out)
    args = E.parse(["--checkpoint", "run/agent.pt"])
    assert (args.chains, args.film) == (1000, 0) and E.parse(["--film", "0"]).film == 0


# ------------------------------------------------------------------ one instruction
def test_a_known_sentence_is_followed_where_it_can_be_done_until_it_is(fake, capsys):
    fake.env.oracle = lambda start, info, task: (task, info) in (
        ("turn_on_led", ("now", 3)), ("open_drawer", ("now", 5)), ("turn_on_led", ("now", 9)),
    )  # fmt: skip
    sentence = calvin.sentences()["open_drawer"][3]
    for attempt in range(2):  # neither case nor full stops matter, and films are kept
        told = [sentence, f" {sentence.upper()}. "][attempt]
        assert fake.run("--instruction", told) == {"turn_on_led": 3, "open_drawer": 5}
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "turn_on_led at step 3" and lines[-1].endswith("5 steps (0.2 s): done")
        assert fake.env.scene[1] == 0 and len(set(fake.out.glob("*.gif"))) == attempt + 1
    fake.env.oracle = lambda *_: False
    fake.run("--instruction", sentence, "--limit", "40")
    assert capsys.readouterr().out.endswith("40 steps (1.3 s): not done\n")


@pytest.mark.parametrize(
    ("task", "first", "why"),
    [("turn_off_led", ["--first", "0"], "so already"), ("stack_block", [], "to be done before")],
)
def test_an_instruction_that_makes_no_sense_in_the_scene_is_told(fake, task, first, why):
    with pytest.raises(SystemExit, match=f"{task}: .*{why}"):
        fake.run("--instruction", calvin.sentences()[task][0], *first)


def test_an_unknown_sentence_is_followed_to_the_limit_if_there_is_a_text_encoder(fake, capsys):
    fake.env.oracle = lambda start, info, task: (task, info) == ("open_drawer", ("now", 5))
    assert fake.run("--instruction", "Do as you like", "--limit", "40") == {"open_drawer": 5}
    assert fake.policy.seen == [len("Do as you like")] * 40
    assert capsys.readouterr().out.endswith("1 of 34 tasks seen\n")


def test_an_unknown_sentence_without_a_text_encoder_is_refused_with_the_five_nearest(
    fake, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # not installed
    with pytest.raises(SystemExit) as stop:
        E.main(["--instruction", "pull out the drawr", "--out", str(fake.out)])
    text = str(stop.value)
    assert text.count("\n  ") == 5 and "\n  pull out the drawer\n" in text
    assert "hf download" in text and "--text-encoder" in text


# ------------------------------------------------------------------ somebody else's policy
def test_a_calvin_model_sees_calvins_images_and_sentences_and_is_reset_per_task(
    tmp_path, monkeypatch
):
    (tmp_path / "theirs.py").write_text(
        "import json\n"
        "class Model:\n"
        "    def __init__(self): self.calls = []\n"
        "    def reset(self): self.calls.append('reset')\n"
        "    def step(self, obs, goal):\n"
        "        shapes = [x.shape[0] for x in obs['rgb_obs'].values()]\n"
        "        self.calls.append([goal, *shapes, len(obs['robot_obs'])])\n"
        "        open('calls.json', 'w').write(json.dumps(self.calls))\n"
        "        return [0, 0, 0, 0, 0, 0, 1]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = E.main(["--policy", "theirs:Model", "--chains", "1", "--limit", "3"])
    assert result["method"] == "theirs:Model" and result["avg_len"] == 0
    sentence = calvin.sentences()[calvin.chain(0)[1][0]][0]
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls == ["reset", *[[sentence, 200, 84, 15]] * 3]
    for name in ("theirs:Other", "nobodys:Model", "agnt"):
        with pytest.raises(SystemExit, match="agent, operator, MODULE:CLASS"):
            E.main(["--policy", name, "--chains", "1"])


# ------------------------------------------------------------------ sentences and tables
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


def test_sentences_come_from_assets_from_json_or_from_a_datasets_language_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "encode", lambda sentences, _: [[len(s)] for s in sentences])
    args = SimpleNamespace(env="calvin", scene="calvin_scene_D", sentences=None)
    sentences, words = E.read_sentences(args, "an-encoder")
    assert sentences["open_drawer"] == calvin.sentences()["open_drawer"][0]
    assert words["open_drawer"] == [len(sentences["open_drawer"])]
    args.sentences = tmp_path / "mine.json"
    args.sentences.write_text(json.dumps({task: f"do {task}" for task in calvin.TASKS}))
    sentences, words = E.read_sentences(args, None)
    assert sentences == words and sentences["open_drawer"] == "do open_drawer"
    args.sentences.write_text("[]")
    with pytest.raises(data.DataError, match=r"mine\.json"):
        E.read_sentences(args, "an-encoder")

    folder = tmp_path / "validation" / "lang_an-encoder"
    folder.mkdir(parents=True)
    rows = {t: {"emb": np.full((1, 1, 384), k), "ann": [t]} for k, t in enumerate(calvin.TASKS)}
    np.save(folder / "embeddings.npy", np.array(rows, dtype=object))
    args.sentences, task = None, calvin.TASKS[3]
    for scene in (tmp_path, tmp_path / "validation", tmp_path / "training"):
        scene.mkdir(exist_ok=True)
        args.scene = str(scene)  # a dataset brings its own
        sentences, words = E.read_sentences(args, "an-encoder")
        assert sentences[task] == task and words[task].tolist() == [3] * 384
    args.sentences = folder
    with pytest.raises(data.DataError, match="text encoder is 'an-encoder'"):
        E.read_sentences(args, "another")
    np.save(folder / "embeddings.npy", np.array(dict(list(rows.items())[1:]), dtype=object))
    with pytest.raises(data.DataError, match=r"rotate_red_block_right.*missing"):
        E.read_sentences(args, "an-encoder")


def test_the_table_is_laid_out_like_table_i():
    result = {"label": "lumos", "chains": 1000, "avg_len": 2.344, "tasks": {"open_drawer": [3, 4]}}
    result["success"] = [0.807, 0.593, 0.426, 0.307, 0.211]
    assert E.tables(result | {"sentences": {"open_drawer": "pull it"}}).splitlines() == [
        "open_drawer                   3/4   75.0%  pull it",
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
    out = capsys.readouterr().out.splitlines()
    head, lumos, alone = ([x.strip() for x in line.split("  ") if x.strip()] for line in out)
    assert head == [*"Env. Method Steps Chains Seeds 1 2 3 4 5".split(), "Avg. Len."]
    # 80, 90, 100: mean 90, deviation 10 with n - 1 in the denominator; 1, 2, 3: 2 and 1
    expected = ["90.0 ± 10.0%", "50.0 ± 0.0%", "25.0 ± 0.0%", *["0.0 ± 0.0%"] * 2, "2.00 ± 1.00"]
    assert lumos == ["sim", "lumos", "900", "200", "3", *expected]
    assert alone[5:] == ["70.0%", "50.0%", "25.0%", "0.0%", "0.0%", "1.68"]
    for bad, message in ((files[0], "twice"), (str(tmp_path / "none.json"), r"none\.json")):
        with pytest.raises(SystemExit, match=message):
            E.main(["--table", *files, bad])


# ------------------------------------------------------------------ the play table itself
def test_two_processes_give_what_one_gives_and_end_together(tmp_path):
    command = [*OPERATOR, "--chains", "3", "--limit", "60", "--out"]
    one = E.main([*command, str(tmp_path / "1")])
    assert E.main([*command, str(tmp_path / "2"), "--procs", "2"]) == one
    logs = [sorted(folder.glob("chains*.jsonl")) for folder in (tmp_path / "1", tmp_path / "2")]
    lines = [sorted({x for log in some for x in log.read_text().splitlines()}) for some in logs]
    assert lines[0] == lines[1] and len(lines[0]) == 4 and len(logs[1]) == 2
    (tmp_path / "2/chains_1.jsonl").write_text("{")
    with pytest.raises(SystemExit, match="damaged"):
        E.main([*command, str(tmp_path / "2"), "--procs", "2"])


def test_a_film_shows_what_the_policy_saw_and_changes_nothing(tmp_path):
    import imageio.v3 as imageio

    command = [*OPERATOR, "--chains", "1", "--limit", "90", "--out", str(tmp_path)]
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
