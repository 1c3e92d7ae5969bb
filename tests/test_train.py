"""Both phases on a small packed set made here: resume, errors, caches, checkpoints."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import diagnostics
import evaluate
import sim
import train
import world_model as W

WM = ["--stage", "wm", "--preset", "tiny", "--precision", "fp32", "--log_every", "2"]
AGENT = ["--stage", "agent", "--preset", "tiny", "--precision", "fp32", "--log_every", "2"]
OFTEN = ["--validate_every", "100", "--checkpoint_every", "2"]


def write_packed(root, frames=160, seed=0):
    """A packed set whose picture is a dot moved by the first two action numbers."""
    for split in ("training", "validation"):
        rng = np.random.default_rng([seed, split == "training"])
        folder = root / split
        folder.mkdir(parents=True)
        a = rng.uniform(-1, 1, (frames, 7)).astype(np.float32)
        a[:, 6] = np.sign(a[:, 6])
        at = np.clip(np.cumsum(a[:, :2] * 3, 0) + 32, 4, 60)
        images = np.zeros((frames, 64, 64, 3), np.uint8)
        for i, (x, y) in enumerate(at.astype(int)):
            images[i, y - 4 : y + 4, x - 4 : x + 4] = 255
        robot = np.zeros((frames, 15), np.float32)
        robot[:, :2], robot[1:, 14] = at / 64, a[:-1, 6]
        scene = rng.normal(size=(frames, 24)).astype(np.float32)
        arrays = {
            "rgb_static": images, "rgb_gripper": images[:, ::-1], "actions": a,
            "robot_obs": robot, "scene_obs": scene,
            "episodes": np.array([[0, frames // 2], [frames // 2, frames]]),
            "spans": np.array([[10, 42], [90, 122], [30, 62]]),
            "span_emb": rng.normal(size=(3, 384)).astype(np.float32),
        }  # fmt: skip
        for name, x in arrays.items():
            np.save(folder / f"{name}.npy", x)
        lang = {"sentences": ["go left", "go right", "go up"], "tasks": ["a", "b", "c"]}
        (folder / "lang.json").write_text(json.dumps(lang))
    meta = {
        "format": 1, "source": "sim", "renderer": sim.LOOK, "hz": 15, "skip": 2,
        "action_scale": [0.02, 0.05], "text_encoder": data.TEXT_ENCODER,
    }  # fmt: skip
    (root / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed") / "play"
    write_packed(root)
    return str(root)


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory):
    """A run with both stages done: four steps of each."""
    out = str(tmp_path_factory.mktemp("run"))
    common = ["--data", packed, "--out", out, "--steps", "4"]
    train.main([*WM, *OFTEN, *common])
    train.main([*AGENT, *OFTEN, *common])
    return out


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def records(path):
    return [json.loads(line) for line in open(path)]


@pytest.mark.parametrize("stage", [WM, AGENT])
def test_resume_equals_the_uninterrupted_run(stage, packed, trained, tmp_path):
    name = stage[1]
    if name == "agent":
        os.link(f"{trained}/wm.pt", tmp_path / "wm.pt")
    common = [*stage, *OFTEN, "--data", packed, "--out", str(tmp_path)]
    train.main([*common, "--steps", "2"])
    train.main([*common, "--steps", "4"])
    once, twice = weights(f"{trained}/{name}.pt"), weights(tmp_path / f"{name}.pt")
    assert all(torch.equal(once[k], twice[k]) for k in once)
    a, b = records(f"{trained}/{name}.jsonl"), records(tmp_path / f"{name}.jsonl")
    pick = lambda rows: {r["step"]: r["loss" if name == "wm" else "loss_actor"]
                         for r in rows if r["kind"] == "train"}  # fmt: skip
    assert pick(a) == pick(b)


def test_pieces_come_before_whole_sequences_and_samples_harden(packed, tmp_path, monkeypatch):
    """[D25, D26]: in the first half twice as many sequences of half the length."""
    seen, plain = [], W.WorldModel.loss

    def spy(world, batch, state):
        if world.training:
            seen.append((*batch["reset"].shape, float(world.softness)))
        return plain(world, batch, state)

    monkeypatch.setattr(W.WorldModel, "loss", spy)
    options = "--carry_state false --shorter 2 --harden 0.75 --steps 4".split()
    train.main([*WM, *options, "--data", str(packed), "--out", str(tmp_path)])
    shapes, softness = zip(*((s[:2], s[2]) for s in seen), strict=True)
    assert shapes == ((8, 16), (8, 16), (16, 8), (16, 8))
    assert softness == pytest.approx((2 / 3, 1 / 3, 0, 0))


def test_records_after_the_checkpoint_are_dropped_on_resume(packed, tmp_path):
    common = [*WM, "--validate_every", "100", "--data", packed, "--out", str(tmp_path)]
    train.main([*common, "--checkpoint_every", "2", "--steps", "2"])
    with open(tmp_path / "wm.jsonl", "a") as f:  # as a killed run leaves it
        f.write('{"step": 3, "kind": "train"}\n{"step": 4, "ki')
    train.main([*common, "--checkpoint_every", "2", "--steps", "4"])
    assert [r["step"] for r in records(tmp_path / "wm.jsonl") if r["kind"] == "train"] == [2, 4]


def test_another_configuration_is_refused_and_named(packed, trained):
    with pytest.raises(SystemExit) as e:
        train.main([*WM, "--data", packed, "--out", trained, "--steps", "4", "--beta", "1.0"])
    assert "--beta: 0.3 there, 1.0 here" in str(e.value)


def test_a_typo_on_the_command_line_is_an_error(capsys):
    with pytest.raises(SystemExit):
        train.parse([*WM, "--learningrate", "1"])
    assert "--learningrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("precision", "half"), ("device", "gpu"), ("log_every", "0"), ("steps", "-1"), ("seed", "-1")],
)
def test_an_impossible_value_is_an_error(option, value, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--stage", "wm", f"--{option}", value])
    assert f"--{option} {value}" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_data_of_another_rate(packed, trained, tmp_path):
    other = tmp_path / "play"
    shutil.copytree(packed, other)
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"hz": 30, "skip": 1}))
    shutil.copytree(trained, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"was trained on other data.*'hz': 15"):
        train.main([*WM, *OFTEN, "--data", str(other), "--out", str(tmp_path / "out")])


def test_every_field_of_the_configuration_is_an_option():
    run, model = train.parse([*WM, "--batch_size", "3", "--carry_state", "false", "--seed", "7"])
    assert (run.seed, model.batch_size, model.carry_state) == (7, 3, False)
    _, model = train.parse([*AGENT, "--alpha_2", "0.5", "--method", "no_ditto"])
    assert (model.alpha_2, model.method) == (0.5, "no_ditto")
    assert train.parse(["--stage", "wm"])[1] == train.W.WorldModelConfig()  # the paper's


@pytest.mark.parametrize("stage, name", [("wm", "kl"), ("agent", "contrast")])
def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_step(
    stage, name, packed, trained, tmp_path, monkeypatch
):
    """Although all are not finite from the next step on, and nobody looks before step 4."""
    shutil.copy(f"{trained}/wm.pt", tmp_path) if stage == "agent" else None
    module, function = (train.W, "elbo_loss") if stage == "wm" else (train.A.P, "contrastive_loss")
    real, calls = getattr(module, function), []

    def broken(*args):
        loss, terms = real(*args)
        nan = float("nan") if len(calls) == 1 else 1.0
        calls.append(nan)
        return loss * nan, (terms | {"kl": terms["kl"] * nan}) if stage == "wm" else terms

    monkeypatch.setattr(module, function, broken)
    before = (tmp_path / "wm.pt").exists()
    options = ["--log_every", "4", "--steps", "5", "--data", packed, "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"{name} is nan at step 1"):
        train.main([*(WM if stage == "wm" else AGENT), *options])
    assert (tmp_path / "wm.pt").exists() == before and not (tmp_path / "agent.pt").exists()


def test_a_published_checkpoint_acts_alike_from_fewer_bytes_and_is_not_trained_on(
    trained, packed, tmp_path
):
    train.publish(f"{trained}/agent.pt", tmp_path / "agent.pt")
    shutil.copy(f"{trained}/wm.pt", tmp_path)
    (ours, _), (theirs, about) = (train.load_agent(f"{p}/agent.pt") for p in (trained, tmp_path))
    assert about["meta"]["source"] == "sim" and about["run"]["seed"] == 0
    assert packed not in str(about) and trained not in str(about)
    weights = [sum(x.numel() for x in p.agent.state_dict().values()) for p in (ours, theirs)]
    weights[0] += sum(x.numel() for x in ours.world.state_dict().values())
    size = (tmp_path / "agent.pt").stat().st_size
    assert 2 * weights[0] < size < 2.5 * weights[0] + 100_000
    s = torch.randn(64, sum(x.shape[1] for x in ours.world.initial(1)))
    context = torch.randn(64, ours.agent.actor.body[0].in_features - s.shape[1])
    a, b = (p.agent.actor(torch.cat([s, context], -1), sample=False) for p in (ours, theirs))
    assert torch.allclose(a, b, atol=0.01) and not torch.equal(a, b)
    step = (*s.split([x.shape[1] for x in ours.world.initial(1)], -1), torch.zeros(64, 7))
    a, b = (p.world.imagine_step(*step)[0] for p in (ours, theirs))
    assert torch.allclose(a, b, atol=0.01) and not torch.equal(a, b)
    with pytest.raises(SystemExit, match=r"agent\.pt was published"):
        train.main([*AGENT, "--data", packed, "--out", str(tmp_path), "--steps", "9"])


def test_checkpoints_of_the_other_stage_or_damaged_ones_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"wm\.pt holds stage 'wm'"):
        train.load_agent(f"{trained}/wm.pt")
    whole = open(f"{trained}/agent.pt", "rb").read()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pt is no checkpoint"):
        train.load_agent(tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"--stage agent"):
        train.load_agent(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("meta"), r"agent\.pt lacks meta; .*train again"),
        (lambda c: c.pop("world_model"), "lacks world_model"),
        (
            lambda c: c["config"].update(colour="red"),
            r"of agent\.py.*train it again.*colour",
        ),
        (lambda c: c["model"].update({"critic.net.0.bias": torch.zeros(3)}), r"of agent\.py"),
        (
            lambda c: c["world_model"]["config"].update(deterministic=32),
            r"of world_model\.py.*size",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_by_name(change, message, trained, tmp_path):
    checkpoint = torch.load(f"{trained}/agent.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=f"(?s)^{tmp_path}/agent.pt.*") as error:
        train.load_agent(tmp_path / "agent.pt")
    assert re.search(message, str(error.value), re.S)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_told(packed, trained, tmp_path):
    argv = [*WM, "--data", packed, "--out", str(tmp_path), "--device", "cuda"]
    with pytest.raises(SystemExit, match="--device cuda cannot be used here"):
        train.main(argv)
    with pytest.raises(SystemExit, match=r"evaluate.py: --device cuda:1 cannot"):
        evaluate.main(["--checkpoint", f"{trained}/agent.pt", "--device", "cuda:1"])


def test_a_picture_that_cannot_be_written_costs_no_step(packed, tmp_path, monkeypatch):
    replace = os.replace

    def full(part, path):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        replace(part, path)

    argv = [*WM, "--validate_every", "3", "--data", packed, "--out", str(tmp_path), "--steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit, match=r"prediction_0000003\.png: .*space left.*Make room"):
            train.main(argv)
    assert not list((tmp_path / "pictures").iterdir())
    assert torch.load(tmp_path / "wm.pt", weights_only=True)["step"] == 3
    train.main(argv)  # goes on with that picture
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["prediction_0000003.png"]
    assert [r["kind"] for r in records(tmp_path / "wm.jsonl")] == ["train", "train", "validate"]


def test_what_a_run_found_out_lies_beside_its_checkpoints(trained):
    probe = json.load(open(f"{trained}/probe.json"))
    assert set(probe) - {"step", "chance"} == set(probe["chance"])
    tracking = json.load(open(f"{trained}/tracking.json"))
    assert tracking["step"] == 4 and "tracking_proposed" in tracking


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "wm.pt"
    train.save_checkpoint(path, {"step": 1})

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.torch, "save", full)
    with pytest.raises(data.DataError, match="No space left"):
        train.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_missing_data_says_how_to_make_it(tmp_path):
    with pytest.raises(SystemExit, match=r"data\.py pack"):
        train.main([*WM, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(("key", "value"), [("hz", 30), ("renderer", "egl"), ("frame", "tool")])
def test_data_of_another_kind_than_the_world_models_is_refused(key, value, trained, tmp_path):
    other, wm = tmp_path / "other", tmp_path / "wm.pt"
    write_packed(other)
    meta = json.loads((other / "meta.json").read_text()) | {key: value}
    (other / "meta.json").write_text(json.dumps(meta))
    os.link(f"{trained}/wm.pt", wm)
    with pytest.raises(SystemExit, match=rf"wm\.pt was trained on data with {key}"):
        train.main([*AGENT, "--data", str(other), "--out", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit, match=rf"wm\.pt was trained on data with {key}"):
        argv = ["predict", "--checkpoint", str(wm), "--data", str(other), "--out", str(tmp_path)]
        diagnostics.main(argv)


def test_an_unfinished_world_model_is_told(packed, tmp_path, capsys):
    common = ["--data", packed, "--out", str(tmp_path)]
    train.main([*WM, *common, "--steps", "1"])
    checkpoint = torch.load(tmp_path / "wm.pt", weights_only=True)
    checkpoint["run"]["steps"] = 2
    torch.save(checkpoint, tmp_path / "wm.pt")
    train.main([*AGENT, *common, "--steps", "1"])
    assert "wm.pt is of step 1; its training was not finished" in capsys.readouterr().out


def test_an_agent_does_not_go_on_in_another_world_model(packed, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "wm.pt", weights_only=True)
    checkpoint["model"]["gru.bias_hh"] += 0.01
    torch.save(checkpoint, tmp_path / "run" / "wm.pt")
    with pytest.raises(SystemExit, match="another world model"):
        train.main([*AGENT, "--data", packed, "--out", str(tmp_path / "run"), "--steps", "6"])


def test_latents_are_those_of_the_whole_episode(packed, trained):
    """The cache, made in parallel stretches, against one pass through each episode."""
    play = data.PlayData(packed, "training")
    checkpoint = train.load_checkpoint(f"{trained}/wm.pt", "wm", "cpu")
    world = train.load_world_model(checkpoint, "cpu")
    latents = data.Latents.open(play, train.identity(world.state_dict()))
    for start, end in play.episodes:
        batch = play.frames(np.arange(start, end)[:, None])
        # z is sampled: feed the cached one back, so that h must follow from it.
        h, z = world.initial(1)
        for t in range(end - start):
            keep = (~batch["reset"][t])[:, None].float()
            part = world.recurrent_in.inputs[1](batch["a_prev"][t])
            h = world.recurrent(h * keep, z * keep, part)
            assert torch.allclose(h, torch.tensor(latents.h[start + t]).float(), atol=2e-3)
            frame = latents.z[[start + t]], play.robot_obs[[start + t]]
            z = data.stored_z(world, *map(torch.from_numpy, frame))


def test_a_language_window_brings_its_sentence_and_a_reset_start_its_own_latents(packed, trained):
    play = data.PlayData(packed, "training")
    world = train.load_world_model(train.load_checkpoint(f"{trained}/wm.pt", "wm", "cpu"), "cpu")
    latents = data.Latents.open(play, train.identity(world.state_dict()))
    config = train.A.PRESETS["tiny"]
    batches = data.WindowBatches(play, latents, config, world, 0, "cpu")
    assert batches.language.rephrase == config.rephrase == True  # noqa: E712  [D30]
    batch = batches.batch(3, reset_start=1.0)
    T, B = config.sequence_length, config.batch_size
    assert batch["s_E"].shape == (T, B, world.config.latent) and batch["emb"].shape == (B // 2, 384)
    language = batches.language.batch(3)
    index = torch.cat([batches.play.batch(3)["index"], language["index"]], 1)
    # Without a reset, h anew is the cached one, as far as that is exact and the window goes.
    s, H = batches.batch(3, reset_start=0.0)["s_E"], world.config.deterministic
    real = torch.arange(T)[:, None] < batch["length"]
    assert torch.allclose(s[..., :H][real], torch.tensor(latents.h[index]).float()[real], atol=5e-3)
    # With one [D8], z is of one frame alone at first, and h has forgotten what was before.
    h = world.recurrent(
        *world.initial(1), world.recurrent_in.inputs[1](torch.tensor([train.A.NO_ACTION]))
    )[0]
    reset = latents.z_reset[index[0]], play.robot_obs[index[0]]
    z = [data.stored_z(world, *map(torch.from_numpy, reset)), *s[1:, :, H:]]
    h, held = h.expand(B, -1), None
    for t in range(T):
        held = torch.where((t < batch["length"])[:, None], h, h if held is None else held)
        assert torch.allclose(batch["s_E"][t], torch.cat([held, z[t]], -1), atol=1e-6)
        h = world.recurrent(h, z[t], world.recurrent_in.inputs[1](batch["a"][t]))
    spans = language["index"][0][:, None] >= torch.tensor(play.spans)[language["span"], :1]
    assert spans.all()


def test_bf16_products_give_the_losses_and_gradients_of_fp32(packed, trained, monkeypatch):
    """Every draw at its mean, so that no rounding turns into another sample."""
    monkeypatch.setattr(train.W, "sample_straight_through", lambda q, *_: q.softmax(-1).flatten(-2))
    monkeypatch.setattr(train.A.P, "sample_plan", lambda q: q.softmax(-1).flatten(-2))
    play = data.PlayData(packed, "training")
    world = train.load_world_model(train.load_checkpoint(f"{trained}/wm.pt", "wm", "cpu"), "cpu")
    latents = data.Latents.open(play, train.identity(world.state_dict()))
    config, sizes = train.A.PRESETS["tiny"], world.config
    practice = data.WindowBatches(play, latents, config, world, 0, "cpu").batch(0)
    agent = train.A.Agent(config, sizes.deterministic, sizes.latent).eval()  # no dropout
    sequences = data.Sequences(play, 4, 8, 0).batch(0)
    learner = train.W.WorldModel(sizes).eval()
    for module, losses in (
        (learner, lambda: learner.loss(sequences, learner.initial(4))[:1]),
        (agent, lambda: agent.losses(world, practice)[:2]),
    ):
        seen = []
        for bf16 in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                values = losses()
            assert all(x.dtype == torch.float32 for x in values)
            module.zero_grad(), sum(values).backward()
            gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            seen.append((torch.stack(values).detach(), torch.cat(gradients)))
        (loss, gradient), (loss_bf16, gradient_bf16) = seen
        assert not torch.equal(gradient, gradient_bf16), "bf16 was not used"
        assert torch.allclose(loss, loss_bf16, rtol=0.02)
        assert (gradient - gradient_bf16).norm() < 0.1 * gradient.norm()


def test_a_rounded_world_model_gives_the_same_losses_and_gradients_under_autocast(packed, trained):
    play = data.PlayData(packed, "training")
    world = train.load_world_model(train.load_checkpoint(f"{trained}/wm.pt", "wm", "cpu"), "cpu")
    latents = data.Latents.open(play, train.identity(world.state_dict()))
    config, sizes = train.A.PRESETS["tiny"], world.config
    batches = data.WindowBatches(play, latents, config, world, 0, "cpu")
    agent = train.A.Agent(config, sizes.deterministic, sizes.latent)
    seen = []
    for dynamics in (world, train.rounded(world)):
        torch.manual_seed(0)
        batches.world = dynamics
        with torch.autocast("cpu", torch.bfloat16):
            batch = batches.batch(0)
            actor, critic, _ = agent.losses(dynamics, batch)
        (actor + critic).backward()
        gradients = [p.grad for p in agent.parameters() if p.grad is not None]
        seen.append([batch["s_E"], actor, critic, *gradients])
        agent.zero_grad()
    assert len(seen[0]) == len(seen[1]) > 50 and all(map(torch.equal, *seen))
    assert batches.world.gru.weight_hh.dtype == torch.bfloat16
    assert world.gru.weight_hh.dtype == torch.float32, "the checkpoint's own model was changed"


def test_no_loss_waits_for_the_numbers_of_a_device(monkeypatch):
    """On `meta`, which has none, whatever reads a number fails; so a GPU is never waited for."""
    one_hot = lambda i, n: (i[..., None] == torch.arange(n, device=i.device)).long()
    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)  # reads them, but on CUDA
    config, c = train.W.PRESETS["tiny"], train.A.PRESETS["tiny"]
    world = train.W.WorldModel(config).to("meta")
    agent = train.A.Agent(c, world.config.deterministic, world.config.latent).to("meta")
    T, B, M = c.sequence_length, 4, 2
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    sequences = {f"rgb_{k}": empty(8, B, 64, 64, 3, dtype=torch.uint8) for k in world.encoders}
    sequences |= {"robot_obs": empty(8, B, 15), "a_prev": empty(8, B, 7)}
    sequences["reset"] = empty(8, B, dtype=torch.bool)
    windows = {"s_E": empty(T, B, world.config.latent), "a": empty(T, B, 7), "emb": empty(M, 384)}
    windows |= {"length": empty(B, dtype=torch.long), "align": empty(M, dtype=torch.bool)}
    world.loss(sequences, world.initial(B))[0].backward()
    sum(agent.losses(world.requires_grad_(False), windows)[:2]).backward()


def test_moments_of_another_memory_layout_stay_with_their_weights(packed, tmp_path):
    """Fused AdamW pairs weights and moments as they lie in memory, and asks nobody."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        common = ["--data", packed, "--out", str(tmp_path / str(layout)), "--steps"]
        train.main([*WM, *OFTEN, *common, "2"])
        path = tmp_path / str(layout) / "wm.pt"
        checkpoint = torch.load(path, weights_only=True)
        for state in checkpoint["optimizer"]["world"]["state"].values():
            for k in ("exp_avg", "exp_avg_sq"):
                if state[k].dim() == 4:
                    state[k] = state[k].contiguous(memory_format=layout)
        torch.save(checkpoint, path)
        train.main([*WM, *OFTEN, *common, "4"])
        ends.append(weights(path))
    assert all(torch.equal(x, ends[1][k]) for k, x in ends[0].items())


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(packed, tmp_path):
    """A run killed without warning goes on, and ends where an undisturbed one ends."""
    command = [sys.executable, str(train.__file__), *WM, "--validate_every", "1000",
               "--checkpoint_every", "2", "--data", packed, "--out", str(tmp_path)]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # or sums are rounded otherwise
    run = subprocess.Popen([*command, "--steps", "100000"], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | threads)  # fmt: skip
    for _ in range(1200):
        if (tmp_path / "wm.pt").exists() or run.poll() is not None:
            break
        time.sleep(0.05)
    run.kill()
    run.wait()
    load = lambda out: torch.load(out / "wm.pt", weights_only=True)
    steps = str(load(tmp_path)["step"] + 2)
    for out in (tmp_path, tmp_path / "undisturbed"):
        train.main([*WM, *OFTEN, "--data", packed, "--out", str(out), "--steps", steps])
    killed, undisturbed = load(tmp_path), load(tmp_path / "undisturbed")
    assert killed["step"] == undisturbed["step"] == int(steps)
    for name, x in killed["model"].items():
        assert torch.equal(x, undisturbed["model"][name]), name


def test_the_learning_rates_fall_in_the_last_part(packed, trained, tmp_path, monkeypatch):
    """[D7]: with --anneal 0.5 of 4 steps, the last two at a full and at half the rate."""
    rates, steps = [], {kind: kind.step for kind in (torch.optim.Adam, torch.optim.AdamW)}

    def spy(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return steps[type(optimizer)](optimizer, *args, **kwargs)

    for kind in steps:
        monkeypatch.setattr(kind, "step", spy)
    shutil.copy(f"{trained}/wm.pt", tmp_path / "wm.pt")
    options = [*AGENT, "--data", packed, "--out", str(tmp_path), "--actor_lr", "0.2"]
    train.main([*options, "--critic_lr", "1.0", "--anneal", "0.5", "--steps", "4"])
    options = [*WM, "--data", packed, "--out", str(tmp_path / "wm"), "--learning_rate", "1e-4"]
    train.main([*options, "--anneal", "0.5", "--steps", "4"])
    agent, world = [0.2, 1.0] * 3 + [0.1, 0.5], [1e-4] * 3 + [5e-5]
    assert rates[:12] == pytest.approx(agent + world)  # then come the probe's
