"""World model: Eqs. 1, 2, 7 and Table III."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

import plan
import world_model as W

TINY = W.PRESETS["tiny"]


CELLS = replace(TINY, categoricals=32, cells=True)  # [D27]


@pytest.fixture
def world():
    return W.WorldModel(TINY).eval()


def sequences(T=6, B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = lambda: torch.randint(0, 256, (T, B, 64, 64, 3), dtype=torch.uint8, generator=g)
    return {
        "rgb_static": images(),
        "rgb_gripper": images(),
        "robot_obs": torch.randn(T, B, 15, generator=g),
        "a_prev": torch.rand(T, B, 7, generator=g) * 2 - 1,
        "reset": torch.zeros(T, B, dtype=torch.bool),
    }


def test_config_equals_table_iii():
    table = [50, 50, 1024, 32, 32, 0.3, 0.8, 0.01, 3e-4, 100, 1e-5, 5e-2]
    values = [getattr(W.WorldModelConfig(), f.name) for f in fields(W.WorldModelConfig)]
    assert values[: len(table)] == table  # in the table's row order
    assert W.WorldModelConfig().latent == 2048  # its row k


def test_paper_size_is_about_forty_million_parameters():
    count = sum(p.numel() for p in W.WorldModel(W.PRESETS["paper"]).parameters())
    assert 38e6 < count < 42e6


def test_eq1_prior_never_sees_the_image_but_the_posterior_does(world):
    a, b = sequences(), sequences()
    b["rgb_static"][-1] = 255 - b["rgb_static"][-1]
    outs = []
    for batch in (a, b):
        torch.manual_seed(0)
        h, _, q = world.filter(batch, world.initial(3))
        outs.append((h, q, world.prior(h)))
    (h, q, p), (h2, q2, p2) = outs
    assert torch.equal(h, h2) and torch.equal(p, p2)  # h_t and ẑ_t: only the past
    assert torch.equal(q[:-1], q2[:-1]) and not torch.allclose(q[-1], q2[-1])


def test_eq1_the_action_before_a_step_enters_its_h(world):
    a, b = sequences(), sequences()
    b["a_prev"][3] *= -1
    hs = []
    for batch in (a, b):
        torch.manual_seed(0)
        hs.append(world.filter(batch, world.initial(3))[0])
    assert torch.equal(hs[0][:3], hs[1][:3]) and not torch.allclose(hs[0][3], hs[1][3])


def test_eq1_the_recurrent_state_is_a_gru_of_z_and_a_written_out(world):
    h, z, a = torch.randn(4, 64), torch.randn(4, TINY.stochastic), torch.randn(4, 7)
    head = world.recurrent_in
    both = torch.cat([head.inputs[0].weight, head.inputs[1].weight], 1)  # one layer on (z, a)
    x = torch.cat([z, a], 1) @ both.T + head.inputs[0].bias
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    x = F.elu(x * head.norm.weight + head.norm.bias)
    gi = (x @ world.gru.weight_ih.T + world.gru.bias_ih).chunk(3, -1)
    gh = (h @ world.gru.weight_hh.T + world.gru.bias_hh).chunk(3, -1)
    r, u = (gi[0] + gh[0]).sigmoid(), (gi[1] + gh[1]).sigmoid()
    expected = (1 - u) * (gi[2] + r * gh[2]).tanh() + u * h
    got = world.recurrent(h, z, head.inputs[1](a))
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_reset_forgets_everything_before_it(world):
    a, b = sequences(seed=1), sequences(seed=2)
    for k in a:
        b[k][3:] = a[k][3:]
    a["reset"][3], b["reset"][3] = True, True
    outs = []
    for batch in (a, b):
        torch.manual_seed(0)
        h, _, q = world.filter(batch, world.initial(3))
        outs.append((h[3:], q[3:]))
    assert torch.equal(outs[0][0][0], outs[1][0][0]) and torch.equal(outs[0][1][0], outs[1][1][0])


def test_a_state_carried_over_equals_one_long_sequence(world):
    batch = sequences(T=8)
    torch.manual_seed(0)
    h, _, _ = world.filter(batch, world.initial(3))
    torch.manual_seed(0)
    first = {k: x[:5] for k, x in batch.items()}
    h1, z1, _ = world.filter(first, world.initial(3))
    h2, _, _ = world.filter({k: x[5:] for k, x in batch.items()}, (h1[-1], z1[-1]))
    assert torch.allclose(torch.cat([h1, h2]), h, atol=1e-5)


def test_eq2_is_half_squared_error_summed_plus_beta_times_kl():
    T, B = 2, 3
    x = {k: torch.randn(T, B, 3, 64, 64) for k in ("static", "gripper")}
    y = {k: torch.randn(T, B, 3, 64, 64) for k in ("static", "gripper")}
    q, p = torch.randn(T, B, 4, 5), torch.randn(T, B, 4, 5)
    loss, terms = W.elbo_loss(x, y, q, p, beta=0.3, delta=0.8)
    categorical = lambda logits: torch.distributions.Categorical(logits=logits)
    expected = 0.0
    for t in range(T):
        for b in range(B):
            for k in x:
                expected += 0.5 * ((x[k][t, b] - y[k][t, b]) ** 2).sum() / (T * B)
            kl = torch.distributions.kl_divergence(categorical(q[t, b]), categorical(p[t, b]))
            expected += 0.3 * kl.sum() / (T * B)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert set(terms) == {"x_static", "x_gripper", "kl", "loss"}


def test_proprioception_is_part_of_z_and_its_motion_is_predicted():
    """[D5] With a prior that says `it stays`, -log p is half the squared motion, in σ."""
    world = W.WorldModel(W.PRESETS["tiny"]).eval()
    world.robot_mean += 1.0
    world.robot_std *= 2.0
    torch.nn.init.zeros_(world.motion.weight)
    T, B = 3, 2
    batch = {f"rgb_{k}": torch.zeros(T, B, 64, 64, 3, dtype=torch.uint8) for k in world.encoders}
    batch |= {"a_prev": torch.zeros(T, B, 7), "reset": torch.zeros(T, B).bool()}
    batch["robot_obs"] = torch.ones(T, B, 15)
    term = lambda: float(world.loss(batch, world.initial(B))[1]["x_robot"])
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
    """[D19]: the n equally likely choices of decoded frames average to Eq. 2 over all of them."""
    T, B, n = 16, 2, 4
    world = W.WorldModel(replace(W.PRESETS["tiny"], decode_every=n))
    images = {f"rgb_{k}": torch.randint(256, (T, B, 64, 64, 3)).byte() for k in world.encoders}
    batch = images | {"a_prev": torch.randn(T, B, 7), "reset": torch.zeros(T, B).bool()}
    batch["robot_obs"] = torch.randn(T, B, 15)

    def loss(start):
        monkeypatch.setattr(W.torch, "randint", lambda high, *_, **__: torch.tensor(start % high))
        torch.manual_seed(0)  # the same samples of z
        return world.loss(batch, world.initial(B))[0]

    mean = sum(loss(start) for start in range(n)) / n
    world.config = replace(world.config, decode_every=1)
    assert torch.allclose(mean, loss(0), rtol=1e-5)


@pytest.mark.parametrize("kl_balanced", [W.kl_balanced, plan.kl_balanced])
def test_eq7_equals_plain_kl_with_gradients_scaled_by_delta(kl_balanced):
    q = torch.randn(5, 4, 6, requires_grad=True)
    p = torch.randn(5, 4, 6, requires_grad=True)
    plain = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=q), torch.distributions.Categorical(logits=p)
    ).sum(-1)
    balanced = kl_balanced(q, p, 0.8)
    assert torch.allclose(balanced, plain, atol=1e-5)
    dq, dp = torch.autograd.grad(plain.sum(), (q, p))
    bq, bp = torch.autograd.grad(balanced.sum(), (q, p))
    assert torch.allclose(bq, 0.2 * dq, atol=1e-5)  # [D1]: the posterior slowly,
    assert torch.allclose(bp, 0.8 * dp, atol=1e-5)  # the prior fast


def test_samples_follow_the_probabilities_and_carry_their_gradient():
    logits = torch.tensor([[[0.0, 1.0, 2.0]]]).expand(20000, 1, 3).clone().requires_grad_()
    z = W.sample_straight_through(logits)
    frequency = z.detach().mean(0)
    assert set(z.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(frequency, torch.tensor([0.0900, 0.2447, 0.6652]), atol=0.015)
    weights = torch.tensor([1.0, -2.0, 3.0])
    (z * weights).sum().backward()
    soft = logits.detach().clone().requires_grad_()
    (soft.softmax(-1).flatten(-2) * weights).sum().backward()
    assert torch.allclose(logits.grad, soft.grad, atol=1e-6)
    mean = W.sample_straight_through(logits, softness=1.0)  # [D25]
    assert torch.allclose(mean, logits.softmax(-1).flatten(-2))
    halfway = W.sample_straight_through(logits, softness=0.5).mean(0)
    assert torch.allclose(halfway, mean[0], atol=0.015)


def test_imagination_and_evaluation_never_soften_their_samples(world):
    """[D25] is for the posterior while training; the agent is trained on one-hot latents."""
    world.softness.fill_(0.5)
    h, z = world.initial(2)
    one_hot = lambda z: set(z[..., :64].detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert one_hot(world.imagine_step(h, z, torch.zeros(2, 7))[1])
    x = torch.zeros(3, 2, world.posterior_head.inputs[1].in_features)
    observe = lambda: world.observe(x, torch.zeros(3, 2, 7), torch.zeros(3, 2) > 0, (h, z))[1]
    assert one_hot(observe())
    world.train()
    assert not one_hot(observe())


@pytest.mark.parametrize("kernel", [4, 5])
def test_the_decoders_first_layer_is_the_transposed_convolution_of_one_pixel(kernel):
    layer = torch.nn.ConvTranspose2d(6, 4, kernel, stride=2).double()
    x = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    fast, plain = W.one_pixel(x, layer), layer(x[..., None, None])
    assert torch.allclose(fast, plain)
    for a, b in zip(
        torch.autograd.grad(fast.square().sum(), (x, layer.weight, layer.bias)),
        torch.autograd.grad(plain.square().sum(), (x, layer.weight, layer.bias)),
        strict=True,
    ):
        assert torch.allclose(a, b)


def test_a_cell_has_its_own_way_into_and_out_of_its_own_categorical():
    """[D27]: without the heads on the whole image, a cell moves its categorical and its patch most
    (the mean over worlds with other weights: neighbours' convolutions overlap), and none afar."""
    batch = sequences(T=1, B=1)
    other = {k: x.clone() for k, x in batch.items()}
    row, column = 3, 1  # of 4 x 4; its 16 x 16 pixels are seen by neighbours too, others' are not
    pixels = slice(16 * row + 7, 16 * row + 9), slice(16 * column + 7, 16 * column + 9)
    other["rgb_gripper"][:, :, pixels[0], pixels[1]] ^= 255
    cell = 16 + 4 * row + column  # the static camera's 16 come first
    z = F.one_hot(torch.zeros(32, dtype=torch.long), 8).float()
    z2 = z.clone()
    z2[cell] = z2[cell].roll(1)
    moved, patches = 0, 0
    for _ in range(20):
        world = W.WorldModel(CELLS).eval().requires_grad_(False)
        torch.nn.init.zeros_(world.posterior_head.out.weight)
        torch.nn.init.zeros_(world.decoder_in.weight)
        q, q2 = (world.filter(b, world.initial(1))[2][0, 0] for b in (batch, other))
        moved = moved + (q - q2).abs().sum(-1)
        s = [
            torch.cat([torch.zeros(64), x.flatten(), torch.zeros(11)])[None, None] for x in (z, z2)
        ]
        images, images2 = (world.decode(x) for x in s)
        assert torch.equal(images["static"], images2["static"])
        change = (images["gripper"] - images2["gripper"]).abs().sum(2)[0, 0]
        patches = patches + change.unflatten(0, (4, 16)).unflatten(2, (4, 16)).sum((1, 3))
    assert moved.argmax() == cell and (moved[:16] == 0).all()
    assert patches.argmax() == 4 * row + column
    far = [r * 4 + c for r in range(4) for c in range(4) if max(abs(r - row), abs(c - column)) > 1]
    assert (patches.flatten()[far] == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"categoricals": 8}, "32 categoricals"),
        ({"classes": 300}, "256"),
        ({"decode_every": 3}, "decode_every"),
        ({"shorter": 2}, "shorter"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        W.WorldModel(replace(CELLS, **change))


def test_imagination_samples_the_prior_and_lets_gradients_reach_the_action(world):
    h, z = world.initial(3)
    a = torch.zeros(3, 7, requires_grad=True)
    h1, z1 = world.imagine_step(h, z, a)
    assert z1.shape == (3, TINY.stochastic)
    assert torch.equal(z1[:, :64].unflatten(-1, (8, 8)).sum(-1).round(), torch.ones(3, 8))
    for out in (h1, z1):
        gradient = torch.autograd.grad((out * torch.randn_like(out)).sum(), a, retain_graph=True)[0]
        assert gradient.abs().sum() > 0


def test_zeta_resets_happen_in_training_only():
    world = W.WorldModel(replace(TINY, zeta=1.0))
    batch = sequences()
    state = (torch.randn(3, 64), torch.randn(3, TINY.stochastic))
    ends = []
    for mode in (True, False):
        for start in (state, world.initial(3)):
            torch.manual_seed(0)
            ends.append(world.train(mode).loss(batch, start)[2][0])
    assert torch.equal(ends[0], ends[1])  # with ζ = 1 nothing is remembered
    assert not torch.equal(ends[2], ends[3])


def test_images_survive_the_way_in_and_out_and_wrong_ones_are_refused():
    x = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(W.to_uint8(W.to_float(x)), x)
    assert W.to_float(x).min() >= -1 and W.to_float(x).max() <= 1
    with pytest.raises(ValueError, match="uint8"):
        W.to_float(x.float())
    with pytest.raises(ValueError, match="resize_area"):
        W.to_float(torch.zeros(1, 200, 200, 3, dtype=torch.uint8))


@pytest.mark.parametrize("config", [TINY, CELLS])
def test_it_learns_one_batch(config):
    world = W.WorldModel(config).train()
    batch = sequences(T=4, B=2)
    # Something to learn: a grey picture whose brightness is told by nothing but the picture.
    for k in ("rgb_static", "rgb_gripper"):
        batch[k] = (
            (batch[k][:, :, :1, :1, :1].float() * 0.5 + 64).to(torch.uint8).expand(4, 2, 64, 64, 3)
        )
    optimizer = torch.optim.AdamW(world.parameters(), 3e-3, eps=1e-5)
    losses = []
    for _ in range(60):
        loss, _, _ = world.loss(batch, world.initial(2))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_prediction_sees_only_the_context_and_the_actions(world):
    a, b = sequences(T=8), sequences(T=8)
    for k in ("rgb_static", "rgb_gripper"):
        b[k][4:] = 255 - b[k][4:]
    outs = []
    for batch in (a, b):
        torch.manual_seed(0)
        outs.append(world.predict(batch, context=4))
    (seen, unseen), (seen_b, unseen_b) = outs
    for k in ("static", "gripper"):
        assert unseen[k].shape == (8, 3, 64, 64, 3) and unseen[k].dtype == torch.uint8
        assert torch.equal(unseen[k][:4], seen[k][:4])
        assert not torch.equal(seen[k][4:], seen_b[k][4:])
        assert torch.equal(unseen[k], unseen_b[k])  # as many numbers drawn, and the same
