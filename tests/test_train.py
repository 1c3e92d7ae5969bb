"""Both phases on a small packed set: resume, refusals, checkpoints, latents, precision."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import AGENT, OFTEN, WM

import agent as A
import baselines as B
import data
import diagnostics
import evaluate
import train
import world_model as W

pytestmark = pytest.mark.usefixtures("quick_probe")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def world_weights(path):
    return torch.load(path, weights_only=True)["world_model"]["model"]


def records(path):
    return [json.loads(line) for line in open(path)]


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(x, b[k]) for k, x in a.items())


@pytest.fixture
def run(packed, tmp_path):
    """Trains: run(WM, "--steps", "2"). Its folder is `out`."""

    def main(stage, *more, out=tmp_path / "out", play=packed):
        train.main([*stage, *OFTEN, "--data", str(play), "--out", str(out), *more])

    return main


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def with_meta(copy: Path, packed, **changes) -> Path:
    """A copy of a packed set that says something else of itself."""
    shutil.copytree(packed, copy)
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | changes))
    return copy


@pytest.fixture
def frozen(packed, trained) -> tuple:
    """Play, the world model of `trained` and its latents."""
    play = data.PlayData(packed, "training")
    world = train.load_world_model(train.load_checkpoint(f"{trained}/wm.pt", "wm", "cpu"), "cpu")
    return play, world, data.cache_latents(world, play, train.identity(world.state_dict()))


# ------------------------------------------------------------------ a run that goes on
@pytest.mark.parametrize("stage", ["wm", "agent", *B.METHODS])
def test_resume_equals_the_uninterrupted_run(stage, run, trained, out):
    """Also where a kill has left records of steps that are done again."""
    options, whole = ["--stage", stage, *WM[2:]], Path(trained)
    options += ["--wm", f"{trained}/wm.pt"] if stage == "agent" else []
    if stage in B.METHODS:
        whole = out / "whole"
        run(options, "--steps", "4", out=whole)
    run(options, "--steps", "2")
    with open(out / f"{stage}.jsonl", "a") as f:
        f.write('{"step": 3, "kind": "train"}\n{"step": 4, "ki')
    run(options, "--steps", "4")
    assert equal(weights(whole / f"{stage}.pt"), weights(out / f"{stage}.pt"))
    losses = []
    for folder in (whole, out):
        rows = [r for r in records(folder / f"{stage}.jsonl") if r["kind"] == "train"]
        losses.append([r | {"hours": 0} for r in rows])
    assert losses[0] == losses[1] and [r["step"] for r in losses[0]] == [2, 4]
    if stage in B.METHODS:  # of the agent other tests ask it
        policy, checkpoint = train.load_agent(out / f"{stage}.pt", replan=3)
        images = {k: np.zeros((64, 64, 3), np.uint8) for k in data.CAMERAS}
        assert policy.act({"rgb_obs": images}, np.zeros(384)).shape == (7,)
        assert policy.replan == 3 and checkpoint["stage"] == stage


def start(packed, out, *more) -> subprocess.Popen:
    """A training without end in another process, once it has saved its first checkpoint."""
    command = [sys.executable, str(train.__file__), *WM, *OFTEN, "--validate_every", "1000"]
    command += ["--steps", "100000", "--data", packed, "--out", str(out), *more]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # or sums are rounded otherwise
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             env=os.environ | threads, text=True)  # fmt: skip
    while not (out / "wm.pt").exists():
        assert child.poll() is None
        time.sleep(0.05)
    return child


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_run_goes_on_as_an_undisturbed_one(end, packed, run, out):
    """kill -9 loses the steps since the last checkpoint, Ctrl-C none. A second run is refused."""
    child = start(packed, out, "--checkpoint_every", "2" if end == signal.SIGKILL else "1")
    with pytest.raises(SystemExit, match=rf"out is in use by process {child.pid} on "):
        run(WM)
    child.send_signal(end)
    said = child.communicate(timeout=60)[0]
    step = torch.load(out / "wm.pt", weights_only=True)["step"]
    if end == signal.SIGINT:
        assert child.returncode == 130 and f"Ctrl-C: {out}/wm.pt holds step {step}" in said
    for folder in (out, out.parent / "undisturbed"):
        run(WM, "--steps", str(step + 2), "--validate_every", "1000", out=folder)
    assert equal(weights(out / "wm.pt"), weights(out.parent / "undisturbed" / "wm.pt"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, trained, out, capsys):
    shutil.copytree(trained, out)
    flip_a_bit(out / "wm.pt")
    run(WM, "--steps", "4")
    assert "a checksum is wrong" in (said := capsys.readouterr().out)
    assert f"going on from step 2 of {out}/wm_previous.pt" in said
    assert equal(weights(f"{trained}/wm.pt"), weights(out / "wm.pt"))


def test_a_run_goes_on_with_a_lower_rate_but_not_as_another(run, packed, trained, out, tmp_path):
    shutil.copytree(trained, out)
    with pytest.raises(SystemExit, match=r"beta: 0\.3 there, 1\.0 here"):
        run(WM, "--beta", "1.0")
    other = with_meta(tmp_path / "other", packed, hz=30, skip=1)
    with pytest.raises(SystemExit, match=r"other data:\n  hz: 15 there, 30 here"):
        run(WM, play=other)
    run(WM, "--steps", "6", "--learning_rate", "1e-4", "--precision", "bf16")
    with pytest.raises(SystemExit, match="another world model"):
        run(AGENT, "--steps", "6")


def test_moments_of_another_memory_layout_stay_with_their_weights(run, tmp_path):
    """Fused AdamW pairs weights and moments as they lie in memory, and asks nobody."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        path = tmp_path / str(layout) / "wm.pt"
        run(WM, "--steps", "2", out=path.parent)
        checkpoint = torch.load(path, weights_only=True)
        for state in checkpoint["optimizer"]["world"]["state"].values():
            images = {k: x for k, x in state.items() if x.dim() == 4}
            state |= {k: x.contiguous(memory_format=layout) for k, x in images.items()}
        torch.save(checkpoint, path)
        run(WM, "--steps", "4", out=path.parent)
        ends.append(weights(path))
    assert equal(*ends)


