"""Agent: Eqs. 3-6, λ-targets, Table IV, the ablations of Table I, the policy that acts."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import agent as A
import data
import world_model as W

CONFIG = replace(A.PRESETS["tiny"], batch_size=8, sequence_length=12, min_window=12, max_window=12)
TINY = W.PRESETS["tiny"]


@pytest.fixture
def world():
    return W.WorldModel(TINY).eval().requires_grad_(False)


def make_agent(**changes):
    return A.Agent(replace(CONFIG, **changes), TINY.deterministic, TINY.latent)


def windows(T=12, B=8, M=4):
    z = torch.nn.functional.one_hot(torch.randint(0, 8, (T, B, 8)), 8).flatten(-2).float()
    s = torch.cat([torch.randn(T, B, 64).tanh(), z, torch.randn(T, B, TINY.latent - 128)], -1)
    return {
        "s_E": s,
        "a": torch.rand(T, B, 7) * 2 - 1,
        "length": torch.full((B,), T),
        "emb": torch.randn(M, 384),
        "align": torch.ones(M, dtype=torch.bool),
    }


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)


def test_config_equals_table_iv():
    table = [512, 32, 20, 32, 128, 32, 32, 32, 0.1, 3.0, 0.8, 0.995, 0.95, 2e-4, 3e-4, 100]
    values = [getattr(A.AgentConfig(), f.name) for f in fields(A.AgentConfig)]
    assert values[: len(table)] == table  # in the table's row order; its optimiser is Adam
    assert A.AgentConfig().critic_weight_decay == 0


def test_actor_has_about_a_million_parameters_at_the_papers_size():
    agent = A.Agent(A.AgentConfig(), 1024, 2048)
    assert 0.8e6 < sum(p.numel() for p in agent.actor.parameters()) < 1.4e6
    linear = [m for m in agent.actor.body if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [256] * 8
    linear = [m for m in agent.critic.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [1024] * 8 + [1]
    assert linear[0].in_features == 2048 + 32  # state and goal, no plan [D4]


def test_eq3_is_one_iff_states_agree_and_half_at_double_scale():
    s = torch.tensor([3.0, 4.0, 0.0])
    assert A.intrinsic_reward(s, s) == 1
    assert A.intrinsic_reward(s, 2 * s) == 0.5 and A.intrinsic_reward(2 * s, s) == 0.5
    assert A.intrinsic_reward(s, -s) == -1
    assert A.intrinsic_reward(s, torch.tensor([0.0, 0.0, 5.0])) == 0  # orthogonal
    assert A.intrinsic_reward(0 * s, 0 * s) == 0  # [D3]: not 0/0
    x, y = torch.randn(2, 1000, 6)
    assert (A.intrinsic_reward(x, y) < 1).all()


def test_eq3_by_hand():
    r = A.intrinsic_reward(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
    assert torch.allclose(r, torch.tensor((1 * 3 + 2 * -1) / 10.0))  # the longer one has |s|² = 10


def test_lambda_0_is_one_step_td():
    r, v = torch.randn(5, 3), torch.randn(6, 3)
    assert torch.allclose(A.lambda_return(r, v, 0.9, 0.0), r + 0.9 * v[1:])


def test_lambda_1_is_monte_carlo_plus_bootstrap():
    r, v = torch.randn(4, 2), torch.randn(5, 2)
    got = A.lambda_return(r, v, 0.9, 1.0)
    for t in range(4):
        expected = sum(0.9 ** (i - t) * r[i] for i in range(t, 4)) + 0.9 ** (4 - t) * v[4]
        assert torch.allclose(got[t], expected)


def test_lambda_return_is_the_weighted_sum_of_n_step_returns():
    H, gamma, lam = 4, 0.97, 0.8
    r, v = torch.randn(H, 1), torch.randn(H + 1, 1)
    n_step = lambda t, n: sum(gamma**i * r[t + i] for i in range(n)) + gamma**n * v[t + n]
    got = A.lambda_return(r, v, gamma, lam)
    for t in range(H):
        left = H - t
        mix = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, left))
        assert torch.allclose(got[t], mix + lam ** (left - 1) * n_step(t, left), atol=1e-6)


def test_eq4_actions_are_tanh_gaussian_and_the_std_stays_in_its_bounds():
    actor = A.Actor(4, 16, 2)
    x = torch.zeros(20000, 4)
    with torch.no_grad():
        actor.log_std.bias.fill_(100.0)
        wide = actor(x).atanh()
        actor.log_std.bias.fill_(-100.0)
        narrow = actor(x).atanh()
    mean = actor(x[:1], sample=False).atanh()
    assert torch.allclose(narrow.mean(0), mean[0], atol=1e-2)
    assert torch.allclose(narrow.std(0), torch.full((7,), np.exp(-5.0)), rtol=0.05)
    assert (wide.isinf().float().mean() < 0.5) and wide[wide.isfinite()].std() > 3
    assert actor(x).abs().max() <= 1


def test_eq5_is_half_the_mean_squared_error_and_moves_only_the_critic(world):
    v, target = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = A.critic_loss(v, target, torch.full((5, 3), 1 / 15))
    assert torch.allclose(loss, 0.5 * ((v - target) ** 2).mean())
    assert gradients(loss, [target]) == (None,)  # sg(V^λ)
    agent = make_agent()
    _, loss_critic, _ = agent.losses(world, windows())
    named = [(n, p) for n, p in agent.named_parameters() if p.requires_grad]
    reached = gradients(loss_critic, [p for _, p in named])
    assert {n.split(".")[0] for (n, _), g in zip(named, reached, strict=True) if g is not None} == {
        "critic"
    }


def test_eq6_adds_its_terms_with_their_scales():
    v = torch.full((4, 2), 2.0)
    loss = A.actor_loss(
        v, torch.tensor(3.0), torch.tensor(5.0), 0.1, 3.0, torch.full((4, 2), 1 / 8)
    )
    assert torch.allclose(loss, torch.tensor(-2.0 + 0.1 * 3 + 3.0 * 5))


def test_eq6_reaches_the_actor_through_the_dynamics_and_leaves_phi_unchanged(world):
    agent, batch = make_agent(alpha_1=0.0, alpha_2=0.0), windows()
    before = {k: x.clone() for k, x in world.state_dict().items()}
    loss_actor, _, _ = agent.losses(world, batch)
    loss_actor.backward()
    assert agent.actor.mean.weight.grad.abs().sum() > 0
    assert agent.recognition.logits.weight.grad.abs().sum() > 0  # through the straight-through plan
    assert all(p.grad is None for p in world.parameters())
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(torch.equal(before[k], x) for k, x in world.state_dict().items())

    class Deaf:  # the same world, but the dynamics take no gradient from the action
        def imagine_step(self, h, z, a):
            return tuple(x.detach() for x in world.imagine_step(h, z, a))

    agent.zero_grad()
    loss_actor, _, _ = agent.losses(Deaf(), batch)
    (gradient,) = gradients(loss_actor, [agent.actor.mean.weight])
    assert gradient is None or gradient.abs().sum() == 0


def test_the_actor_climbs_the_critic_only_where_it_may(world, monkeypatch):
    """[D28]: with a reward that nothing changes, only the critic has a gradient for the actor."""
    monkeypatch.setattr(A.Agent, "reward", lambda self, s_E, s_pi: torch.ones(s_E.shape[:-1]))
    for may in (True, False):
        agent = make_agent(alpha_1=0.0, alpha_2=0.0, critic_gradient=may)
        loss_actor, loss_critic, _ = agent.losses(world, windows())
        (gradient,) = gradients(loss_actor, [agent.actor.mean.weight])
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == may
        assert gradients(loss_critic, [agent.critic.net[-1].weight])[0].abs().sum() > 0


def test_the_agent_learns_to_steer_a_simple_world():
    """A world whose state is moved by the action; the expert always moves by 0.5."""

    class Line:
        def imagine_step(self, h, z, a):
            return h + 0.1 * a[:, :1] * torch.ones_like(h), z

    T, B = 8, 16
    agent = A.Agent(
        replace(CONFIG, sequence_length=T, min_window=T, max_window=T, method="no_latent_plan"),
        4,
        8,
    )
    s = 1 + 0.05 * torch.arange(T)[:, None, None] * torch.ones(T, B, 4)
    s_E = torch.cat([s, torch.zeros(T, B, 4)], -1)
    batch = windows(T, B, M=2) | {"s_E": s_E, "align": torch.zeros(2) > 0}
    batch["a"] = torch.zeros(T, B, 7)
    optimizer = torch.optim.Adam(agent.actor_parameters(), 3e-3)
    for _ in range(150):
        loss, loss_critic, figures = agent.losses(Line(), batch)
        optimizer.zero_grad(), (loss + loss_critic).backward(), optimizer.step()
    assert figures["reward"] > 0.98
    a = agent.actor(
        torch.cat([s_E[0], agent.goal(agent.perceptual(s_E[-1]), batch["emb"])], -1), sample=False
    )
    assert torch.allclose(a[:, 0], torch.full((B,), 0.5), atol=0.2)


def test_no_ditto_is_squared_error_on_expert_latents_without_imagination():
    class NoWorld:
        def imagine_step(self, h, z, a):
            raise AssertionError("behaviour cloning must not imagine")

    agent, batch = make_agent(method="no_ditto", alpha_1=0.0, alpha_2=0.0).eval(), windows()
    torch.manual_seed(1)
    loss, loss_critic, _ = agent.losses(NoWorld(), batch)
    torch.manual_seed(1)
    s = batch["s_E"]
    v = agent.perceptual(s)
    g = agent.goal(v[-1], batch["emb"])
    plan = A.P.sample_plan(agent.recognition(v)[0])
    a = agent.actor(torch.cat([s[:-1], torch.cat([g, plan], -1).expand(11, -1, -1)], -1))
    assert torch.allclose(loss, ((a - batch["a"][:-1]) ** 2).mean(), atol=1e-6)
    assert loss_critic == 0


def test_cloning_may_follow_imagined_states_and_leave_out_the_padding(world):
    """[D14, D15]: the error along the states that its own actions lead to, over real steps."""
    options = {"clone_imagined": True, "mask_padding": True, "alpha_1": 0.0, "alpha_2": 0.0}
    agent, batch = make_agent(method="no_ditto", **options).eval(), windows()
    lengths = [12, 7, 2, 12, 3, 12, 9, 5]
    batch["length"] = torch.tensor(lengths)
    torch.manual_seed(1)
    loss, _, _ = agent.losses(world, batch)
    torch.manual_seed(1)
    V = agent.perceptual(batch["s_E"])
    plan = A.P.sample_plan(agent.recognition(V)[0])
    g = agent.goal(V[-1], batch["emb"])
    _, a = agent.imagine(world, batch["s_E"][0], g, plan, 11)
    error = ((a - batch["a"][:-1]) ** 2).mean(-1)
    real = torch.cat([error[: n - 1, b] for b, n in enumerate(lengths)])
    assert torch.allclose(loss, real.mean(), atol=1e-6)


def test_no_latent_plan_has_no_plan_input_and_still_aligns(world):
    agent = make_agent(method="no_latent_plan")
    assert agent.actor.body[0].in_features == TINY.latent + CONFIG.goal
    loss, _, figures = agent.losses(world, windows())
    assert figures["plan_kl"] == 0 and figures["contrast"] > 0
    named = dict(agent.named_parameters())
    reached = dict(zip(named, gradients(loss, [p.requires_grad_() for p in named.values()]),
                       strict=True))  # fmt: skip
    assert reached["recognition.features.weight"] is not None  # [D16]
    assert reached["proposal.net.0.weight"] is None


def test_no_alignment_drops_eq8(world):
    _, _, figures = make_agent(method="no_alignment").losses(world, windows())
    assert figures["contrast"] == 0
    with pytest.raises(ValueError, match="no_alignment"):
        make_agent(method="bc")


def test_only_windows_marked_for_alignment_enter_eq8(world):
    agent, batch = make_agent().eval(), windows()
    batch["align"] = torch.tensor([True, True, False, False])
    torch.manual_seed(0)
    one = agent.losses(world, batch)[2]["contrast"]
    batch["emb"][2:] += 1
    torch.manual_seed(0)
    assert torch.equal(one, agent.losses(world, batch)[2]["contrast"])
    batch["emb"][0] += 1
    torch.manual_seed(0)
    assert not torch.equal(one, agent.losses(world, batch)[2]["contrast"])


def test_masked_padding_leaves_the_objective():
    """[D14]: a window of 3 real steps gives what it gives without its padding."""
    r, v = torch.randn(5, 2), torch.randn(6, 2)
    weight = torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 0], [1, 0]])
    got = A.lambda_return(r, v, 0.9, 0.8, weight)
    assert torch.equal(got[:, 0], A.lambda_return(r, v, 0.9, 0.8)[:, 0])
    short = A.lambda_return(r[:3, 1:], v[:4, 1:], 0.9, 0.8)
    assert torch.equal(got[:3, 1:], short)
    values, zero, changed = torch.randn(5, 2), torch.zeros(()), got.clone()
    changed[3:, 1] += 5
    assert A.critic_loss(values, got, weight) == A.critic_loss(values, changed, weight)
    loss = lambda target: A.actor_loss(target, zero, zero, 1, 1, weight)
    assert loss(got) == loss(changed)


def test_a_binary_gripper_acts_as_its_sign_and_learns_as_itself(world):
    """[D12] in imagination: only the sign arrives, and the gradient still does."""
    soft, hard = make_agent(binary_gripper=False).eval(), make_agent(binary_gripper=True).eval()
    hard.load_state_dict(soft.state_dict())
    s, g, plan = windows()["s_E"][0], torch.randn(8, CONFIG.goal), torch.zeros(8, 64)
    actions = {}
    for agent in (soft, hard):
        torch.manual_seed(0)
        actions[agent] = agent.imagine(world, s, g, plan, 1)[1][0]
    assert torch.equal(actions[hard][:, :6], actions[soft][:, :6])
    assert torch.equal(actions[hard][:, 6], actions[soft][:, 6].sign())
    grads = [gradients(a[:, 6].sum(), x.actor.mean.parameters()) for x, a in actions.items()]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_slow_critic_is_a_hard_copy_that_waits(world):
    agent = make_agent()
    with torch.no_grad():
        agent.critic.net[1].bias += 1
    x = torch.randn(2, agent.critic.net[0][0].in_features)
    assert not torch.allclose(agent.critic(x), agent.slow_critic(x))
    agent.update_slow_critic()
    assert torch.equal(agent.critic(x), agent.slow_critic(x))


@pytest.mark.parametrize("forget", [False, True])
def test_policy_thresholds_the_gripper_replans_and_forgets(world, forget, monkeypatch):
    agent = make_agent(replan=3, forget=forget)
    policy = A.Policy(world, agent)
    rng = np.random.default_rng(0)
    obs = {
        "rgb_obs": {
            k: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            for k in ("rgb_static", "rgb_gripper")
        },
        "robot_obs": rng.normal(size=15),
    }
    emb, plans, pasts = rng.normal(size=384), [], []
    real = world.filter
    world.filter = lambda batch, past: (pasts.append((past, batch["a_prev"])), real(batch, past))[1]
    for step in range(7):
        a = policy.act(obs, emb)
        assert a.shape == (7,) and abs(a[:6]).max() < 1 and a[6] in (-1, 1)
        assert np.array_equal(policy.a_prev.numpy()[0, 0], a)  # what was sent is fed back [D12]
        plans.append(policy.plan)
        assert (step % 3 == 0) or plans[-1] is plans[-2]
    del world.filter
    assert plans[3] is not plans[2] and plans[6] is not plans[5]
    # What the filter begins from: nothing at first, and at each new plan if it is to forget [D8].
    blank = [not h.any() and not z.any() and tuple(a.flatten().tolist()) == A.NO_ACTION
             for (h, z), a in pasts]  # fmt: skip
    assert blank == [step == 0 or (forget and step % 3 == 0) for step in range(7)]
    policy.steps = 9
    with monkeypatch.context() as m:  # with closed eyes nothing is forgotten
        m.setattr(policy, "forget", None)
        policy.act(None, emb)
    policy.reset()
    assert policy.state[0].abs().sum() == 0 and policy.plan is None
    assert tuple(policy.a_prev.flatten().tolist()) == A.NO_ACTION == data.NO_ACTION


def test_policy_in_the_world_model_sees_what_training_saw(world):
    """Run time's filter equals `observe` over the whole sequence, one step at a time."""
    agent = make_agent()
    policy = A.Policy(world, agent, sample=False)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8) for _ in range(4)]
    torch.manual_seed(5)
    states, actions = [], [torch.tensor(A.NO_ACTION)]
    real = policy.world.filter
    for static, gripper in frames:
        torch.manual_seed(len(states))
        obs = {"rgb_obs": {"rgb_static": static, "rgb_gripper": gripper}, "robot_obs": np.zeros(15)}
        actions.append(torch.from_numpy(policy.act(obs, np.zeros(384))))
        states.append(policy.state[0])
    h, z = world.initial(1)
    for t, (static, gripper) in enumerate(frames):
        torch.manual_seed(t)
        batch = {
            "rgb_static": torch.from_numpy(static)[None, None],
            "rgb_gripper": torch.from_numpy(gripper)[None, None],
            "robot_obs": torch.zeros(1, 1, 15),
            "a_prev": actions[t][None, None],
            "reset": torch.full((1, 1), t == 0),
        }
        hs, zs, _ = real(batch, (h, z))
        h, z = hs[-1], zs[-1]
        assert torch.allclose(states[t], h, atol=1e-5)


