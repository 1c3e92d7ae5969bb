"""Evaluation: CALVIN's protocol, the record that resumes, sentences, films, tables."""

import dataclasses
import json
import re
import shutil
import sys
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import baselines as B
import calvin
import data
import evaluate as E
import sim
import train

OPERATOR = ["--policy", "operator"]


class FakeEnv:
    """The oracle says yes at the step that `plan` holds for the attempt under way."""

    def __init__(self, plan=(400,), stop_at_reset=None):
        self.plan, self.stop_at_reset, self.log, self.judged = plan, stop_at_reset, [], []
        self.resets, self.attempts, self.t = 0, -1, 0

    def reset(self, robot_obs=None, scene_obs=None):
        self.resets, self.scene = self.resets + 1, scene_obs
        if self.resets == self.stop_at_reset:
            raise KeyboardInterrupt

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
        return self.plan[self.attempts % len(self.plan)] == self.t


class FakePolicy:
    """Its n-th action is n in x."""

    def __init__(self, skip=1):
        self.skip, self.resets, self.seen = skip, 0, []

    def reset(self):
        self.resets += 1

    def act(self, obs, embedding):
        assert obs["rgb_obs"]["rgb_static"].shape == (64, 64, 3)
        self.seen.append(embedding)
        return np.array([len(self.seen), 0, 0, 0, 0, 0, 1.0])


@pytest.mark.parametrize(("plan", "end"), [(400, (False, 360)), (7, (True, 7))])
def test_an_attempt_ends_where_the_oracle_agrees_or_after_360_steps(plan, end):
    env, policy = FakeEnv([plan]), FakePolicy()
    assert E.attempt(env, env.oracle, policy, {"led": "words"}, "led") == end
    assert env.judged == [("led", t) for t in range(1, end[1] + 1)]  # each of them judged
    assert policy.resets == 1 and policy.seen == ["words"] * end[1]


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
    checkpoint = {
        "method": "no_ditto", "run": {"seed": 3, "preset": "tiny"}, "step": 9, "frames": 800,
        "seconds": 1.5, "text_encoder": "an-encoder", "path": "agent.pt",
        "meta": {"hz": 30, "skip": 1, "action_scale": [0.02, 0.05], "renderer": sim.LOOK},
    }  # fmt: skip
    out = tmp_path / "out"
    world = SimpleNamespace(checkpoint=checkpoint, out=out, log=out / "chains.jsonl", asked={})
    world.env, world.policy = FakeEnv([1]), FakePolicy()

    def encode(sentences, encoder):
        world.asked["encoder"] = encoder
        return np.array([len(s) for s in sentences])

    def load_agent(path, device, **given):
        world.asked |= given
        vars(world.policy).update(given)
        return world.policy, dict(checkpoint)

    def chain(n, among=calvin.TASKS):
        return calvin.start_states()[n], among[n % 30 : n % 30 + 5]

    monkeypatch.setattr(E, "make_environment", lambda *_: (world.env, world.env.oracle))
    monkeypatch.setattr(calvin, "chain", chain)
    monkeypatch.setattr(train, "load_agent", load_agent)
    monkeypatch.setattr(data, "encode", encode)
    monkeypatch.setattr(E, "is_here", lambda encoder: True)
    world.run = lambda *more: E.main(["--checkpoint", "agent.pt", "--out", str(out), *more])
    return world


def test_a_chain_resets_the_scene_once_the_policy_per_task_and_ends_at_the_first_failure(fake):
    fake.env.plan = [5, 9, 400]  # two tasks solved, the third never
    result = fake.run("--chains", "1", "--first", "4")
    assert result["avg_len"] == 2 and fake.env.resets == 1 and fake.policy.resets == 3
    start = calvin.start_pose(calvin.start_states()[4])
    np.testing.assert_array_equal(fake.env.scene, start[1])
    words = json.loads(E.SHIPPED.with_name("sentences.json").read_text())["tasks"]
    a, b, c = (len(words[task]["validation"][0]) for task in calvin.TASKS[4:7])  # held out
    assert fake.policy.seen == [a] * 5 + [b] * 9 + [c] * 360
    assert fake.asked == {"encoder": "an-encoder"}  # the one that it was trained with