# ------------------------------------------------------------------ steps
def test_schedules_of_lengths_and_rates(run, trained, monkeypatch):
    """[D25]: in the first half twice as many sequences of half the length; with --anneal 0.5 of 4
    steps, the last two are at a full and at half the rate."""
    seen, rates, plain = [], [], W.SimWorldModel.loss
    steps = {kind: kind.step for kind in (torch.optim.Adam, torch.optim.AdamW)}

    def loss(world, batch, state):
        if world.training:
            seen.append((*batch["reset"].shape,))
        return plain(world, batch, state)

    def step(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return steps[type(optimizer)](optimizer, *args, **kwargs)

    monkeypatch.setattr(W.SimWorldModel, "loss", loss)
    for kind in steps:
        monkeypatch.setattr(kind, "step", step)
    more = ["--anneal", "0.5", "--steps", "4"]
    run([*AGENT, "--wm", f"{trained}/wm.pt"], "--actor_lr", "0.2", "--critic_lr", "1.0", *more)
    more += "--carry_state false --length_curriculum 2".split()
    run(WM, "--learning_rate", "1e-4", *more)
    assert seen == [(8, 16), (8, 16), (16, 8), (16, 8)]
    agent, world = [0.2, 1.0] * 3 + [0.1, 0.5], [1e-4] * 3 + [5e-5]
    assert rates[:12] == pytest.approx(agent + world)  # then come the probe's


@pytest.mark.parametrize("stage, name", [(WM, "kl"), (AGENT, "contrast")])
def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_step(
    stage, name, run, trained, out, monkeypatch
):
    """Although all are not finite from the next step on, and nobody looks before step 4."""
    wm = stage == WM
    module, function = (W, "elbo_loss") if wm else (A.P, "contrastive_loss")
    real, calls = getattr(module, function), []

    def broken(*args):
        loss, terms = real(*args)
        nan = float("nan") if len(calls) == 1 else 1.0
        calls.append(nan)
        return loss * nan, (terms | {"kl": terms["kl"] * nan}) if wm else terms

    monkeypatch.setattr(module, function, broken)
    more = ["--log_every", "4", "--checkpoint_every", "4", "--steps", "5"]
    with pytest.raises(SystemExit, match=f"{name} is nan at step 1"):
        run(stage, *more, *([] if wm else ["--wm", f"{trained}/wm.pt"]))
    assert not list(out.glob("*.pt"))


def test_a_picture_that_cannot_be_written_costs_no_step(run, out, monkeypatch):
    replace = os.replace

    def full(part, path):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        replace(part, path)

    more = ["--validate_every", "3", "--steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit, match=r"prediction_0000003\.png: .*space left.*Make room"):
            run(WM, *more)
    assert not list((out / "pictures").iterdir())
    assert torch.load(out / "wm.pt", weights_only=True)["step"] == 3
    run(WM, *more)  # goes on with that picture
    assert [p.name for p in (out / "pictures").iterdir()] == ["prediction_0000003.png"]
    assert [r["kind"] for r in records(out / "wm.jsonl")] == ["train", "train", "validate"]


def test_a_run_says_what_it_found(trained):
    probe = json.load(open(f"{trained}/probe.json"))
    assert set(probe) - {"step", "chance"} == set(probe["chance"])
    tracking = json.load(open(f"{trained}/tracking.json"))
    assert tracking["step"] == 4 and "tracking_proposed" in tracking


# ------------------------------------------------------------------ the command line
def test_every_field_of_the_configuration_is_an_option_with_its_meaning(capsys):
    run, model = train.parse([*WM, "--batch_size", "3", "--carry_state", "false", "--seed", "7"])
    assert (run.seed, model.batch_size, model.carry_state) == (7, 3, False)
    _, model = train.parse([*AGENT, "--alpha_2=0.5", "--method", "no_ditto", "--rephrase=false"])
    assert not model.rephrase and train.parse(AGENT)[1].rephrase
    assert (model.alpha_2, model.method) == (0.5, "no_ditto")
    assert train.parse(["--stage", "wm"])[1] == W.WorldModelConfig()  # the paper's
    with pytest.raises(SystemExit, match="0"):
        train.parse(["--stage", "wm", "--preset", "sim", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--beta FLOAT β, KL loss scale (default: 0.3)" in said and "examples:" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learningrate", "1"), ("precision", "half"), ("device", "gpu"), ("log_every", "0"),
        ("steps", "-1"), ("seed", "-1"), ("steps", "many"), ("depth", "0"), ("hidden", "-3"),
        ("batch_size", "0"), ("learning_rate", "-1.0"),
    ],
)  # fmt: skip
def test_a_typo_or_an_impossible_value_is_an_error(option, value, capsys, packed, out):
    with pytest.raises(SystemExit) as error:
        train.main([*WM, "--data", packed, "--out", str(out), f"--{option}", value])
    said = f"{error.value} {capsys.readouterr().err}"
    assert option in said and (value in said or option == "learningrate")
    assert not out.exists()


def test_missing_data_says_how_to_make_it(run, tmp_path):
    with pytest.raises(SystemExit, match=r"data\.py pack"):
        run(WM, play=tmp_path / "none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_told(run, trained):
    with pytest.raises(SystemExit, match="--device cuda cannot be used here"):
        run(WM, "--device", "cuda")
    with pytest.raises(SystemExit, match=r"evaluate.py: --device cuda:1 cannot"):
        evaluate.main(["--checkpoint", f"{trained}/agent.pt", "--device", "cuda:1"])


@pytest.mark.parametrize(("key", "value"), [("hz", 30), ("renderer", "egl"), ("frame", "tool")])
def test_data_of_another_kind_than_the_world_models_is_refused(
    key, value, run, packed, trained, tmp_path
):
    other, wm = with_meta(tmp_path / "other", packed, **{key: value}), f"{trained}/wm.pt"
    with pytest.raises(SystemExit, match=rf"wm\.pt was trained on data with {key}"):
        run(AGENT, "--wm", wm, play=other)
    with pytest.raises(SystemExit, match=rf"wm\.pt was trained on data with {key}"):
        argv = ["--checkpoint", wm, "--data", str(other), "--out", str(tmp_path)]
        diagnostics.main(["predict", *argv])


def test_an_unfinished_world_model_is_told(run, trained, out, capsys):
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("agent*"))
    edited(lambda c: c["run"].update(steps=5))(out / "wm.pt")
    run(AGENT, "--steps", "1")
    assert "wm.pt is of step 4; its training was not finished" in capsys.readouterr().out


# ------------------------------------------------------------------ checkpoints
def flip_a_bit(path):
    """In the middle of the largest tensor: between two of them it would be padding."""
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda x: x.file_size)
    whole = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", whole, record.header_offset + 26)  # lengths
    whole[record.header_offset + 30 + name + extra + record.file_size // 2] ^= 1
    path.write_bytes(whole)


def edited(change):
    """A damage: `change` of the checkpoint's dict."""

    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


BIAS = "actor.mean.bias"
DAMAGE = {
    "half": (lambda p: p.write_bytes(p.read_bytes()[:9999]), "is no checkpoint.*train again"),
    "a bit": (flip_a_bit, "checksum.*is no checkpoint"),
    "none": (Path.unlink, r"does not exist; make it with.*--stage wm\|agent"),
    "no meta": (edited(lambda c: c.pop("meta")), "lacks meta; .*train again"),
    "no world": (edited(lambda c: c.pop("world_model")), "lacks world_model"),
    "run": (edited(lambda c: c.update(run=[])), "lacks run; "),
    "rate": (edited(lambda c: c["meta"].update(hz="fast")), r"positive numbers.*of train\.py"),
    "step": (edited(lambda c: c.update(step=-1)), r"step -1.*of train\.py"),
    "replan": (edited(lambda c: c["policy"].update(replan=0)), r"replan 0.*of train\.py"),
    "absurd": (edited(lambda c: c["model"][BIAS].fill_(1e30)), f"{BIAS} is not finite.*again"),
    "stage": (edited(lambda c: c.update(stage="wm")), "holds stage 'wm'"),
    "nan": (edited(lambda c: c["model"][BIAS].fill_(torch.nan)), f"{BIAS} is not finite.*again"),
    "field": (edited(lambda c: c["config"].update(colour="red")), r"colour.*of agent\.py.*again"),
    "gone": (edited(lambda c: c["model"].pop(BIAS)), rf"{BIAS}.*of agent\.py"),
    "shape": (edited(lambda c: c["model"].update({BIAS: torch.zeros(3)})), r"of agent\.py"),
    "size": (edited(lambda c: c["world_model"]["config"].update(deterministic=32)), "of world_mod"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_checkpoint_that_cannot_be_used_is_told_by_name(case, trained, tmp_path):
    damage, message = DAMAGE[case]
    shutil.copy(f"{trained}/agent.pt", tmp_path)
    damage(tmp_path / "agent.pt")
    problem = ValueError, data.DataError
    with pytest.raises(problem, match=f"(?s)^{tmp_path}/agent.pt.*{message}"):
        train.load_agent(tmp_path / "agent.pt")


def test_the_published_policy_is_preset_sims():
    published = Path(train.__file__).parent / "assets/sim.pt"
    policy, about = train.load_agent(published)
    assert (policy.replan, policy.reset_on_replan, policy.skip) == (15, True, 2)
    preset = dataclasses.replace(A.PRESETS["sim"], anneal=1.0)  # in its last 11,000 updates
    assert about["config"] == dataclasses.asdict(preset)
    assert policy.world.config == W.PRESETS["sim"] and about["meta"]["source"] == "sim"
    assert train.load_agent(published, replan=7)[0].replan == 7


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "wm.pt"
    train.save_checkpoint(path, {"step": 1})

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.DataError, match="No space left"):
        train.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_published_checkpoint_acts_alike_from_fewer_bytes_and_is_not_trained_on(
    trained, packed, tmp_path
):
    train.publish(f"{trained}/agent.pt", tmp_path / "agent.pt")
    shutil.copy(f"{trained}/wm.pt", tmp_path)
    (ours, _), (theirs, about) = (train.load_agent(f"{p}/agent.pt") for p in (trained, tmp_path))
    assert about["meta"]["source"] == "sim" and about["run"]["seed"] == 0
    assert packed not in str(about) and trained not in str(about)
    acting = [*ours.agent.state_dict().values(), *ours.world.state_dict().values()]
    numbers = sum(x.numel() for x in acting)
    size = (tmp_path / "agent.pt").stat().st_size
    assert 2 * numbers < size < 2.5 * numbers + 100_000
    x = torch.randn(64, ours.agent.actor.body[0].in_features)
    step = (*ours.world.split(x[:, : ours.world.config.latent]), torch.zeros(64, 7))
    for use in (lambda p: p.agent.actor(x, sample=False), lambda p: p.world.imagine_step(*step)[0]):
        assert torch.allclose(use(ours), use(theirs), atol=0.01)
        assert not torch.equal(use(ours), use(theirs))
    with pytest.raises(SystemExit, match=r"agent\.pt was published"):
        train.main([*AGENT, "--data", packed, "--out", str(tmp_path), "--steps", "9"])


def test_training_begins_with_published_weights(trained, run, out, tmp_path, capsys):
    """A world model's and an agent's, of one file; the agent practises in its world model."""
    theirs, still = tmp_path / "published.pt", "1e-9"
    train.publish(f"{trained}/agent.pt", theirs)
    begin, world = ["--begin", str(theirs)], world_weights(theirs)
    run(WM, *begin, "--steps", "1", "--learning_rate", still)
    ours = weights(out / "wm.pt")
    assert all(torch.allclose(ours[k], x.float(), atol=1e-6) for k, x in world.items())
    run(WM, "--steps", "2", "--learning_rate", "1e-3")  # goes on with its own weights
    assert not equal(weights(out / "wm.pt"), ours)
    assert torch.load(out / "wm.pt")["run"]["begin"] == str(theirs)
    run(WM, "--begin", "elsewhere.pt", "--steps", "2")
    assert "--begin is for new runs" in capsys.readouterr().out
    run(AGENT, *begin, "--wm", str(theirs), "--steps", "1", "--actor_lr", still)
    assert equal(world_weights(out / "agent.pt"), world)
    ours = weights(out / "agent.pt")
    assert all(torch.allclose(ours[k], x.float(), atol=1e-6) for k, x in weights(theirs).items())
    with pytest.raises(SystemExit, match=r"published\.pt holds .* another size or method: give"):
        run(WM, *begin, "--steps", "1", "--hidden", "7", out=tmp_path / "other")
    with pytest.raises(SystemExit, match="of another size or method"):
        run(
            AGENT, *begin, "--wm", str(theirs), "--method", "no_latent_plan", out=tmp_path / "other"
        )
    with pytest.raises(SystemExit, match="first weights: --begin FILE"):
        run(WM, "--wm", str(theirs))
    torch.save(torch.load(theirs, weights_only=True) | {"text_encoder": "other"}, theirs)
    run(WM, *begin, "--steps", "1", out=tmp_path / "wm")  # a world model sees no sentences
    with pytest.raises(SystemExit, match="text encoder is 'other', expected"):
        run(AGENT, *begin, "--wm", str(theirs), "--steps", "1", out=tmp_path / "agent")


# ------------------------------------------------------------------ latents and windows
def test_latents_are_those_of_the_whole_episode(frozen):
    """The cache, made in parallel stretches, against one pass through each episode."""
    play, world, latents = frozen
    for first, end in play.episodes:
        batch = play.frames(np.arange(first, end)[:, None])
        # z is sampled: feed the cached one back, so that h must follow from it.
        h, z = world.initial(1)
        for t in range(end - first):
            keep = (~batch["reset"][t])[:, None].float()
            h = world.recurrent(h * keep, z * keep, batch["a_prev"][t])
            assert torch.allclose(h, torch.tensor(latents.h[first + t]).float(), atol=2e-3)
            frame = latents.z[[first + t]], play.robot_obs[[first + t]]
            z = world.latent_z(*map(torch.from_numpy, frame))


def test_latents_count_only_when_they_are_whole(frozen, monkeypatch, tmp_path):
    play, world, latents = frozen
    monkeypatch.setattr(play, "path", tmp_path)
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(world, "classes_of", full):
        with pytest.raises(data.DataError, match=r"latents-key\.part: .*space left"):
            data.cache_latents(world, play, "key")
    assert not (tmp_path / "latents-key").exists()
    again = data.cache_latents(world, play, "key")
    assert all((a == b).all() for a, b in zip(again, latents, strict=True))
    assert (again.h.dtype, again.z.dtype, again.z_reset.dtype) == (np.float16, np.uint8, np.uint8)


def test_windows_bring_their_sentence_and_a_reset_start_its_own_latents(frozen):
    play, world, latents = frozen
    sizes = {"sequence_length": 10, "min_window": 6, "max_window": 10}
    config = dataclasses.replace(A.PRESETS["tiny"], **sizes)
    batches = data.WindowBatches(play, latents, world, config, 0)
    assert batches.language.rephrase == config.rephrase == True  # noqa: E712  [D11]
    T, B, H = config.sequence_length, config.batch_size // 2, world.config.deterministic
    sources = batches.play.batch(3), batches.language.batch(3)
    kept, reset = (batches.batch(3, reset_start=chance) for chance in (0.0, 1.0))
    assert reset[1]["emb"].shape == (B, 384) and "emb" not in reset[0]
    for source, with_past, fresh in zip(sources, kept, reset, strict=True):
        index, length, s = source["index"], source["length"], with_past["s_E"]
        assert s.shape == (T, B, world.config.latent) and torch.equal(source["a"], fresh["a"])
        assert (fresh["gripper"].numpy() == play.robot_obs[index[0], 14]).all()
        assert (length < T).any()  # some windows are padded
        # Without a reset, h anew is the cached one, as far as that is exact and the window goes.
        real = torch.arange(T)[:, None] < length
        cached = torch.tensor(latents.h[index]).float()
        assert torch.allclose(s[..., :H][real], cached[real], atol=5e-3)
        # With one [D8], z is of one frame alone at first, and h has forgotten what was before.
        h = world.recurrent(*world.initial(1), torch.tensor([A.NO_ACTION])).expand(B, -1)
        first = latents.z_reset[index[0]], play.robot_obs[index[0]]
        z, held = [world.latent_z(*map(torch.from_numpy, first)), *s[1:, :, H:]], h
        for t in range(T):
            held = torch.where((t < length)[:, None], h, held)
            assert torch.allclose(fresh["s_E"][t], torch.cat([held, z[t]], -1), atol=1e-6)
            h = world.recurrent(h, z[t], source["a"][t])
    spans = sources[1]["index"][0][:, None] >= torch.tensor(play.spans)[sources[1]["span"], :1]
    assert spans.all()


# ------------------------------------------------------------------ precision
def test_bf16_products_give_the_losses_and_gradients_of_fp32(frozen, monkeypatch):
    """Every draw at its mean, so that no rounding turns into another sample."""
    for module in (W, A.P):
        monkeypatch.setattr(
            module, "sample_straight_through", lambda q, *_: q.softmax(-1).flatten(-2)
        )
    play, world, latents = frozen
    windows = data.WindowBatches(play, latents, world, A.PRESETS["tiny"], 0).batch(0)
    agent = A.Agent(A.PRESETS["tiny"], world.config.latent).eval()  # no dropout
    sequences = data.Sequences(play, 4, 8, 0).batch(0)
    learner = W.make_world_model(world.config).eval()
    of_world = functools.partial(learner.loss, sequences, learner.initial(4))
    of_agent = functools.partial(agent.losses, world, *windows)
    for module, losses in ((learner, of_world), (agent, of_agent)):
        seen = []
        for bf16 in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                values = [x for x in losses() if isinstance(x, torch.Tensor)]
            assert all(x.dtype == torch.float32 for x in values)
            module.zero_grad()
            sum(values).backward()
            gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            seen.append((torch.stack(values).detach(), torch.cat(gradients)))
        (loss_32, gradient), (loss_16, gradient_16) = seen
        assert not torch.equal(gradient, gradient_16), "bf16 was not used"
        assert torch.allclose(loss_32, loss_16, rtol=0.02)
        assert (gradient - gradient_16).norm() < 0.1 * gradient.norm()


def test_a_rounded_world_model_gives_the_same_losses_and_gradients_under_autocast(frozen):
    play, world, latents = frozen
    fresh, seen = A.Agent(A.PRESETS["tiny"], world.config.latent), []
    batches = data.WindowBatches(play, latents, world, A.PRESETS["tiny"], 0)
    for dynamics in (world, train.rounded(world)):
        batches.world, agent = dynamics, copy.deepcopy(fresh)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            batch = [batches.states(windows) for windows in batches.read(0)]
            actor, critic, _ = agent.losses(dynamics, *batch)
        (actor + critic).backward()
        gradients = [p.grad for p in agent.parameters() if p.grad is not None]
        seen.append([batch[0]["s_E"], batch[1]["s_E"], actor, critic, *gradients])
    assert len(seen[0]) == len(seen[1]) > 50 and all(map(torch.equal, *seen))
    assert dynamics.gru.weight_hh.dtype == torch.bfloat16
    assert world.gru.weight_hh.dtype == torch.float32, "the checkpoint's own model was changed"
