"""World model: Eqs. 1, 2, 7 and Table III; at the end, what preset sim has beside the paper."""

import itertools
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import plan
import world_model as W

SIZES = {"deterministic": 64, "categoricals": 8, "classes": 8, "hidden": 64, "depth": 4}
PAPER = W.WorldModelConfig(batch_size=8, sequence_length=16, **SIZES)
TINY = W.PRESETS["tiny"]
CELLS = replace(TINY, categoricals=32, spatial_latents=True)


@pytest.fixture(params=[PAPER, TINY], ids=["paper", "sim"])
def world(request):
    return W.make_world_model(request.param).eval()


def sequences(T=6, B=3):
    """The same batch at each call."""
    g = torch.Generator().manual_seed(0)
    static, gripper = torch.randint(0, 256, (2, T, B, 64, 64, 3), generator=g).byte()
    robot, a_prev = torch.randn(T, B, 15, generator=g), torch.rand(T, B, 7, generator=g) * 2 - 1
    batch = {"rgb_static": static, "rgb_gripper": gripper, "robot_obs": robot, "a_prev": a_prev}
    return batch | {"reset": torch.zeros(T, B, dtype=torch.bool)}


def drawn_alike(function, *arguments):
    """function of each argument, with the same random numbers."""
    results = []
    for argument in arguments:
        torch.manual_seed(0)
        results.append(function(argument))
    return results


def filtered(world):
    return lambda batch: world.filter(batch, world.initial(3))


def plain_kl(q, p):
    """torch's own, of each categorical."""
    return kl_divergence(Categorical(logits=q), Categorical(logits=p))


def test_config_equals_table_iii():
    table = [50, 50, 1024, 32, 32, 0.3, 0.8, 0.01, 3e-4, 100, 1e-5, 5e-2]
    values = [getattr(W.WorldModelConfig(), f.name) for f in fields(W.WorldModelConfig)]
    assert values[: len(table)] == table  # in the table's row order
    assert W.WorldModelConfig().latent == 2048  # its row k
    assert W.PRESETS["paper"] == W.WorldModelConfig()


def test_the_papers_model_has_forty_million_parameters_and_sees_cameras_only():
    count = sum(p.numel() for p in W.make_world_model(W.PRESETS["paper"]).parameters())
    assert 38e6 < count < 42e6
    world, batch = W.make_world_model(PAPER), sequences()
    del batch["robot_obs"]
    loss, terms, _ = world.loss(batch, world.initial(3))
    assert loss.isfinite() and set(terms) == {"x_static", "x_gripper", "kl", "loss"}


def test_eq1_prior_never_sees_the_image_but_the_posterior_does(world):
    a, b = sequences(), sequences()
    b["rgb_static"][-1] = 255 - b["rgb_static"][-1]
    (h, _, q), (h2, _, q2) = drawn_alike(filtered(world), a, b)
    assert torch.equal(h, h2) and torch.equal(world.prior(h), world.prior(h2))  # only the past
    assert torch.equal(q[:-1], q2[:-1]) and not torch.allclose(q[-1], q2[-1])


def test_eq1_the_action_before_a_step_enters_its_h(world):
    a, b = sequences(), sequences()
    b["a_prev"][3] *= -1
    (h, _, _), (h2, _, _) = drawn_alike(filtered(world), a, b)
    assert torch.equal(h[:3], h2[:3]) and not torch.allclose(h[3], h2[3])


def test_eq1_the_recurrent_state_is_a_gru_of_z_and_a_written_out(world):
    h, z, a = torch.randn(4, 64), torch.randn(4, world.config.stochastic), torch.randn(4, 7)
    head, gru = world.recurrent_in, world.gru
    both = torch.cat([head.inputs[0].weight, head.inputs[1].weight], 1)  # one layer on (z, a)
    x = torch.cat([z, a], 1) @ both.T + head.inputs[0].bias
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    x = F.elu(x * head.norm.weight + head.norm.bias)
    gi = (x @ gru.weight_ih.T + gru.bias_ih).chunk(3, -1)
    gh = (h @ gru.weight_hh.T + gru.bias_hh).chunk(3, -1)
    r, u = (gi[0] + gh[0]).sigmoid(), (gi[1] + gh[1]).sigmoid()
    expected = (1 - u) * (gi[2] + r * gh[2]).tanh() + u * h
    assert torch.allclose(world.recurrent(h, z, a), expected, atol=1e-5)


