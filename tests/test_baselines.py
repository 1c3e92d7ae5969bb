"""GCBC, MCIL and HULC: App. C's images, HULC's loss, and what the three switches change."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import logistic
from torch.distributions import OneHotCategorical, kl_divergence

import baselines as B
import plan as P

TINY = {name: replace(B.PRESETS["tiny"], **switches) for name, switches in B.METHODS.items()}


def windows(c: B.BaselineConfig, n: int, device: str = "cpu") -> list[dict]:
    """n play windows and n language windows of frames in one colour, no two alike."""
    T, batches = c.sequence_length, []
    for _ in range(2):
        colour = torch.randint(0, 256, (2, T, n, 1, 1, 3), dtype=torch.uint8)
        batch = dict(zip(B.CAMERAS, colour.expand(-1, -1, -1, 64, 64, -1), strict=True))
        batch |= {"a": torch.rand(T, n, 7) * 2 - 1, "length": torch.full((n,), T)}
        batch["a"][..., 6] = batch["a"][..., 6].sign()
        batches.append(batch)
    batches[1] |= {"emb": torch.randn(n, 384), "align": torch.ones(n, dtype=torch.bool)}
    return [{k: x.to(device) for k, x in batch.items()} for batch in batches]


# ---------------------------------------------------------------------------- actions
def test_the_mixtures_log_likelihood_matches_a_slow_loop_over_scipys_logistic():
    N, D, M, classes = 40, 6, 10, 10
    a = (torch.rand(N, D) * 2.4 - 1.2).clamp(-1, 1)  # some in the outermost classes
    logits, mean, log_s = torch.randn(N, D, M), torch.randn(N, D, M), torch.randn(N, D, M) - 1
    expected = np.zeros(N)
    for n in range(N):
        for d in range(D):
            weight, p = np.exp(logits[n, d].double().numpy()), 0.0
            for m in range(M):
                x = logistic(float(mean[n, d, m]), np.exp(float(log_s[n, d, m])))
                low = 0.0 if a[n, d] == -1 else x.cdf(float(a[n, d]) - 1 / (classes - 1))
                high = 1.0 if a[n, d] == 1 else x.cdf(float(a[n, d]) + 1 / (classes - 1))
                p += weight[m] / weight.sum() * (high - low)
            expected[n] += np.log(p)
    assert (a.abs() == 1).any() and (a.abs() < 1).any()
    got = B.log_likelihood(a, logits, mean, log_s, classes)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 10, 256])
def test_the_probabilities_of_all_classes_sum_to_one(classes):
    centres = torch.linspace(-1, 1, classes, dtype=torch.float64)[:, None]
    mixture = torch.randn(3, 1, 10, dtype=torch.float64)  # of a class's centre
    log_p = B.log_likelihood(centres, *(x.expand(classes, -1, -1) for x in mixture), classes)
    assert torch.allclose(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_far_from_every_component_log_likelihood_and_gradient_stay_finite():
    mean = torch.tensor([[[50.0]]], requires_grad=True)
    log_p = B.log_likelihood(torch.tensor([[0.1]]), mean * 0, mean, torch.full((1, 1, 1), -7.0), 10)
    log_p.sum().backward()
    assert -1e6 < log_p < -1e4  # 50 away at a scale of 1/1097
    assert mean.grad < 0 and mean.grad.isfinite().all()


def test_sampled_actions_have_the_mixtures_distribution_between_the_bounds():
    n, classes = 50_000, 10
    mixture = (torch.tensor([0.2, 1.0]), torch.tensor([-0.5, 0.6]), torch.tensor([-2.0, -1.5]))
    sample = B.sample_mixture(*(x.expand(n, 1, 2) for x in mixture))
    centres = torch.linspace(-1, 1, classes)[:, None]
    share = ((sample - centres.T).abs() < 1 / (classes - 1)).float().mean(0)
    log_p = B.log_likelihood(centres, *(x.expand(classes, 1, 2) for x in mixture), classes)
    assert torch.allclose(share, log_p.exp(), atol=0.01)
    assert sample.abs().max() == 1  # clipped


# ---------------------------------------------------------------------------- images
def test_shifts_move_by_their_pixels_as_bilinear_interpolation_does_and_zero_changes_nothing():
    images = torch.randint(0, 256, (49, 64, 64, 3), dtype=torch.uint8)
    offset = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    got = B.shifted(images, offset)
    theta = torch.eye(2, 3).repeat(49, 1, 1)
    theta[:, :, 2] = -offset * 2 / 64
    x = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, x.shape, align_corners=False)
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
    encoder = B.CameraEncoder(4, 16, 8, spatial_softmax=True)
    images, head = torch.zeros(1, 64, 64, 3, dtype=torch.uint8), []
    assert encoder.convolutions(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 7, 7)
    peaked = torch.full((1, 8, 7, 7), -1e4)
    peaked[0, :, 1, 5] = 0  # row 1 and column 5 of 7, on a grid from -1 to 1
    encoder.convolutions.forward = lambda x: peaked
    encoder.head.register_forward_hook(lambda module, x, y: head.append(x[0]))
    encoder(images)
    assert torch.allclose(head[0], torch.tensor([2 / 3] * 8 + [-2 / 3] * 8), atol=1e-6)


# ---------------------------------------------------------------------------- plans
def test_the_gaussian_kl_matches_the_closed_form_and_its_plan_is_reparameterised():
    model, q, p = B.Baseline(TINY["mcil"]), *torch.randn(2, 5, 2, 16)
    expected = torch.zeros(5)
    for b in range(5):
        for n in range(16):
            s_q, s_p = (float(F.softplus(x[b, 1, n])) + 1e-4 for x in (q, p))
            gap = float(q[b, 0, n] - p[b, 0, n])
            expected[b] += np.log(s_p / s_q) + (s_q**2 + gap**2) / (2 * s_p**2) - 0.5
    assert torch.allclose(model.plan_kl(q, p), expected, rtol=1e-4)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(model.sample_plan(q).sum(), q)
    assert torch.equal(gradient[:, 0], torch.ones(5, 16))


def test_hulcs_plan_loss_is_plan_pys_and_that_of_balanced_categoricals():
    c, model = TINY["hulc"], B.Baseline(TINY["hulc"]).eval()
    play, language = windows(c, 3)
    _, figures = model.loss(play, language)
    V = torch.cat([model.encode(play), model.encode(language)], 1)
    g = torch.cat([model.goal_image(V[-1, :3]), model.goal_language(language["emb"])])
    q, p = model.recognition(V)[0], model.proposal(V[0], g)
    assert torch.allclose(figures["plan_kl"], P.kl_balanced(q, p, c.delta).mean())
    forward = kl_divergence(OneHotCategorical(logits=q), OneHotCategorical(logits=p.detach()))
    backward = kl_divergence(OneHotCategorical(logits=q.detach()), OneHotCategorical(logits=p))
    expected = (0.2 * forward + 0.8 * backward).sum(-1)
    assert torch.allclose(figures["plan_kl"], expected.mean(), atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), p)[0] for x in (expected, model.plan_kl(q, p))]
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("name", TINY)
def test_the_loss_adds_its_terms_with_hulcs_weights_and_reaches_every_parameter(name):
    model = B.Baseline(TINY[name])
    loss, f = model.loss(*windows(model.config, 3))
    expected = f["arm_nll"] + f["gripper_nll"] + 0.01 * f["plan_kl"] + 3 * f["contrast"]
    assert torch.allclose(loss, expected)
    assert (f["plan_kl"] > 0) == (name != "gcbc") and (f["contrast"] > 0) == (name == "hulc")
    loss.backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


def test_both_recognitions_see_the_whole_window():
    V = torch.randn(8, 1, 64, requires_grad=True)
    for name in ("mcil", "hulc"):
        statistics, _ = B.Baseline(TINY[name]).eval().recognition(V)
        (gradient,) = torch.autograd.grad(statistics.square().sum(), V)
        assert (gradient.abs().amax((1, 2)) > 1e-6).all()


def test_gcbc_has_no_plan_and_only_hulc_aligns():
    parts = {name: set(dict(B.Baseline(c).named_children())) for name, c in TINY.items()}
    assert parts["mcil"] - parts["gcbc"] == {"recognition", "proposal"}
    assert parts["hulc"] - parts["mcil"] == {"alignment"}
    assert isinstance(B.Baseline(TINY["hulc"]).recognition, P.PlanRecognition)


@pytest.mark.parametrize(
    "switches", [{"plan": "vq"}, {"recognition": "lstm"}, {"recognition": "none"}, {"features": 20}]
)
def test_switches_that_do_not_exist_or_contradict_each_other_are_errors(switches):
    with pytest.raises(ValueError, match=next(iter(switches))):
        B.Baseline(replace(TINY["hulc"], **switches))


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
    """On `meta`, which has none, whatever reads a number fails; so no GPU is waited for."""
    one_hot = lambda i, n: (i[..., None] == torch.arange(n, device=i.device)).long()  # noqa: E731
    monkeypatch.setattr(F, "one_hot", one_hot)  # reads them, but on CUDA
    monkeypatch.setattr(B, "in_fp32", lambda rnn, *x: rnn(*x))  # meta knows no autocast
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
    for a in actions:
        assert a.shape == (7,) and np.abs(a[:6]).max() <= 1 and a[6] in (-1, 1)
    assert plans[0] is plans[2] and plans[2] is not plans[3] and plans[3] is plans[5]
    policy.reset()
    a, plan, state = act(3)  # the frame of the second plan, now as the first of an instruction
    assert np.array_equal(a, actions[3]) and torch.equal(plan, plans[3])
    assert torch.equal(state, states[3]) and not torch.equal(state, states[4])


def test_bf16_products_give_nearly_the_same_loss():
    model = B.Baseline(TINY["hulc"]).eval()
    batch, losses = windows(model.config, 2), []
    for enabled in (False, True):
        torch.manual_seed(1)  # the plan's sample
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(*batch)[0])
    assert torch.allclose(*losses, rtol=5e-3) and not torch.equal(*losses)


def test_file_imports_alone_beside_plan_in_an_empty_folder(tmp_path):
    for module in (B, P):
        shutil.copy(module.__file__, tmp_path)
    subprocess.run([sys.executable, "-c", "import baselines"], cwd=tmp_path, check=True)
