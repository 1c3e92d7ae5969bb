"""Plans, goals and alignment: Eq. 8 (Eq. 7's and the samples' tests are in test_world_model.py)."""

import math

import torch
import torch.nn.functional as F

import plan as P


def eq8(x, y, tau):
    """Eq. 8 where all windows take part."""
    return P.contrastive_loss(x, y, tau, torch.ones(len(x)) > 0)


def test_eq8_matches_a_double_loop():
    M, tau = 5, torch.tensor(1.3)
    x, y = torch.randn(M, 7), torch.randn(M, 7)
    logit = [[float(F.cosine_similarity(a, b, 0)) * math.exp(1.3) for b in y] for a in x]
    expected = 0.0
    for i in range(M):
        for others in (logit[i], [row[i] for row in logit]):  # per latent, per text
            expected += 0.5 / M * (-logit[i][i] + math.log(sum(math.exp(v) for v in others)))
    assert math.isclose(float(eq8(x, y, tau)[0]), expected, rel_tol=1e-5)


def test_eq8_true_pairs_are_found_and_shuffled_ones_are_not():
    x, tau = torch.eye(6), torch.tensor(math.log(1 / 0.07))
    right, accuracy = eq8(x, 3 * x, tau)  # length does not matter
    wrong, miss = eq8(x, x.roll(1, 0), tau)
    assert accuracy == 1 and miss == 0 and right < 0.01 < wrong
    twice = x[[0, 0, 2, 3, 4, 5]]  # the same sentence at two places: either is right
    assert eq8(twice, twice, tau)[1] == 1


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
    expected = eq8(align.latent(x[some]), align.text(y[some]), align.tau)
    assert torch.allclose(loss, expected[0]) and accuracy == expected[1]
    loss, accuracy = align(x, y, torch.arange(5) == 3)
    assert loss == 0 and accuracy == 0 and loss.requires_grad


def test_under_autocast_eq_8_and_plan_logits_are_not_rounded_to_bf16():
    x, y, tau = torch.randn(6, 32), torch.randn(6, 32), torch.tensor(2.66)
    recognition = P.PlanRecognition(10, 16, 32, 24, (4, 5))
    proposal = P.PlanProposal(16, 8, 32, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = eq8(x, y, tau)
        logits = recognition(torch.randn(10, 2, 16))[0], proposal(x[:, :16], y[:, :8])
    assert torch.equal(loss, eq8(x, y, tau)[0])
    for q in logits:
        assert q.dtype == torch.float32 and not torch.equal(q, q.bfloat16().float())


def test_recognition_sees_the_whole_window_in_order():
    recognition, v = P.PlanRecognition(10, 16, 32, 24, (4, 5)).eval(), torch.randn(10, 2, 16)
    logits, features = recognition(v)
    assert logits.shape == (2, 4, 5) and features.shape == (2, 24)
    for t in range(10):
        other = v.clone()
        other[t] += 1
        assert not torch.allclose(recognition(other)[0], logits)
    assert not torch.allclose(recognition(v.flip(0))[0], logits)  # the learned position
    # Its linear layer and the mean over time may change places.
    each = recognition.features(recognition.transformer(v + recognition.position))
    assert torch.allclose(features, each.mean(0), atol=1e-5)


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


def test_goals_end_in_a_layer_norm():
    for n in (384, 16):
        g = P.GoalEncoder(n, 32, 8)(torch.randn(5, n))
        assert torch.allclose(g, F.layer_norm(g, (8,)), atol=1e-2)