def test_chains_are_of_the_tasks_that_are_given_and_the_label_says_so(fake):
    few = calvin.TASKS[12:18]
    result = fake.run("--chains", "1", "--tasks", *few)
    assert [*result["tasks"]] == [*few[:5]] and result["among"] == [*few]
    assert result["label"] == "no_ditto (6 tasks)"


def test_results_name_all_that_they_depend_on_and_where_they_are(fake, capsys):
    result = fake.run("--chains", "2", "--replan", "7", "--reset_on_replan", "False")
    assert result == json.loads((fake.out / "results.json").read_text())
    assert (result["env"], result["method"], result["seed"]) == ("sim", "no_ditto", 3)
    assert result["success"] == [1.0] * 5 and result["avg_len"] == 5 and result["chains"] == 2
    assert result["training"]["step"] == 9 and "commit" in result
    assert result["training"]["frames"] == 800 and '"frames"' not in fake.log.read_text()
    given = {"replan": 7, "reset_on_replan": False}
    assert fake.asked == given | {"encoder": "an-encoder"} and given.items() <= result.items()
    sentence = calvin.sentences()["rotate_red_block_right"][0]
    assert result["sentences"]["rotate_red_block_right"] == sentence
    assert [result["tasks"][task] for task in calvin.TASKS[:2]] == [[1, 1], [2, 2]]
    out = capsys.readouterr().out
    assert sentence in out and out.endswith(f"to look at: {fake.out}/report.html\n")


def test_a_policy_for_another_rate_scale_renderer_frame_or_text_encoder_is_refused(fake):
    right = {**fake.checkpoint["meta"]}
    for key, value, more in (
        ("hz", 15, "15, --env sim has 30"), ("action_scale", [0.04, 0.05], ""),
        ("frame", "tcp", ""), ("renderer", "egl", "egl, --env sim has tiny-grey"),
    ):  # fmt: skip
        fake.checkpoint["meta"] = right | {key: value}
        with pytest.raises(SystemExit, match=f"agent.pt was trained on data with {key} .*{more}"):
            fake.run("--chains", "1")
    result = fake.run("--env", "calvin", "--chains", "1")  # of CALVIN's two renderers it keeps its
    assert (result["renderer"], result["scene"]) == ("egl", calvin.SCENE)
    fake.checkpoint["meta"], fake.out = right, fake.out / "15_hz"
    with pytest.raises(SystemExit, match="renderer tiny-grey, --env calvin has egl or tiny"):
        fake.run("--env", "calvin", "--chains", "1")
    with pytest.raises(SystemExit, match="text encoder is 'other', expected 'an-encoder'"):
        fake.run("--text-encoder", "other")
    fake.checkpoint["meta"]["hz"], fake.policy.skip = 15, 2  # each action held for two steps
    assert fake.run("--chains", "1", "--out", str(fake.out))["avg_len"] == 5


