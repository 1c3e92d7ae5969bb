"""Agent: Eqs. 3-6, λ-targets, Table IV, the ablations of Table I, the policy that acts."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import agent as A
import data
import diagnostics
import world_model as W

CONFIG = replace(A.PRESETS["tiny"], batch_size=8, sequence_length=12, min_window=12, max_window=12)
TINY = W.PRESETS["tiny"]


@pytest.fixture
def world():
    return W.make_world_model(TINY).eval().requires_grad_(False)


def make_agent(**changes):
    return A.Agent(replace(CONFIG, **changes), TINY.latent)


def windows(T=12, B=4):
    """A play and a language batch."""

    def batch():
        z = torch.nn.functional.one_hot(torch.randint(0, 8, (T, B, 8)), 8).flatten(-2).float()
        h, p = torch.randn(T, B, 64).tanh(), torch.randn(T, B, TINY.latent - 128)
        batch = {"s_E": torch.cat([h, z, p], -1), "a": torch.rand(T, B, 7) * 2 - 1}
        return batch | {"length": torch.full((B,), T), "gripper": torch.ones(B)}

    sentences = {"emb": torch.randn(B, 384), "align": torch.ones(B, dtype=torch.bool)}
    return batch(), batch() | sentences


def world_of(step, H=64):
    """A world of h (H) and the rest, in which `step(h, z, a)` happens."""
    return SimpleNamespace(imagine_step=step, split=lambda s: (s[..., :H], s[..., H:]))


def nonzero(loss, parameter):
    (gradient,) = torch.autograd.grad(loss, [parameter], allow_unused=True, retain_graph=True)
    return gradient is not None and bool(gradient.abs().sum() > 0)


def test_config_equals_table_iv():
    table = [512, 32, 20, 32, 128, 32, 32, 32, 0.1, 3.0, 0.8, 0.995, 0.95, 2e-4, 3e-4, 100]
    values = [getattr(A.AgentConfig(), f.name) for f in fields(A.AgentConfig)]
    assert values[: len(table)] == table  # in the table's row order
    assert A.PRESETS["paper"] == A.AgentConfig() and A.POLICY_PRESETS.keys() == A.PRESETS.keys()


def test_actor_and_critic_have_the_papers_layers_and_inputs():
    agent = A.Agent(A.AgentConfig(), 2048)
    assert 0.8e6 < sum(p.numel() for p in agent.actor.parameters()) < 1.4e6
    for part, n_in, n_out in (
        (agent.actor.body, 2048 + 32 + 1024, [256] * 8),  # state, goal and plan
        (agent.critic, 2048 + 32, [1024] * 8 + [1]),  # state and goal
    ):
        linear = [m for m in part.modules() if isinstance(m, torch.nn.Linear)]
        assert linear[0].in_features == n_in and [m.out_features for m in linear] == n_out


def test_eq3_is_one_iff_states_agree_and_half_at_double_scale():
    s = torch.tensor([3.0, 4.0, 0.0])
    assert A.intrinsic_reward(s, s) == 1 and A.intrinsic_reward(s, -s) == -1
    assert A.intrinsic_reward(s, 2 * s) == 0.5 and A.intrinsic_reward(2 * s, s) == 0.5
    assert A.intrinsic_reward(s, torch.tensor([0.0, 0.0, 5.0])) == 0  # orthogonal
    assert A.intrinsic_reward(0 * s, 0 * s) == 0  # [D3]: not 0/0
    x, y = torch.randn(2, 1000, 6)
    assert (A.intrinsic_reward(x, y) < 1).all()
    r = A.intrinsic_reward(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
    assert torch.allclose(r, torch.tensor((1 * 3 + 2 * -1) / 10.0))  # the longer one has |s|² = 10


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_lambda_return_is_the_weighted_sum_of_n_step_returns(lam):
    """λ = 0 is one-step TD, λ = 1 Monte Carlo plus bootstrap."""
    H, gamma = 4, 0.97
    r, v = torch.randn(H, 2), torch.randn(H + 1, 2)
    got = A.lambda_return(r, v, gamma, lam)
    for t in range(H):
        expected = 0.0
        for n in range(1, H - t + 1):
            n_step = sum(gamma**i * r[t + i] for i in range(n)) + gamma**n * v[t + n]
            last = n == H - t
            expected += (lam ** (n - 1) if last else (1 - lam) * lam ** (n - 1)) * n_step
        assert torch.allclose(got[t], expected, atol=1e-6)


def test_eq4_actions_are_tanh_gaussian_and_the_std_stays_in_its_bounds():
    actor, x, seen = A.Actor(4, 16, 2), torch.zeros(20000, 4), {}
    with torch.no_grad():
        for bias in (100.0, -100.0):
            actor.log_std.bias.fill_(bias)
            seen[bias] = actor(x).atanh()
    mean, wide, narrow = actor(x[:1], sample=False).atanh(), seen[100.0], seen[-100.0]
    assert torch.allclose(narrow.mean(0), mean[0], atol=1e-2)
    assert torch.allclose(narrow.std(0), torch.full((7,), np.exp(-5.0)), rtol=0.05)
    assert (wide.isinf().float().mean() < 0.5) and wide[wide.isfinite()].std() > 3
    assert actor(x).abs().max() <= 1


def test_eq5_is_half_the_mean_squared_error_and_moves_only_the_critic(world):
    v, target = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = A.critic_loss(v, target)
    assert torch.allclose(loss, 0.5 * ((v - target) ** 2).mean())
    assert not nonzero(loss, target)  # sg(V^λ)
    agent = make_agent(critic_gradient=True)
    _, loss_critic, _ = agent.losses(world, *windows())
    named = [(n, p) for n, p in agent.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] for n, p in named if nonzero(loss_critic, p)} == {"critic"}


def test_eq6_adds_its_terms_with_their_scales():
    v, kl, contrast = torch.full((4, 2), 2.0), torch.tensor(3.0), torch.tensor(5.0)
    loss = A.actor_loss(v, kl, contrast, 0.1, 3.0)
    assert torch.allclose(loss, torch.tensor(-2.0 + 0.1 * 3 + 3.0 * 5))


def test_eq6_reaches_the_actor_through_the_dynamics_and_leaves_phi_unchanged(world):
    agent, batches = make_agent(alpha_1=0.0, alpha_2=0.0), windows()
    before = {k: x.clone() for k, x in world.state_dict().items()}
    agent.losses(world, *batches)[0].backward()
    assert agent.actor.mean.weight.grad.abs().sum() > 0
    assert agent.recognition.logits.weight.grad.abs().sum() > 0  # through the straight-through plan
    assert all(p.grad is None for p in [*world.parameters(), *agent.critic.parameters()])
    assert all(torch.equal(before[k], x) for k, x in world.state_dict().items())
    # The same world, but its dynamics take no gradient from the action:
    deaf = world_of(lambda *step: tuple(x.detach() for x in world.imagine_step(*step)))
    assert not nonzero(agent.losses(deaf, *batches)[0], agent.actor.mean.weight)


@pytest.mark.parametrize("may", [True, False])
def test_the_actor_climbs_the_critic_only_where_it_may(world, may, monkeypatch):
    """[D28]: with a reward that nothing changes, only the critic has a gradient for the actor."""
    monkeypatch.setattr(A, "intrinsic_reward", lambda s_E, s_pi: torch.ones(s_E.shape[:-1]))
    agent = make_agent(alpha_1=0.0, alpha_2=0.0, critic_gradient=may)
    loss_actor, loss_critic, _ = agent.losses(world, *windows())
    assert nonzero(loss_actor, agent.actor.mean.weight) == may
    assert nonzero(loss_critic, agent.critic.net[1].weight)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_critic_finds_what_returns_owe_to_the_state(bf16):
    """[D18] Returns of mean 160 and spread 0.3, bootstrapped from a slow critic that begins at 0.

    As they are, a critic ends at mean 39.5, spread 0.002; with PopArt, at mean 109, spread 0.08.
    """
    critic, slow, steps = A.Critic(4, 64, 2), A.Critic(4, 64, 2), 500
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 2 - 2 * step / steps)
        if step % 5 == 0:
            slow.load_state_dict(critic.state_dict())
        s = torch.randn(64, 4)
        r = (0.8 + 0.0015 * s[:, 0]).expand(20, -1)  # 0.0015 / (1 - γ) = 0.3
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            v_lambda = A.lambda_return(r, slow(s).expand(21, -1), 0.995, 0.95)
            v = critic.standard_value(s).expand(20, -1)
            loss = A.critic_loss(v, critic.standardise(v_lambda))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        critic.update_statistics(r, v_lambda, 0.995)
        slow.mean.copy_(critic.mean)
    s = torch.randn(1000, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        v, target = critic.standard_value(s), 160 + 0.3 * s[:, 0]
        assert (critic(s) - target).square().mean().sqrt() < 0.06
        target = critic.standardise(target)
        figures = A.critic_figures(v, target, critic.deviation)
    expected = {"critic_r2": 1.0, "value_std": 0.3, "target_std": 0.3}
    assert {k: float(x) for k, x in figures.items()} == pytest.approx(expected, abs=0.05)


def test_slow_critic_is_a_hard_copy_that_waits_while_statistics_follow_in_training(world):
    agent, batches = make_agent(), windows()
    for mode, updates in ((False, 0), (True, 1), (True, 2)):
        agent.train(mode).losses(world, *batches)
        assert agent.critic.updates == updates
        # The first V^λ bootstrap from values around 0, so their deviation says nothing.
        assert (agent.critic.deviation == 1) == (updates < 2)
    assert agent.critic.mean == agent.slow_critic.mean != 0  # one mean, but
    assert agent.critic.deviation != agent.slow_critic.deviation == 1
    assert {"critic.mean", "critic.deviation", "critic.updates"} < agent.state_dict().keys()
    agent.critic.updates.fill_(1000)  # no more: a checkpoint refuses what is beyond 1e6
    agent.losses(world, *batches)
    assert agent.critic.updates == 1000
    x = torch.randn(2, agent.critic.net[0][0].in_features)
    assert not torch.allclose(agent.critic(x), agent.slow_critic(x))
    agent.update_slow_critic()
    assert torch.equal(agent.critic(x), agent.slow_critic(x))


def test_under_autocast_values_and_actions_are_not_rounded_to_bf16():
    """bf16 knows values near 160 in steps of 1 only."""
    critic, actor, x = A.Critic(4, 16, 2), A.Actor(4, 16, 2), torch.randn(50, 4)
    torch.nn.init.constant_(critic.net[1].bias, 160.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        v, mean = critic(x), actor.mean(actor.body(x))
    assert v.dtype == torch.float32 and 0 < (v - 160).abs().max() < 0.5 and len(v.unique()) > 40
    assert mean.dtype == torch.float32 and not torch.equal(mean, mean.bfloat16().float())


def test_the_agent_learns_to_steer_a_simple_world():
    """A world whose state is moved by the action; the expert always moves by 0.5."""
    line = world_of(lambda h, z, a: (h + 0.1 * a[:, :1] * torch.ones_like(h), z), H=4)
    T, B = 8, 8
    sizes = {"sequence_length": T, "min_window": T, "max_window": T, "method": "no_latent_plan"}
    agent = A.Agent(replace(CONFIG, **sizes), 8)
    s = 1 + 0.05 * torch.arange(T)[:, None, None] * torch.ones(T, B, 4)
    s_E = torch.cat([s, torch.zeros(T, B, 4)], -1)
    play, language = (b | {"s_E": s_E, "a": torch.zeros(T, B, 7)} for b in windows(T, B))
    optimizer = torch.optim.Adam(agent.actor_parameters(), 3e-3)
    for _ in range(150):
        loss, loss_critic, figures = agent.losses(line, play, language)
        optimizer.zero_grad(), (loss + loss_critic).backward(), optimizer.step()
    assert figures["reward"] > 0.98
    g, plan, _ = agent.encode(torch.cat([s_E, s_E], 1), language)
    a = agent.actor(torch.cat([s_E[0].repeat(2, 1), g, plan], -1), sample=False)
    assert torch.allclose(a[:, 0], torch.full((2 * B,), 0.5), atol=0.2)


def test_no_ditto_is_squared_error_on_expert_latents_without_imagination():
    """[D15]"""
    options = {"alpha_1": 0.0, "alpha_2": 0.0}
    agent, (play, language) = make_agent(method="no_ditto", **options).eval(), windows()
    torch.manual_seed(1)
    loss, loss_critic, _ = agent.losses(None, play, language)
    torch.manual_seed(1)
    s, actions = (torch.cat([play[k], language[k]], 1) for k in ("s_E", "a"))
    v = agent.perceptual(s)
    g = torch.cat([agent.goal_latent(v[-1, :4]), agent.goal_language(language["emb"])])
    plan = A.P.sample_straight_through(agent.recognition(v)[0])
    a = agent.actor(torch.cat([s[:-1], torch.cat([g, plan], -1).expand(11, -1, -1)], -1))
    expected = ((a - actions[:-1]) ** 2).mean()
    assert torch.allclose(loss, expected, atol=1e-6) and loss_critic == 0


def test_no_latent_plan_has_no_plan_input_and_still_aligns_and_no_alignment_drops_eq8(world):
    agent = make_agent(method="no_latent_plan")
    assert agent.actor.body[0].in_features == TINY.latent + CONFIG.goal
    loss, _, figures = agent.losses(world, *windows())
    assert figures["plan_kl"] == 0 and figures["contrast"] > 0
    assert nonzero(loss, agent.recognition.features.weight)  # [D15]
    assert not nonzero(loss, agent.proposal.net[0].weight)
    _, _, figures = make_agent(method="no_alignment").losses(world, *windows())
    assert figures["contrast"] == 0 < figures["plan_kl"]


def test_only_windows_marked_for_alignment_enter_eq8(world):
    agent, (play, language) = make_agent().eval(), windows()
    language["align"] = torch.tensor([True, True, False, False])
    seen = []
    for row, change in (0, 0), (2, 1), (0, 1):
        language["emb"][row] += change
        torch.manual_seed(0)
        seen.append(agent.losses(world, play, language)[2]["contrast"])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def observation(rng):
    cameras = ("rgb_static", "rgb_gripper")
    images = {k: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for k in cameras}
    return {"rgb_obs": images, "robot_obs": rng.normal(size=15)}


@pytest.mark.parametrize("reset_on_replan", [False, True])
def test_policy_thresholds_the_gripper_replans_and_resets(world, reset_on_replan, monkeypatch):
    policy = A.Policy(world, make_agent(), replan=3, reset_on_replan=reset_on_replan)
    rng = np.random.default_rng(0)
    obs, emb, plans, blank, real = observation(rng), rng.normal(size=384), [], [], world.filter

    def spy(batch, past):
        a_prev = tuple(batch["a_prev"].flatten().tolist())
        blank.append(a_prev == A.NO_ACTION and not torch.cat(past, -1).any())
        return real(batch, past)

    world.filter = spy
    for step in range(7):
        a = policy.act(obs, emb)
        assert a.shape == (7,) and abs(a[:6]).max() < 1 and a[6] in (-1, 1)
        assert np.array_equal(policy.a_prev.numpy()[0, 0], a)  # what was sent is fed back [D12]
        plans.append(policy.plan)
        assert step == 0 or (plans[-1] is plans[-2]) == (step % 3 > 0)
    # What the filter begins from: nothing at first, and at each new plan if it is to forget [D8].
    assert blank == [step == 0 or (reset_on_replan and step % 3 == 0) for step in range(7)]
    policy.steps = 9
    with monkeypatch.context() as m:  # with closed eyes nothing is forgotten
        m.setattr(policy, "forget", None)
        policy.act(None, emb)
    policy.reset()
    assert policy.state[0].abs().sum() == 0 and policy.plan is None
    assert tuple(policy.a_prev.flatten().tolist()) == A.NO_ACTION == data.NO_ACTION


def test_the_papers_policy_sees_cameras_only():
    config = W.WorldModelConfig(deterministic=64, categoricals=8, classes=8, hidden=64, depth=4)
    policy = A.Policy(W.make_world_model(config), A.Agent(CONFIG, config.latent))
    obs = observation(np.random.default_rng(0))
    del obs["robot_obs"]
    assert policy.act(obs, np.zeros(384)).shape == (7,)


def test_policy_in_the_world_model_sees_what_training_saw(world, monkeypatch):
    """Run time's filter, one step at a time, equals `filter` over the whole sequence."""
    monkeypatch.setattr(W, "sample_straight_through", lambda q, *_: q.softmax(-1).flatten(-2))
    policy, rng = A.Policy(world, make_agent()), np.random.default_rng(0)
    seen, states, actions = [observation(rng) for _ in range(4)], [], [A.NO_ACTION]
    for obs in seen:
        actions.append(policy.act(obs, np.zeros(384)).tolist())
        states.append(torch.cat(policy.state, -1))
    batch = {k: torch.tensor(np.stack([o["rgb_obs"][k] for o in seen])) for k in seen[0]["rgb_obs"]}
    batch["robot_obs"] = torch.tensor(np.stack([o["robot_obs"] for o in seen])).float()
    batch |= {"a_prev": torch.tensor(actions[:-1]), "reset": torch.zeros(4) > 0}
    h, z, _ = world.filter({k: x[:, None] for k, x in batch.items()}, world.initial(1))
    assert torch.allclose(torch.stack(states), torch.cat([h, z], -1), atol=1e-5)


