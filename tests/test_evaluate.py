"""Evaluation: CALVIN's protocol, the record that resumes, sentences, films, tables."""

import dataclasses
import json
import re
import shutil
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

OPERATOR = ["--policy", "operator"]


class FakeEnv:
    """Counts. The oracle says yes at the step that `plan` holds for the attempt under way."""

    def __init__(self, plan=(400,), stop_at_reset=None):
        self.plan, self.stop_at_reset, self.log = plan, stop_at_reset, []
        self.resets, self.judged, self.attempts, self.t = 0, [], -1, 0

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
        "config": {"method": "no_ditto"}, "run": {"seed": 3, "preset": "tiny"}, "step": 9,
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
    command = ["--checkpoint", "agent.pt", "--out", str(out)]
    world.run = lambda *more: E.main([*command, *more])
    return world


def test_a_chain_resets_the_scene_once_the_policy_per_task_and_ends_at_the_first_failure(fake):
    fake.env.plan = [5, 9, 400]  # two tasks solved, the third never
    result = fake.run("--chains", "1", "--first", "4")
    assert result["avg_len"] == 2 and fake.env.resets == 1 and fake.policy.resets == 3
    start = calvin.start_pose(calvin.start_states()[4])
    np.testing.assert_array_equal(fake.env.scene, start[1])
    words = json.loads(E.SHIPPED.with_name("sentences.json").read_text())["tasks"]
    held_out = [len(words[task]["validation"][0]) for task in calvin.TASKS[4:7]]
    assert fake.policy.seen == [held_out[0]] * 5 + [held_out[1]] * 9 + [held_out[2]] * 360
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
    assert (result["replan"], result["reset_on_replan"]) == (7, False)
    assert fake.asked == {"replan": 7, "reset_on_replan": False, "encoder": "an-encoder"}
    sentence = calvin.sentences()["rotate_red_block_right"][0]
    assert result["sentences"]["rotate_red_block_right"] == sentence
    assert [result["tasks"][task] for task in calvin.TASKS[:2]] == [[1, 1], [2, 2]]
    out = capsys.readouterr().out
    assert sentence in out and out.endswith(f"to look at: {fake.out}/report.html\n")


REFUSED = [("hz", 15), ("action_scale", [0.04, 0.05]), ("renderer", "egl"), ("frame", "tcp")]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_policy_for_another_rate_scale_renderer_or_frame_is_refused(fake, key, value):
    fake.checkpoint["meta"][key] = value
    with pytest.raises(SystemExit, match=f"agent.pt was trained on data with {key}"):
        fake.run("--chains", "1")
    if key == "hz":
        fake.policy.skip = 2  # 15 Hz held for two steps is 30 Hz
        assert fake.run("--chains", "1")["avg_len"] == 5


def test_a_policy_of_the_play_table_is_refused_in_calvin_and_one_of_calvin_keeps_its_renderer(fake):
    with pytest.raises(SystemExit, match="renderer tiny-grey, --env calvin has egl or tiny"):
        fake.run("--env", "calvin", "--chains", "1")
    fake.checkpoint["meta"]["renderer"] = "egl"
    result = fake.run("--env", "calvin", "--chains", "1")
    assert (result["renderer"], result["scene"]) == ("egl", calvin.SCENE)


def test_an_unusable_or_another_text_encoder_ends_with_its_message(fake, monkeypatch):
    with pytest.raises(SystemExit, match="text encoder is 'other', expected 'an-encoder'"):
        fake.run("--text-encoder", "other")
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"agent\.pt does not exist; make it with"):
        fake.run()


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


def test_a_changed_digit_in_the_record_is_seen_and_old_records_without_checksums_are_read(fake):
    whole = fake.run("--chains", "2")
    text = fake.log.read_text()
    fake.log.write_text(text.replace('"steps": [1, 1', '"steps": [1, 2'))
    with pytest.raises(SystemExit, match=r"line 2 is damaged: its checksum is wrong"):
        fake.run("--chains", "2")
    fake.log.write_text(re.sub(r', "crc": \d+', "", text))
    assert fake.run("--chains", "2") == whole and fake.env.resets == 2
    fake.log.write_text(re.sub(r', "crc": \d+', "", text).replace('"solved": 5', '"solved": 3'))
    with pytest.raises(SystemExit, match="do not belong together"):
        fake.run("--chains", "2")


def test_the_benchmarks_results_accumulate_a_training_step_a_key(fake):
    fake.run("--chains", "1")
    fake.log.unlink()
    fake.checkpoint["step"] = 10
    fake.run("--chains", "1")
    assert [*json.loads((fake.out / "calvin_results.json").read_text())] == ["9", "10"]


def test_processes_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for variables, number in (({}, 0), ({"RANK": "3"}, 1), ({"RANK": "9", "LOCAL_RANK": "0"}, 0)):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert E.gpu() == number


@pytest.mark.parametrize("garbage", [b'{"chain": 1, "sol', b"\xff\x00", b"3", b"{}"])
def test_a_damaged_line_of_the_record_is_told_with_its_number(fake, garbage):
    whole = fake.run("--chains", "3")
    lines = fake.log.read_bytes().splitlines()
    fake.log.write_bytes(b"\n".join([*lines[:2], garbage, *lines[3:], b""]))
    with pytest.raises(SystemExit, match=r"chains\.jsonl: line 3 is damaged.*Remove the line"):
        fake.run("--chains", "3")
    fake.log.write_bytes(b"\n".join([*lines[:2], *lines[3:], b""]))
    assert fake.run("--chains", "3") == whole and fake.env.resets == 4  # one chain again


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