def test_a_state_carried_over_equals_one_long_sequence(world):
    def in_two(batch):
        h, z, _ = world.filter({k: x[:5] for k, x in batch.items()}, world.initial(3))
        rest = world.filter({k: x[5:] for k, x in batch.items()}, (h[-1], z[-1]))
        return torch.cat([h, rest[0]])

    batch = sequences(T=8)
    whole = drawn_alike(filtered(world), batch)[0][0]
    assert torch.allclose(drawn_alike(in_two, batch)[0], whole, atol=1e-5)


def test_a_reset_forgets_everything_before_it(world):
    batch = sequences(T=1)
    h, z = torch.randn(3, 64), torch.randn(3, world.config.stochastic)
    batch["reset"][0] = True
    a, b = (world.filter(batch, state)[0] for state in ((h, z), world.initial(3)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_zeta_resets_happen_in_training_only(training):
    world = W.make_world_model(replace(PAPER, zeta=1.0)).train(training)
    states = [(torch.randn(3, 64), torch.randn(3, 64)), world.initial(3)]
    ends = drawn_alike(lambda state: world.loss(sequences(), state)[2][0], *states)
    assert torch.equal(*ends) == training  # with ζ = 1 nothing is remembered


def test_eq2_is_half_squared_error_summed_plus_beta_times_kl():
    T, B = 2, 3
    x, y = ({k: torch.randn(T, B, 3, 64, 64) for k in W.CAMERAS} for _ in range(2))
    q, p = torch.randn(2, T, B, 4, 5)
    loss, _ = W.elbo_loss(x, y, q, p, beta=0.3, delta=0.8)
    expected = 0.0
    for t, b in itertools.product(range(T), range(B)):
        for k in x:
            expected += 0.5 * ((x[k][t, b] - y[k][t, b]) ** 2).sum() / (T * B)
        expected += 0.3 * plain_kl(q[t, b], p[t, b]).sum() / (T * B)
    assert torch.allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("kl_balanced", [W.kl_balanced, plan.kl_balanced])
def test_eq7_equals_plain_kl_with_gradients_scaled_by_delta(kl_balanced):
    q, p = (torch.randn(5, 4, 6, requires_grad=True) for _ in range(2))
    plain, balanced = plain_kl(q, p).sum(-1), kl_balanced(q, p, 0.8)
    assert torch.allclose(balanced, plain, atol=1e-5)
    dq, dp = torch.autograd.grad(plain.sum(), (q, p))
    bq, bp = torch.autograd.grad(balanced.sum(), (q, p))
    assert torch.allclose(bq, 0.2 * dq, atol=1e-5)  # [D1]: the posterior slowly,
    assert torch.allclose(bp, 0.8 * dp, atol=1e-5)  # the prior fast


@pytest.mark.parametrize("sample", [W.sample_straight_through, plan.sample_straight_through])
def test_samples_follow_the_probabilities_and_carry_their_gradient(sample):
    logits = torch.tensor([[[0.0, 1.0, 2.0]]]).expand(20000, 1, 3).clone().requires_grad_()
    z = sample(logits)
    assert set(z.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(z.mean(0), torch.tensor([0.0900, 0.2447, 0.6652]), atol=0.015)
    weights = torch.tensor([1.0, -2.0, 3.0])
    (gradient,) = torch.autograd.grad((z * weights).sum(), logits)
    (soft,) = torch.autograd.grad((logits.softmax(-1).flatten(-2) * weights).sum(), logits)
    assert torch.allclose(gradient, soft, atol=1e-6)


@pytest.mark.parametrize("kernel", [4, 5])
def test_the_decoders_first_layer_is_the_transposed_convolution_of_one_pixel(kernel):
    layer = torch.nn.ConvTranspose2d(6, 4, kernel, stride=2).double()
    x = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    results = W.one_pixel(x, layer), layer(x[..., None, None])
    assert torch.allclose(*results)
    inputs = (x, layer.weight, layer.bias)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    assert all(map(torch.allclose, *gradients))


def test_imagination_samples_the_prior_and_lets_gradients_reach_the_action(world):
    a = torch.zeros(3, 7, requires_grad=True)
    h, z = world.imagine_step(*world.initial(3), a)
    assert z.shape == (3, world.config.stochastic)
    assert torch.equal(z[:, :64].unflatten(-1, (8, 8)).sum(-1).round(), torch.ones(3, 8))
    for out in (h, z):
        (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), a, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_under_autocast_logits_are_not_rounded_to_bf16(world):
    layers = W.Float32Linear(64, 5), plan.Float32Linear(64, 5)
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(100, 64)
    with torch.autocast("cpu", torch.bfloat16):
        e = world.encode(world.see(sequences()))
        h = torch.randn(6, 3, 64)
        for logits in (world.prior(h), world.represent(h, e)[1], layers[0](x)):
            assert logits.dtype == torch.float32
            assert not torch.equal(logits, logits.bfloat16().float())
        assert torch.equal(layers[0](x), layers[1](x))  # the copy in plan.py
    assert torch.equal(layers[0](x), F.linear(x, layers[0].weight, layers[0].bias))


def test_images_survive_the_way_in_and_out_and_wrong_ones_are_refused():
    x = sequences()["rgb_static"]
    assert torch.equal(W.to_uint8(W.to_float(x)), x)
    assert W.to_float(x).min() >= -1 and W.to_float(x).max() <= 1
    with pytest.raises(ValueError, match="uint8"):
        W.to_float(x.float())
    with pytest.raises(ValueError, match="resize_area"):
        W.to_float(torch.zeros(1, 200, 200, 3, dtype=torch.uint8))


def test_a_latent_comes_back_from_its_classes(world):
    batch = sequences()
    h, z, _ = world.filter(batch, world.initial(3))
    classes = world.classes_of(z)
    assert classes.shape == (6, 3, 8) and classes.dtype == torch.uint8
    assert torch.allclose(world.latent_z(classes, batch["robot_obs"]), z, atol=1e-6)
    assert all(map(torch.equal, world.split(torch.cat([h, z], -1)), (h, z)))


@pytest.mark.parametrize("config", [PAPER, TINY, CELLS])
def test_it_learns_one_batch(config):
    world, batch = W.make_world_model(config).train(), sequences(T=4, B=2)
    for k in ("rgb_static", "rgb_gripper"):  # grey pictures, each of its own brightness
        grey = (batch[k][:, :, :1, :1, :1].float() * 0.5 + 64).to(torch.uint8)
        batch[k] = grey.expand(4, 2, 64, 64, 3)
    optimizer = torch.optim.AdamW(world.parameters(), 3e-3, eps=1e-5)
    first = world.loss(batch, world.initial(2))[0]
    for _ in range(60):
        loss, _, _ = world.loss(batch, world.initial(2))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.3 * first


def test_prediction_sees_only_the_context_and_the_actions(world):
    a, b = sequences(T=8), sequences(T=8)
    for k in ("rgb_static", "rgb_gripper"):
        b[k][4:] = 255 - b[k][4:]
    both = drawn_alike(lambda batch: world.predict(batch, context=4), a, b)
    (seen, unseen), (seen_b, unseen_b) = both
    for k in W.CAMERAS:
        assert unseen[k].shape == (8, 3, 64, 64, 3) and unseen[k].dtype == torch.uint8
        assert torch.equal(unseen[k][:4], seen[k][:4])
        assert not torch.equal(seen[k][4:], seen_b[k][4:])
        assert torch.equal(unseen[k], unseen_b[k])  # as many numbers drawn, and the same


# ---------------------------------------------------------------------------- preset sim's
def test_the_published_world_model_fits_preset_sim():
    assets = Path(W.__file__).parent / "assets"
    published = torch.load(assets / "sim.pt", weights_only=True)["world_model"]["model"]
    W.make_world_model(W.PRESETS["sim"]).load_state_dict(published)


def test_the_arms_pose_is_part_of_z_and_its_motion_is_predicted():
    """[D5] With a prior that says `it stays`, -log p is half the squared motion, in σ."""
    world, T, B = W.make_world_model(TINY).eval(), 3, 2
    world.set_statistics(torch.ones(15), torch.full((15,), 2.0))
    torch.nn.init.zeros_(world.motion.weight)
    batch = sequences(T, B) | {"robot_obs": torch.ones(T, B, 15)}

    def term():
        return float(world.loss(batch, world.initial(B))[1]["x_robot"])

    assert term() == 0
    batch["robot_obs"][..., 3:6] = torch.randn(T, B, 3)  # euler angles
    assert term() == 0
    batch["robot_obs"][2, 0, 9] = 1.06  # a σ: 0.03 deviations of 2.0
    assert abs(term() - 0.5 / 4) < 1e-4  # in one of four steps
    batch["reset"][2, 0] = True  # nobody knows from where it came
    assert term() == 0

    h, z, _ = world.filter(batch, world.initial(B))
    assert torch.allclose(z[2, 0, -11:], torch.tensor([0.0] * 6 + [0.03] + [0.0] * 4), atol=1e-5)
    torch.nn.init.constant_(world.motion.bias, 0.5)
    _, z_1 = world.imagine_step(h[2], z[2], torch.zeros(B, 7))
    assert torch.allclose(z_1[:, -11:], z[2, :, -11:] + 0.5, atol=1e-5)


def test_every_nth_frame_estimates_the_reconstruction_without_bias(monkeypatch):
    """[D25]: the n equally likely choices of decoded frames average to Eq. 2 over all of them;
    validation decodes all."""
    world, batch, n = W.make_world_model(TINY), sequences(T=16, B=2), 4
    starts = iter(range(n))
    monkeypatch.setattr(W.torch, "randint", lambda *_, **__: torch.tensor(next(starts)))

    def loss(every):
        world.config = replace(TINY, decode_every=every)
        return world.loss(batch, world.initial(2))[0]

    *some, everything = drawn_alike(loss, n, n, n, n, 1)
    assert torch.allclose(sum(some) / n, everything, rtol=1e-5)
    world.eval()
    assert torch.equal(*drawn_alike(loss, n, 1))


def test_a_cell_has_its_own_way_into_and_out_of_its_own_categorical():
    """[D5]: without the heads on the whole image, a cell moves its categorical and its patch most
    (the mean over worlds with other weights: neighbours' convolutions overlap), and none afar."""
    row, column = 3, 1  # of 4 x 4; the middle of its 16 x 16 pixels changes
    batch, other = sequences(T=1, B=1), sequences(T=1, B=1)
    other["rgb_gripper"][:, :, 55:57, 23:25] ^= 255
    cell = 16 + 4 * row + column  # the static camera's 16 come first
    classes = torch.zeros(2, 1, 1, 32, dtype=torch.long)
    classes[1, ..., cell] = 1
    moved, patches = 0, 0
    for _ in range(20):
        world = W.make_world_model(CELLS).eval().requires_grad_(False)
        torch.nn.init.zeros_(world.posterior_head.out.weight)
        torch.nn.init.zeros_(world.decoder_in.weight)
        q, q2 = (world.filter(b, world.initial(1))[2][0, 0] for b in (batch, other))
        moved = moved + (q - q2).abs().sum(-1)
        latents = [world.latent_z(x, torch.zeros(1, 1, 15)) for x in classes]
        a, b = (world.decode(torch.zeros(1, 1, 64), z) for z in latents)
        assert torch.equal(a["static"], b["static"])
        change = (a["gripper"] - b["gripper"]).abs().sum(2)[0, 0]
        patches = patches + change.unflatten(0, (4, 16)).unflatten(2, (4, 16)).sum((1, 3))
    assert moved.argmax() == cell and (moved[:16] == 0).all()
    assert patches.argmax() == 4 * row + column
    assert (patches[:2] == 0).all() and (patches[:, 3] == 0).all()


def test_numbers_that_do_not_fit_together_are_refused():
    wrong = {"categoricals": 8, "classes": 300, "decode_every": 3}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            W.make_world_model(replace(CELLS, **{name: value}))
    with pytest.raises(ValueError, match="cannot carry the state on"):
        W.make_world_model(replace(CELLS, length_curriculum=2))
