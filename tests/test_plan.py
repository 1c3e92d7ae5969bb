"""Plans, goals and alignment: Eqs. 7, 8 (Eq. 7's test is in test_world_model.py)."""

import math

import torch
import torch.nn.functional as F

import plan as P
import world_model as W


def test_eq8_matches_a_double_loop():
    M, tau = 5, torch.tensor(1.3)
    x, y = torch.randn(M, 7), torch.randn(M, 7)
    logit = lambda i, j: float(x[i] @ y[j] / (x[i].norm() * y[j].norm())) * math.exp(1.3)
    per_latent = per_text = 0.0
    for i in range(M):
        per_latent += -logit(i, i) + math.log(sum(math.exp(logit(i, j)) for j in range(M)))
        per_text += -logit(i, i) + math.log(sum(math.exp(logit(j, i)) for j in range(M)))
    loss, _ = P.contrastive_loss(x, y, tau)
    assert math.isclose(float(loss), 0.5 * (per_latent + per_text) / M, rel_tol=1e-5)


def test_eq8_true_pairs_are_found_and_shuffled_ones_are_not():
    x = torch.eye(6)
    tau = torch.tensor(math.log(1 / 0.07))
    right, accuracy = P.contrastive_loss(x, 3 * x, tau)  # length does not matter
    wrong, miss = P.contrastive_loss(x, x.roll(1, 0), tau)
    assert accuracy == 1 and miss == 0 and right < 0.01 < wrong
    twice = x[[0, 0, 2, 3, 4, 5]]  # the same sentence at two places: either is right
    assert P.contrastive_loss(twice, twice, tau)[1] == 1


def test_the_temperature_is_trained_and_starts_at_one_over_007():
    align = P.Alignment(16, 8)
    assert math.isclose(float(align.tau.detach().exp()), 1 / 0.07, rel_tol=1e-5)
    align(torch.randn(4, 16), torch.randn(4, 8), torch.ones(4) > 0)[0].backward()
    assert align.tau.grad.abs() > 0


def test_windows_that_do_not_enter_eq_8_do_not_matter_and_one_alone_has_no_negatives():
    """[D11]"""
    align, x, y = P.Alignment(16, 8), torch.randn(5, 16), torch.randn(5, 8)
    some = torch.tensor([True, False, True, True, False])
    loss, accuracy = align(x, y, some)
    expected = P.contrastive_loss(align.latent(x[some]), align.text(y[some]), align.tau)
    assert torch.allclose(loss, expected[0]) and accuracy == expected[1]
    loss, accuracy = align(x, y, torch.arange(5) == 3)
    assert loss == 0 and accuracy == 0 and loss.requires_grad


def test_plans_are_one_hot_per_categorical_with_the_softmax_gradient():
    logits = torch.randn(3, 4, 5, requires_grad=True)
    torch.manual_seed(0)
    plan = P.sample_plan(logits)
    torch.manual_seed(0)
    assert torch.equal(plan, W.sample_straight_through(logits))  # the twin, for who copies one file
    assert torch.equal(plan.detach().unflatten(-1, (4, 5)).sum(-1).round(), torch.ones(3, 4))
    w = torch.randn(20)
    (gradient,) = torch.autograd.grad((plan * w).sum(), logits)
    (soft,) = torch.autograd.grad((logits.softmax(-1).flatten(-2) * w).sum(), logits)
    assert torch.allclose(gradient, soft, atol=1e-6)


def test_recognition_sees_the_whole_window_in_order_and_proposal_only_its_start():
    recognition = P.PlanRecognition(10, 16, 32, 24, (4, 5)).eval()
    v = torch.randn(10, 2, 16)
    logits, features = recognition(v)
    assert logits.shape == (2, 4, 5) and features.shape == (2, 24)
    for t in range(10):
        other = v.clone()
        other[t] += 1
        assert not torch.allclose(recognition(other)[0], logits)
    assert not torch.allclose(recognition(v.flip(0))[0], logits)  # the learned position


def test_the_proposal_learns_which_plan_a_state_and_a_goal_ask_for():
    """Eq. 7 teaches it, through p alone, what recognition makes of windows it cannot see."""
    proposal = P.PlanProposal(4, 4, 32, (1, 4))
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    v_0, g = F.one_hot(every, 4).float().unbind(1)
    asked = (v_0.argmax(-1) + g.argmax(-1)) % 4  # neither tells it alone
    q = 8 * F.one_hot(asked, 4).float()[:, None]
    optimizer = torch.optim.Adam(proposal.parameters(), 1e-2)
    for _ in range(200):
        loss = P.kl_balanced(q, proposal(v_0, g), 0.8).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert (proposal(v_0, g).argmax(-1)[:, 0] == asked).all()


def test_mean_over_time_before_the_linear_layer_is_the_mean_after_it():
    recognition = P.PlanRecognition(6, 16, 32, 24, (4, 5)).eval()
    v = torch.randn(6, 2, 16)
    each = recognition.features(recognition.transformer(v + recognition.position))
    assert torch.allclose(recognition(v)[1], each.mean(0), atol=1e-5)


def test_goals_end_in_a_layer_norm():
    for n in (384, 16):
        g = P.GoalEncoder(n, 32, 8)(torch.randn(5, n))
        assert torch.allclose(g, F.layer_norm(g, (8,)), atol=1e-2)