NONSENSE = """
--env calvin: give --checkpoint
--policy operator --checkpoint a.pt: give --checkpoint
--policy operator --instruction open: neither --instruction nor --disturb
--policy operator --disturb 0.1: neither --instruction nor --disturb
--instruction .: --instruction: give a sentence
--policy operator --reset_on_replan False: it is an agent's
--policy operator --replan 3: it is an agent's
--checkpoint a.pt --renderer egl: needs that of its data
--policy operator --first 990 --chains 20: there are chains 0 to 999
--policy operator --chains 0: there are chains 0 to 999
--policy operator --env moon: invalid choice
--policy operator --limit 0: --limit 0: at least 1
--policy operator --procs 0: --procs 0: at least 1
--policy operator --seed -1: --seed -1: at least 0
--replan 0: --replan 0: at least 1
--disturb 1.5: a probability is 0 to 1
--chain 3: Unrecognized options
"""


@pytest.mark.parametrize("case", NONSENSE.strip().splitlines())
def test_a_command_that_makes_no_sense_says_what_to_give(case, capsys):
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
    for name in (f"{__name__}:Other", "nobodys:Model", "agnt"):
        with pytest.raises(SystemExit, match="agent, operator or MODULE:CLASS"):
            E.main(["--policy", name, *more])


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

    folder, task = tmp_path / "validation/lang_an-encoder", calvin.TASKS[3]
    folder.mkdir(parents=True)
    rows = {t: {"emb": np.full((1, 1, 384), k), "ann": [t]} for k, t in enumerate(calvin.TASKS)}
    np.save(folder / "embeddings.npy", np.array(rows, dtype=object))
    (tmp_path / "training").mkdir()
    for scene in (tmp_path, tmp_path / "validation", tmp_path / "training"):
        args.sentences, args.scene = None, str(scene)  # a dataset brings its own
        sentences, words = E.read_sentences(args, "an-encoder")
        assert sentences[task] == task and words[task].tolist() == [3] * 384
    args.sentences, args.scene = folder / "embeddings.npy", "calvin_scene_D"  # without its dataset
    assert E.read_sentences(args, "an-encoder")[1][task].tolist() == [3] * 384
    folder.rename(tmp_path / "validation/lang_annotations")  # CALVIN's own name for our encoder's
    args.sentences, args.scene = None, str(tmp_path)
    assert E.read_sentences(args, data.TEXT_ENCODER)[1][task].tolist() == [3] * 384
    (tmp_path / "validation/lang_annotations").rename(folder)
    (tmp_path / "numbers.json").write_text(json.dumps(dict.fromkeys(calvin.TASKS, 3)))
    (tmp_path / "bad.json").write_text("[]")
    rows.pop("open_drawer")
    (tmp_path / "lang_short").mkdir()
    np.save(tmp_path / "lang_short/embeddings.npy", np.array(rows, dtype=object))
    for where, encoder, message in (
        (tmp_path / "bad.json", "short", r"bad\.json"),
        (tmp_path / "numbers.json", "short", r"numbers\.json: a sentence is no text"),
        (folder, "another", "text encoder is 'an-encoder'"),
        (tmp_path / "lang_short", "short", "open_drawer.*missing"),
    ):
        args.sentences = where
        with pytest.raises(data.DataError, match=message):
            E.read_sentences(args, encoder)


def test_success_in_a_row_average_length_and_task_rates_by_hand(monkeypatch):
    monkeypatch.setattr(calvin, "TASKS", ("a", "b", "c", "d", "e"))
    records = [(5, "abcde"), (1, "bacde"), (0, "bacde"), (3, "cbaed")]
    result = E.summarise([{"solved": n, "tasks": [*tasks]} for n, tasks in records])
    assert result["success"] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert result["avg_len"] == 2.25 == sum(result["success"])
    assert result["tasks"] == {"a": [2, 3], "b": [3, 4], "c": [2, 2], "d": [1, 1], "e": [1, 2]}


def test_the_same_figures_in_the_layout_of_the_benchmarks_results_json():
    result = {"avg_len": 1.5, "success": [1.0, 0.5, 0, 0, 0], "tasks": {"open_drawer": [3, 4]}}
    rates = {"1": 1.0, "2": 0.5, "3": 0, "4": 0, "5": 0}
    tasks = {"open_drawer": {"success": 3, "total": 4}}
    figures = {"avg_seq_len": 1.5, "chain_sr": rates, "task_info": tasks}
    assert E.as_calvin(result | {"training": {"step": 800}}) == {"800": figures}


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
    for bad, message in ((files[0], "twice"), (str(tmp_path / "none.json"), r"none\.json")):
        with pytest.raises(SystemExit, match=message):
            E.main(["--table", *files, bad])


def test_a_film_shows_what_the_policy_saw_and_changes_nothing(tmp_path):
    import imageio.v3 as imageio

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