def test_samples_depend_on_the_chain_alone(fake, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    fake.run("--chains", "3")
    fake.run("--chains", "1", "--first", "2", "--out", str(fake.out / "other"))
    assert len(set(seeds[:3])) == 3 and seeds[3:] == seeds[2:3]


def test_a_push_moves_the_arm_for_three_actions_keeps_the_gripper_and_is_seeded(fake):
    def arm(folder):
        fake.env, fake.policy = FakeEnv(), FakePolicy()
        command = ["--chains", "1", "--limit", "40", "--disturb", "0.1", "--first", "3"]
        result = fake.run(*command, "--out", str(fake.out / folder))
        assert result["disturb"] == 0.1 and "(disturb 0.1)" in E.tables(result)
        assert all(action[6] == 1 for action, _ in fake.env.log)
        return np.array([action[:6] for action, _ in fake.env.log])

    first = arm("1")
    pushed = (first[:, 1:] != 0).any(1)  # the policy itself moves along x alone
    starts = [t for t in range(38) if pushed[t] and (first[t] != first[t - 1]).all()]
    assert len(starts) >= 2 and all((first[t] == first[t + 2]).all() for t in starts)
    assert np.abs(first[pushed]).max() <= 1 and pushed.sum() < 30
    np.testing.assert_array_equal(first[~pushed, 0], np.arange(1, 41)[~pushed])  # it acts on
    np.testing.assert_array_equal(arm("2"), first)


# ------------------------------------------------------------------ the record
def test_an_interrupted_run_shows_its_tables_and_resumes_to_the_same_result(
    fake, capsys, monkeypatch
):
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
    assert fake.run("--chains", "6")["chains"] == 6
    assert fake.env.resets == 3 and fake.log.read_text() == whole
    fake.run("--chains", "6")
    with monkeypatch.context() as second:  # of two processes
        second.setenv("RANK", "1")
        second.setenv("WORLD_SIZE", "2")
        fake.run("--chains", "6")
    assert fake.env.resets == 3  # nothing left to do
    assert fake.run("--chains", "7")["chains"] == 7 and fake.env.resets == 4  # nor lost
    assert fake.run("--first", "2", "--chains", "3")["chains"] == 3  # of those on record


def test_another_configuration_in_the_same_folder_is_an_error(fake, tmp_path):
    fake.run("--chains", "1")
    before, mine = fake.log.read_text(), tmp_path / "mine.json"
    mine.write_text(json.dumps(dict.fromkeys(calvin.TASKS, "do it")))
    for option, value, what in (
        ("--limit", "100", "limit was 360 and is 100"), ("--replan", "3", "replan was None"),
        ("--seed", "1", "evaluation_seed was 0 and is 1"), ("--disturb", "0.1", "disturb was 0"),
        ("--sentences", str(mine), "sentences was"), ("--tasks", calvin.TASKS[0], "among was None"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=rf"another evaluation's.*{what}.*Another --out"):
            fake.run("--chains", "1", option, value)
    fake.checkpoint["step"] = 10  # trained on since
    with pytest.raises(SystemExit, match="training was"):
        fake.run("--chains", "1")
    assert fake.log.read_text() == before


@pytest.mark.parametrize(
    ("there", "instead", "what"),
    [(rb'"steps": \[1, 1', b'"steps": [1, 2', "its checksum is wrong"),
     (rb'5(, "tasks.*), "crc.*', rb"3\1}", "do not belong together"),  # old ones have no checksum
     (b".+", b'{"chain": 1, "sol', ""), (b".+", b"\xff\x00", ""), (b".+", b"3", ""),
     (b".+", b"{}", "")],
)  # fmt: skip
def test_a_damaged_line_of_the_record_is_told_with_its_number(fake, there, instead, what):
    whole = fake.run("--chains", "3")
    lines = fake.log.read_bytes().splitlines()
    damaged = [*lines[:2], re.sub(there, instead, lines[2]), *lines[3:]]
    fake.log.write_bytes(b"\n".join(damaged))
    with pytest.raises(SystemExit, match=rf"jsonl: line 3 is damaged: .*{what}.*Remove the line"):
        fake.run("--chains", "3")
    del lines[2]
    fake.log.write_bytes(re.sub(rb', "crc": \d+', b"", b"\n".join(lines)))  # an old record
    assert fake.run("--chains", "3") == whole and fake.env.resets == 4  # one chain again


def test_the_benchmarks_results_accumulate_a_training_step_a_key(fake):
    fake.env.plan = [1, 1, 1, 400]
    fake.run("--chains", "1")
    fake.log.unlink()
    fake.checkpoint["step"] = 10
    fake.run("--chains", "1")
    theirs = json.loads((fake.out / "calvin_results.json").read_text())
    counts = [{"success": n, "total": 1} for n in (1, 1, 1, 0)]
    tasks = dict(zip(calvin.TASKS, counts, strict=False))
    rates = {"1": 1.0, "2": 1.0, "3": 1.0, "4": 0.0, "5": 0.0}
    figures = {"avg_seq_len": 3.0, "chain_sr": rates, "task_info": tasks}
    assert theirs == {"9": figures, "10": figures}


@pytest.mark.parametrize("file", ["chains.jsonl", "chain_0001.gif", "results.json"])
def test_a_full_disk_names_the_file_and_the_same_command_goes_on(fake, file, monkeypatch):
    replace = data.os.replace

    def full(part, path):
        if path.name == file:
            raise OSError(28, "No space left on device")
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", full)
        with pytest.raises(SystemExit, match=rf"{file}.*No space left on device.*Make room"):
            fake.run("--chains", "2", "--film", "2")
    assert not (fake.out / file).exists() and not list(fake.out.glob("part_*"))
    assert fake.run("--chains", "2", "--film", "2")["chains"] == 2 and (fake.out / file).exists()


def test_a_folder_that_cannot_be_made_or_is_in_use_is_told_by_name(fake):
    with data.locked(fake.out), pytest.raises(SystemExit, match=r"out is in use by process"):
        fake.run("--chains", "1")
    shutil.rmtree(fake.out)
    fake.out.write_text("a file")
    with pytest.raises(SystemExit, match=r"File exists: .*out"):
        fake.run("--chains", "1")


# ------------------------------------------------------------------ the command line
def test_processes_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert E.gpu() == 0
    monkeypatch.setenv("RANK", "3")
    assert E.gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert E.gpu() == 0


NONSENSE = """
--env calvin: give --checkpoint
--policy operator --checkpoint a.pt: give --checkpoint
--policy operator --instruction open: neither --instruction nor --disturb
--policy operator --disturb 0.1: neither --instruction nor --disturb
--instruction .: --instruction: give a sentence
--policy operator --reset_on_replan False: they are an agent's
--policy operator --replan 3: they are an agent's
--checkpoint a.pt --renderer egl: needs that of its data
--checkpoint none.pt: does not exist; make it with
--policy operator --first 990 --chains 20: there are chains 0 to 999
--policy operator --chains 0: there are chains 0 to 999
--policy operator --env moon: invalid choice
--policy operator --limit 0: --limit 0: at least 1
--policy operator --procs 0: --procs 0: at least 1
--policy operator --seed -1: --seed -1: at least 0
--replan 0: --replan 0: at least 1
--disturb 1.5: a probability is 0 to 1
--chain 3: Unrecognized options
--policy nobodys:Model: agent, operator or MODULE:CLASS
--policy test_evaluate:Other: agent, operator or MODULE:CLASS
--policy agnt: agent, operator or MODULE:CLASS
"""


@pytest.mark.parametrize("case", NONSENSE.strip().splitlines())
def test_a_command_that_makes_no_sense_says_what_to_give(case, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command, message = case.split(": ", 1)
    with pytest.raises(SystemExit) as stop:
        E.main(command.split())
    assert message in f"{stop.value}{capsys.readouterr().err}" and stop.value.code


def test_help_has_examples_and_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        E.main(["--help"])
    head, options = capsys.readouterr().out.split(" options ", 1)
    assert head.count("    python evaluate.py") >= 2
    words = options.replace("│", " ").replace("|", " ").split()
    for field in dataclasses.fields(E.Options):
        end = words.index("(default:", words.index(f"--{field.name}"))
        assert end - words.index(f"--{field.name}") > 2, field.name


def test_env_real_is_deploys_with_all_its_options(monkeypatch):
    monkeypatch.setitem(sys.modules, "deploy", SimpleNamespace(main=lambda argv: argv))
    argv = ["--checkpoint", "a.pt", "--env", "real", "--robot", "setup.json", "--dry-run"]
    assert E.main(argv) == ["rollouts", "setup.json", "--checkpoint", "a.pt", "--dry-run"]


def test_without_a_checkpoint_the_published_policy_is_taken_and_solves_something(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert E.SHIPPED.stat().st_size < 40e6
    result = E.main(["--chains", "6"])
    assert result["method"] == "lumos" and result["chains"] == 6 and result["avg_len"] > 0
    films = [x.name for x in tmp_path.glob("runs/first_look/*.gif")]
    assert sorted(films) == [f"chain_000{n}.gif" for n in range(3)]
    args = E.parse([])
    assert (args.chains, args.film, args.checkpoint) == (20, 3, str(E.SHIPPED))
    assert "assets" not in str(E.parse(["--checkpoint", str(E.SHIPPED)]).out)
    args = E.parse(["--checkpoint", "run/agent.pt", "--first", "10"])
    assert (args.chains, args.film) == (990, 0) and E.parse(["--film", "0"]).film == 0


def test_a_baseline_is_evaluated_as_the_agent_is(tmp_path):
    config = dataclasses.replace(B.PRESETS["tiny"], **B.METHODS["hulc"])
    meta = {"source": "sim", "renderer": sim.LOOK, "hz": 15.0, "skip": 2, "format": 1}
    meta |= {"action_scale": [0.02, 0.05], "text_encoder": data.TEXT_ENCODER}
    checkpoint = {
        "stage": "hulc", "config": dataclasses.asdict(config), "meta": meta, "step": 1,
        "model": B.Baseline(config).state_dict(), "policy": B.POLICY_PRESETS["tiny"],
        "run": {"preset": "tiny", "steps": 1, "seed": 3}, "seconds": 0.5,
        "text_encoder": data.TEXT_ENCODER,
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "hulc.pt")
    more = ["--chains", "1", "--limit", "4", "--out", str(tmp_path)]
    result = E.main(["--checkpoint", str(tmp_path / "hulc.pt"), *more])
    assert (result["method"], result["seed"], result["chains"]) == ("hulc", 3, 1)


# ------------------------------------------------------------------ sentences
def test_a_known_sentence_is_followed_where_it_can_be_done_until_it_is(fake, capsys):
    when = (("turn_on_led", ("now", 3)), ("open_drawer", ("now", 5)), ("turn_on_led", ("now", 9)))
    fake.env.oracle = lambda start, info, task: (task, info) in when
    sentence = calvin.sentences()["open_drawer"][3]
    for told in (sentence, f" {sentence.upper()}. "):  # neither case nor full stops matter
        assert fake.run("--instruction", told) == {"turn_on_led": 3, "open_drawer": 5}
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "turn_on_led at step 3" and lines[-1].endswith("5 steps (0.2 s): done")
        assert fake.env.scene[1] == 0  # the drawer is shut
    fake.env.oracle = lambda *_: False
    fake.run("--instruction", sentence, "--limit", "40")
    assert capsys.readouterr().out.endswith("40 steps (1.3 s): not done\n")
    assert len([*fake.out.glob("*.gif")]) == 3  # no film takes the place of another


@pytest.mark.parametrize(
    ("task", "first", "why"),
    [("turn_off_led", ["--first", "0"], "so already"), ("stack_block", [], "to be done before")],
)
def test_an_instruction_that_makes_no_sense_in_the_scene_is_told(fake, task, first, why):
    fake.env = sim.PlayTable(64, 64, False)
    fake.env.oracle = sim.oracle
    with pytest.raises(SystemExit, match=f"{task}: .*{why}"):
        fake.run("--instruction", calvin.sentences()[task][0], *first)


def test_an_unknown_sentence_is_followed_to_the_limit_if_there_is_a_text_encoder(fake, capsys):
    fake.env.oracle = lambda start, info, task: (task, info) == ("open_drawer", ("now", 5))
    assert fake.run("--instruction", "Do as you like", "--limit", "40") == {"open_drawer": 5}
    assert fake.policy.seen == [len("Do as you like")] * 40
    assert capsys.readouterr().out.endswith("1 of 34 tasks seen\n")


def test_without_a_text_encoder_an_unknown_sentence_is_refused_with_the_five_nearest(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # not installed
    with pytest.raises(ValueError, match=r"hf download(.|\n)*--text-encoder") as error:
        E.embed_instruction("pull out the drawr", data.TEXT_ENCODER)
    assert str(error.value).count("\n  ") == 5 and "\n  pull out the drawer\n" in str(error.value)


class Model:
    """Somebody's model for CALVIN."""

    calls = []  # noqa: RUF012

    def reset(self):
        self.calls.append("reset")

    def step(self, obs, goal):
        self.calls.append([goal, *(x.shape[0] for x in obs["rgb_obs"].values())])
        return [0, 0, 0, 0, 0, 0, 1]


def test_a_calvin_model_sees_calvins_images_and_sentences_and_is_reset_per_task(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    policy, more = f"{__name__}:Model", ["--chains", "1", "--limit", "3", "--out", str(tmp_path)]
    result = E.main(["--policy", policy, *more])
    assert result["method"] == policy and result["avg_len"] == 0
    sentence = calvin.sentences()[calvin.chain(0)[1][0]][0]
    assert Model.calls == ["reset", *[[sentence, 200, 84]] * 3]


def test_sentences_come_from_assets_from_json_or_from_a_datasets_language_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "encode", lambda sentences, _: [[len(s)] for s in sentences])

    def read(encoder, sentences=None, scene="calvin_scene_D"):
        args = SimpleNamespace(env="calvin", scene=str(scene), sentences=sentences)
        return E.read_sentences(args, encoder)

    def json_file(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    def language(folder, tasks=calvin.TASKS):
        """The k-th task's embedding is k."""
        rows = {t: {"emb": np.full((1, 1, 384), k), "ann": [t]} for k, t in enumerate(tasks)}
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / "embeddings.npy", np.array(rows, dtype=object))
        return tmp_path / folder

    sentences, words = read("an-encoder")
    assert sentences["open_drawer"] == calvin.sentences()["open_drawer"][0]
    assert words["open_drawer"] == [len(sentences["open_drawer"])]
    mine = {task: f"do {task}" for task in calvin.TASKS}
    assert read(None, json_file("mine.json", mine)) == (mine, mine)

    folder, task = language("validation/lang_an-encoder"), calvin.TASKS[3]
    (tmp_path / "training").mkdir()
    for scene in (tmp_path, tmp_path / "validation", tmp_path / "training"):
        sentences, words = read("an-encoder", scene=scene)  # a dataset brings its own
        assert sentences[task] == task and words[task].tolist() == [3] * 384
    words = read("an-encoder", folder / "embeddings.npy")[1]  # without its dataset
    assert words[task].tolist() == [3] * 384
    language("calvin/validation/lang_annotations")  # CALVIN's own name for our encoder's
    words = read(data.TEXT_ENCODER, scene=tmp_path / "calvin")[1]
    assert words[task].tolist() == [3] * 384
    for where, encoder, message in (
        (json_file("list.json", []), "short", r"list\.json"),
        (json_file("numbers.json", dict.fromkeys(calvin.TASKS, 3)), "short", "is 3, expected"),
        (json_file("more.json", mine | {"dance": "dance"}), "short", "dance.*no tasks of"),
        (folder, "another", "text encoder is 'an-encoder'"),
        (language("lang_short", calvin.TASKS[1:]), "short", f"{calvin.TASKS[0]}.*missing"),
    ):
        with pytest.raises(data.DataError, match=message):
            read(encoder, where)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # not installed
    with pytest.raises(data.DataError, match=r"mine\.json: sentence 'do rotate_red"):
        read(data.TEXT_ENCODER, tmp_path / "mine.json")


# ------------------------------------------------------------------ figures and films
def test_success_in_a_row_average_length_and_task_rates_by_hand(monkeypatch):
    monkeypatch.setattr(calvin, "TASKS", ("a", "b", "c", "d", "e"))
    records = [(5, "abcde"), (1, "bacde"), (0, "bacde"), (3, "cbaed")]
    result = E.summarise([{"solved": n, "tasks": [*tasks]} for n, tasks in records])
    assert result["success"] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert result["avg_len"] == 2.25 == sum(result["success"])
    assert result["lengths"] == [5, 1, 0, 3]
    assert result["tasks"] == {"a": [2, 3], "b": [3, 4], "c": [2, 2], "d": [1, 1], "e": [1, 2]}


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
        r |= {"training": {"step": 900}, "success": [first, 0.5, 0.25, 0.0, 0.0]}
        (tmp_path / name).write_text(json.dumps(r))
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
    nan = result("nan.json", "lumos", 4, float("nan"), 0.7)
    for bad, what in ((files[0], "twice"), (f"{tmp_path}/none.json", r"none\.json"), (nan, "nan")):
        with pytest.raises(SystemExit, match=what):
            E.main(["--table", *files, bad])


def test_the_figure_has_a_panel_for_play_for_pushes_and_for_practice(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    files, drawn = [], []
    for method, seed, frames, disturb, horizon, avg_len in (
        ("lumos", 0, 800, 0.0, 9, 4.0), ("lumos", 1, 800, 0.0, 9, 2.0),
        ("lumos", 0, 800, 0.0, 1, 1.5), ("lumos", 0, 100, 0.0, 9, 0.5),
        ("lumos", 0, 800, 0.2, 9, 0.25), ("lumos", 0, 100, 0.2, 1, 5.0),
        ("no_ditto", 0, 800, 0.0, 9, 3.0), ("no_ditto", 0, 800, 0.2, 9, 1.0),
    ):  # fmt: skip
        r = {"env": "sim", "method": method, "seed": seed, "chains": 20, "avg_len": avg_len}
        r |= {"success": [0.0] * 5, "disturb": disturb}
        r |= {"training": {"step": 9, "frames": frames, "config": {"sequence_length": horizon + 1}}}
        files.append(str(tmp_path / f"{len(files)}.json"))
        (tmp_path / f"{len(files) - 1}.json").write_text(json.dumps(r))

    bar, line = Axes.errorbar, Axes.axhline
    monkeypatch.setattr(Axes, "errorbar", lambda *a, **k: (drawn.append(a[1:]), bar(*a, **k))[1])
    monkeypatch.setattr(Axes, "axhline", lambda *a, **k: (drawn.append(a[1:]), line(*a, **k))[1])
    E.main(["--figure", f"{tmp_path}/a.png", "--table", *files])
    assert imageio.imread(tmp_path / "a.png").shape[1] == 1100
    spread = [pytest.approx(2**0.5), 0]  # of 4 and 2, with n - 1
    assert drawn == [  # what differs in two ways (5.0) is in no panel; one number: a dashed line
        ([100, 800], [0.5, 3.0], spread[::-1]), (3.0,),
        ([0.0, 0.2], [3.0, 0.25], spread), ([0.0, 0.2], [3.0, 1.0], [0, 0]),
        ([1, 9], [1.5, 3.0], spread[::-1]), (3.0,),
    ]  # fmt: skip
    other = tmp_path / "other.json"
    for old, new, what in (
        ("frames", "skip", "frames"),  # of a time when results did not say how long the play was
        ("training", "tried", "training"),  # the operator's
        ('"chains": 20', '"chains": 30', "others here"),
        ("[", "[", "seed 0 comes twice"),
    ):
        other.write_text((tmp_path / "0.json").read_text().replace(old, new))
        with pytest.raises(SystemExit, match=f"other.json.*{what}"):
            E.main(["--figure", f"{tmp_path}/b.png", "--table", *files, str(other)])
    with pytest.raises(SystemExit, match="give results"):
        E.main(["--figure", f"{tmp_path}/b.png"])


def test_a_film_shows_what_the_policy_saw_and_changes_nothing(tmp_path):
    command = [*OPERATOR, "--chains", "1", "--limit", "90", "--out", str(tmp_path)]
    plain = E.main(command)
    filmed = E.main([*command, "--film", "1"])  # only the film was missing
    assert filmed == plain and len((tmp_path / "chains.jsonl").read_text().splitlines()) == 2
    film = tmp_path / "chain_0000.gif"
    frames = imageio.imread(film)
    assert film.stat().st_size < 3e6 and len(frames) > 20
    assert tuple(frames[0, 0, 0]) != tuple(frames[-1, 0, 0])  # it says how the last attempt ended

    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    picture = E.draw(*images, "1/5  open the drawer", None)
    assert picture.shape == frames.shape[1:] == (304, 520, 3)
    np.testing.assert_array_equal(picture[48:302:4, 4:258:4], images[0])
    np.testing.assert_array_equal(picture[48:302:4, 264:518:4], images[1])
    failed = E.draw(*images, "1/5  open the drawer", False)
    assert tuple(failed[0, 0]) != tuple(picture[0, 0]) and len(np.unique(failed[:46])) > 4