def test_tracking_has_its_yardsticks(world):
    """In a world that stands still whatever is done, nobody can do better than holding."""
    play, language = windows()
    still = world_of(lambda h, z, a: (h, z))
    figures = diagnostics.follow(make_agent().eval(), still, play, language)
    for name in ("proposed", "recognised", "expert"):
        assert torch.allclose(figures[f"reward_{name}"], figures["reward_hold"], atol=1e-6)
    assert {"critic_r2", "value_std", "target_std"} < figures.keys()
    # In one whose h is the sum of the actions so far, and which knows no more, the expert is right.
    replay = world_of(lambda h, z, a: (h + a.repeat(1, 10)[:, :64], z))
    for batch in (play, language):
        steps = torch.cat([torch.zeros(1, 4, 7), batch["a"][:-1]]).cumsum(0)
        batch["s_E"][..., :64] = batch["s_E"][0, :, :64] + steps.repeat(1, 1, 10)[..., :64]
        batch["s_E"][..., 64:] = batch["s_E"][0, :, 64:]
    for length in (12, 6):  # the held end of a short window does not count
        for batch in (play, language):
            batch["length"][:], batch["s_E"][length:] = length, 0
        figures = diagnostics.follow(make_agent().eval(), replay, play, language)
        assert torch.allclose(figures["reward_expert"], torch.tensor(1.0), atol=1e-5)
        assert figures["reward_hold"] < 0.9
    motion = torch.cat([b["a"][:5, :, :6] for b in (play, language)]).square().mean()
    assert torch.allclose(figures["mse_still"], motion)


def test_numbers_that_do_not_fit_together_are_refused():
    for name, value in ("max_window", 40), ("min_window", 1), ("features", 60), ("method", "bc"):
        with pytest.raises(ValueError, match=name):
            make_agent(**{name: value})
