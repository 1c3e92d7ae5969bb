"""GCBC, MCIL and HULC: App. C's images, HULC's loss, and what the three switches change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from scipy.stats import logistic
from torch.distributions import OneHotCategorical, kl_divergence

import baselines as B
import plan as P

TINY = {name: replace(B.PRESETS["tiny"], **switches) for name, switches in B.METHODS.items()}


def windows(c: B.BaselineConfig, n: int, device: str = "cpu") -> list[dict]:
    """n play windows and n language windows of frames in one colour, no two alike."""
    T, batches = c.sequence_length, []
    for _ in range(2):
        images = torch.randint(0, 256, (2, T, n, 1, 1, 3), dtype=torch.uint8)
        a = torch.rand(T, n, 7) * 2 - 1
        a[..., 6] = a[..., 6].sign()
        frames = images.expand(-1, -1, -1, 64, 64, -1)
        batches.append({"a": a} | dict(zip(B.CAMERAS, frames, strict=True)))
    batches[1] |= {"emb": torch.randn(n, 384), "align": torch.ones(n, dtype=torch.bool)}
    return [{k: x.to(device) for k, x in batch.items()} for batch in batches]


# ---------------------------------------------------------------------------- actions
def test_the_mixtures_log_likelihood_matches_a_slow_loop_over_scipys_logistic():
    N, D, M, classes = 40, 6, 10, 10
    a = (torch.rand(N, D) * 2.4 - 1.2).clamp(-1, 1)  # some in the outermost classes
    logits, mean, log_s = torch.randn(N, D, M), torch.randn(N, D, M), torch.randn(N, D, M) - 1
    expected = np.zeros(N)
    for n, d in np.ndindex(N, D):
        components = logistic(mean[n, d].double().numpy(), log_s[n, d].double().exp().numpy())
        low = 0.0 if a[n, d] == -1 else components.cdf(float(a[n, d]) - 1 / (classes - 1))
        high = 1.0 if a[n, d] == 1 else components.cdf(float(a[n, d]) + 1 / (classes - 1))
        expected[n] += np.log(softmax(logits[n, d].numpy()) @ (high - low))
    assert (a.abs() == 1).any() and (a.abs() < 1).any()
    np.testing.assert_allclose(B.log_likelihood(a, logits, mean, log_s, 10), expected, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 10, 256])
def test_the_probabilities_of_all_classes_sum_to_one(classes):
    centres = torch.linspace(-1, 1, classes, dtype=torch.float64)[:, None]
    mixture = torch.randn(3, 1, 1, 10, dtype=torch.float64).expand(-1, classes, -1, -1)
    assert abs(B.log_likelihood(centres, *mixture, classes).exp().sum() - 1) < 1e-9


def test_far_from_every_component_log_likelihood_and_gradient_stay_finite():
    mean = torch.tensor([[[50.0]]], requires_grad=True)
    log_p = B.log_likelihood(torch.tensor([[0.1]]), mean * 0, mean, torch.full((1, 1, 1), -7.0), 10)
    log_p.sum().backward()
    assert -1e6 < log_p < -1e4 and -1e4 < mean.grad < 0  # 50 away at a scale of 1/1097


def test_sampled_actions_have_the_mixtures_distribution_between_the_bounds():
    mixture = torch.tensor([[[0.2, 1.0]], [[-0.5, 0.6]], [[-2.0, -1.5]]])[:, None]
    sample = B.sample_mixture(*mixture.expand(-1, 50_000, -1, -1))
    centres = torch.linspace(-1, 1, 10)[:, None]
    share = ((sample - centres.T).abs() < 1 / 9).float().mean(0)
    log_p = B.log_likelihood(centres, *mixture.expand(-1, 10, -1, -1), 10)
    assert torch.allclose(share, log_p.exp(), atol=0.01)
    assert sample.abs().max() == 1  # clipped


# ---------------------------------------------------------------------------- images
def test_shifts_move_by_their_pixels_as_bilinear_interpolation_does_and_zero_changes_nothing():
    images = torch.randint(0, 256, (49, 64, 64, 3), dtype=torch.uint8)
    offset = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    got, x = B.shifted(images, offset), images.permute(0, 3, 1, 2).float()
    move = torch.cat([torch.eye(2).expand(49, 2, 2), -offset[:, :, None] * 2 / 64], -1)
    grid = F.affine_grid(move, x.shape, align_corners=False)
    bilinear = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(got.permute(0, 3, 1, 2).float(), bilinear, atol=0.01)
    assert torch.equal(got[24], images[24]) and offset[24].eq(0).all()
    assert torch.equal(got[47, 2:, 3:], images[47, :-2, :-3])  # 3 to the right, 2 down


def test_training_shifts_every_image_by_at_most_3_pixels_and_run_time_none(monkeypatch):
    seen, shifted = [], B.shifted
    monkeypatch.setattr(B, "shifted", lambda x, by: seen.append(by) or shifted(x, by))
    model = B.Baseline(TINY["gcbc"])
    model.encode(windows(model.config, 40)[0])
    assert set(seen[0].unique().tolist()) == set(range(-3, 4)) and not torch.equal(*seen)
    model.eval().encode(windows(model.config, 2)[0])
    assert len(seen) == 2


def test_app_c_leaves_maps_of_7_by_7_and_the_static_camera_gives_their_mean_position():
    encoder, heads = B.CameraEncoder(4, 16, 8, spatial_softmax=True), []
    maps = torch.full_like(encoder.convolutions(torch.zeros(1, 3, 64, 64)), -1e4)
    assert maps.shape == (1, 8, 7, 7)
    maps[0, :, 1, 5] = 0  # row 1 and column 5 of 7, on a grid from -1 to 1
    encoder.convolutions.forward = lambda x: maps
    encoder.head.register_forward_pre_hook(lambda module, x: heads.append(x[0]))
    encoder(torch.zeros(1, 64, 64, 3))
    assert torch.allclose(heads[0], torch.tensor([2 / 3] * 8 + [-2 / 3] * 8), atol=1e-6)


# ---------------------------------------------------------------------------- plans
def test_the_gaussian_kl_matches_the_closed_form_and_its_plan_is_reparameterised():
    model, q, p = B.Baseline(TINY["mcil"]), *torch.randn(2, 5, 2, 16)
    s_q, s_p = (F.softplus(x[:, 1]) + 1e-4 for x in (q, p))
    expected = (s_p / s_q).log() + (s_q**2 + (q - p)[:, 0] ** 2) / (2 * s_p**2) - 0.5
    assert torch.allclose(model.plan_kl(q, p), expected.sum(-1), rtol=1e-4)
    q.requires_grad_()
    model.sample_plan(q).sum().backward()
    assert torch.equal(q.grad[:, 0], torch.ones(5, 16))


def test_hulcs_plan_and_alignment_losses_are_plan_pys_and_plays_goal_is_the_last_image():
    model = B.Baseline(TINY["hulc"]).eval()
    assert isinstance(model.recognition, P.PlanRecognition)
    (play, language), ends = windows(model.config, 3), []
    model.goal_image.register_forward_pre_hook(lambda module, x: ends.append(x[0]))
    _, figures = model.loss(play, language)
    V = torch.cat([model.encode(play), model.encode(language)], 1)
    g = torch.cat([model.goal_image(V[-1, :3]), model.goal_language(language["emb"])])
    assert torch.allclose(*ends)
    (q, features), p = model.recognition(V), model.proposal(V[0], g)
    assert torch.allclose(figures["plan_kl"], P.kl_balanced(q, p, 0.8).mean())
    contrast, _ = model.alignment(features[3:], g[3:], language["align"])
    assert torch.allclose(figures["contrast"], contrast)
    forward = kl_divergence(OneHotCategorical(logits=q), OneHotCategorical(logits=p.detach()))
    backward = kl_divergence(OneHotCategorical(logits=q.detach()), OneHotCategorical(logits=p))
    expected = (0.2 * forward + 0.8 * backward).sum(-1)
    gradients = [torch.autograd.grad(x.sum(), p)[0] for x in (expected, model.plan_kl(q, p))]
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("name", TINY)
def test_the_loss_adds_its_terms_with_hulcs_weights_and_reaches_every_parameter(name):
    """GCBC has no plan; only HULC aligns."""
    model = B.Baseline(TINY[name])
    plan, alignment = {"recognition", "proposal"}, {"alignment"}
    expected = {"gcbc": set(), "mcil": plan, "hulc": plan | alignment}[name]
    assert dict(model.named_children()).keys() & (plan | alignment) == expected
    loss, f = model.loss(*windows(model.config, 3))
    actions = f["arm_nll"] + f["gripper_nll"]
    assert torch.allclose(loss, actions + 0.01 * f["plan_kl"] + 3 * f["contrast"])
    assert (f["plan_kl"] > 0) == (name != "gcbc") and (f["contrast"] > 0) == (name == "hulc")
    loss.backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


def test_both_recognitions_see_the_whole_window():
    V = torch.randn(8, 1, 64, requires_grad=True)
    for name in ("mcil", "hulc"):
        recognition = B.Baseline(TINY[name]).eval().recognition
        (gradient,) = torch.autograd.grad(recognition(V)[0].square().sum(), V)
        assert (gradient.abs().amax((1, 2)) > 1e-6).all()
    birnn = B.Baseline(TINY["mcil"]).recognition  # forwards to the end, backwards to the start
    ends = torch.cat([birnn.rnn(V)[0][-1, :, :64], birnn.rnn(V)[0][0, :, 64:]], -1)
    assert torch.equal(birnn(V)[1], ends)


def test_the_decoder_sees_past_goal_and_plan_but_no_future_and_bounds_its_scales():
    model = B.Baseline(TINY["hulc"])
    V, g, plan = (torch.randn(*n, requires_grad=True) for n in ((8, 1, 64), (1, 32), (1, 64)))
    torch.nn.init.constant_(model.decoder.arm.bias[120:], -50)
    (_, mean, log_s), _, _ = model.decoder(V, g, plan)
    assert (log_s == -7).all()
    mean[4].square().sum().backward()
    assert (V.grad.abs().amax((1, 2)) > 0).tolist() == [True] * 5 + [False] * 3
    assert g.grad.any() and plan.grad.any()


@pytest.mark.parametrize("name, value", [("plan", "vq"), ("recognition", "none"), ("features", 20)])
def test_switches_that_do_not_exist_or_contradict_each_other_are_errors(name, value):
    with pytest.raises(ValueError, match=name):
        B.Baseline(replace(TINY["hulc"], **{name: value}))


def test_the_papers_sizes_are_hulcs():
    """App. B: "approximately 15 million parameters" in the action decoder."""
    with torch.device("meta"):
        model = B.Baseline(B.PRESETS["paper"])
    assert round(sum(p.numel() for p in model.decoder.parameters()) / 1e6) == 15
    for encoder in model.encoders.values():  # App. C: kernels 4, 2, 2, all of stride 2
        kernels = [(*m.kernel_size, *m.stride) for m in encoder.convolutions[::2]]
        assert kernels == [(4, 4, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2)]


# ---------------------------------------------------------------------------- training, acting
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_overfits_one_batch(name):
    """-log p(a) of the arm, about 18 at first, halves within 120 steps."""
    model = B.Baseline(replace(TINY[name], shift=0))
    batch, optimizer = windows(model.config, 2), torch.optim.Adam(model.parameters(), 2e-3)
    first = model.loss(*batch)[1]["arm_nll"]
    for _ in range(120):
        loss, figures = model.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 10 < first < 25 and figures["arm_nll"] < 0.5 * first


def test_no_loss_waits_for_the_numbers_of_a_device(monkeypatch):
    """On `meta`, which has none, whatever reads a number fails; one_hot does, but not on CUDA."""
    monkeypatch.setattr(F, "one_hot", lambda i, n: i[..., None] == i.new_tensor(range(n)))
    for c in TINY.values():
        B.Baseline(c).to("meta").loss(*windows(c, 2, "meta"))[0].backward()


@pytest.mark.parametrize("name", TINY)
def test_the_policy_acts_legally_replans_in_time_and_remembers_nothing_longer(name):
    policy = B.BaselinePolicy(B.Baseline(TINY[name]), skip=2, replan=3)
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 64, 64, 3), dtype=np.uint8)

    def act(t):
        torch.manual_seed(t)
        obs = {"rgb_obs": dict(zip(B.CAMERAS, images[t], strict=True))}
        return policy.act(obs, np.ones(384)), policy.plan, policy.state

    actions, plans, states = zip(*map(act, range(7)), strict=True)
    assert all(a.shape == (7,) and np.abs(a).max() <= 1 and abs(a[6]) == 1 for a in actions)
    assert plans[0] is plans[2] and plans[2] is not plans[3] and plans[3] is plans[5]
    policy.reset()
    a, plan, state = act(3)  # the frame of the second plan, now as the first of an instruction
    assert np.array_equal(a, actions[3]) and torch.equal(plan, plans[3])
    assert torch.equal(state, states[3]) and not torch.equal(state, states[4])


@pytest.mark.parametrize("command", [-1, 1])
def test_the_gripper_learns_and_sends_the_commands_of_the_play(command):
    model = B.Baseline(TINY["gcbc"]).eval()
    model.decoder.gripper.bias.data = 9.0 * torch.tensor([-command, command])
    play, language = windows(model.config, 1)
    play["a"][..., 6] = language["a"][..., 6] = command
    assert model.loss(play, language)[1]["gripper_nll"] < 0.01
    obs = {"rgb_obs": {k: play[k][0, 0].numpy() for k in B.CAMERAS}}
    assert B.BaselinePolicy(model).act(obs, np.ones(384))[6] == command