def test_tracking_has_its_yardsticks(world):
    """In a world that stands still whatever is done, nobody can do better than holding."""

    class Still:
        def imagine_step(self, h, z, a):
            return h, z

    figures = make_agent().eval().track(Still(), windows() | {"gripper": torch.ones(8)})
    for name in ("proposed", "recognised", "expert"):
        assert torch.allclose(figures[f"reward_{name}"], figures["reward_hold"], atol=1e-6)

    class Replay:  # a world whose h is the sum of the actions so far
        def imagine_step(self, h, z, a):
            return h + a.repeat(1, 10)[:, :64], z

    batch = windows() | {"gripper": torch.ones(8)}
    steps = torch.cat([torch.zeros(1, 8, 7), batch["a"][:-1]]).cumsum(0).repeat(1, 1, 10)[..., :64]
    batch["s_E"][..., :64] = batch["s_E"][0, :, :64] + steps
    figures = make_agent(reward_on="h").eval().track(Replay(), batch)
    assert torch.allclose(figures["reward_expert"], torch.tensor(1.0), atol=1e-5)
    assert figures["reward_hold"] < 0.9
    # The held end of a short window does not count.
    batch["length"][:], batch["s_E"][6:] = 6, 0
    figures = make_agent(reward_on="h").eval().track(Replay(), batch)
    assert torch.allclose(figures["reward_expert"], torch.tensor(1.0), atol=1e-5)
    still = (batch["a"][:5, :, :6] ** 2).mean()
    assert torch.allclose(figures["mse_still"], still)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_window": 40}, "max_window"),
        ({"min_window": 1}, "min_window"),
        ({"features": 60}, "8"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        A.Agent(replace(A.PRESETS["tiny"], **change), 64, 128)
