"""Behaviour learning in imagination. LUMOS Sec. IV-B, App. B, Eqs. 3-6, Table IV.

    symbol   code      shape      meaning
    s^E_t    s_E       (T, B, k)  expert latents of a play window                    Eq. 3
    s^π_t    s_pi      (T, B, k)  the policy's latents, imagined by the world model  Eq. 3
    a_t      a         (T, B, 7)  actions, in [-1, 1]                                App. D
    g        g         (B, g)     latent goal                                        Sec. IV-B
    r^int_t  r         (H, B)     reward for s^π_{t+1} being where the expert is     Eq. 3
    v_ψ      v_slow    (T, B)     the slow critic's value of every state             Eq. 4
    V^λ_t    v_lambda  (H, B)     λ-target, bootstrapped at H                        App. B

    A window of T = 32 states has H = T - 1 = 31 steps between them:

        s_0 --a_0--> s_1 --a_1--> s_2 ...  s_{H-1} --a_{H-1}--> s_H     (s_0: the expert's own)
             r_0          r_1                        r_{H-1}    r_t: s^π_{t+1} beside s^E_{t+1}
        v_0          v_1          v_2      v_{H-1}              v_H     V^λ_H = v_H

A batch is two dicts, `play` and `language`, of windows: s_E (T, B, k) expert latents, which hold
the end of a short window, and a (T, B, 7) their actions [D14]; language also emb (B, 384) and
align (B,) bool, which windows enter Eq. 8 [D11]. Shape () is a scalar.
The caller freezes the world model: `world.requires_grad_(False)`.

Copy this file together with plan.py. Needs: torch. The world model is an argument: anything with
`split(s) -> (h, z)` and `imagine_step(h, z, a) -> (h, z)` will do. `Policy` also needs `eval()`,
`initial(batch) -> (h, z)` and `filter(batch, (h, z)) -> h, z, _`, as in world_model.py.

>>> import torch
>>> from agent import PRESETS, Agent
>>> class World:  # h and z of 8 numbers; actions move h
...     def split(self, s):
...         return s[..., :8], s[..., 8:]
...     def imagine_step(self, h, z, a):
...         return h + a.sum(-1, keepdim=True), z
>>> agent = Agent(PRESETS["tiny"], k=16)
>>> play = {"s_E": torch.randn(5, 4, 16), "a": torch.zeros(5, 4, 7)}  # T = 5, B = 4
>>> told = {"emb": torch.randn(4, 384), "align": torch.ones(4, dtype=torch.bool)}
>>> loss_actor, loss_critic, figures = agent.losses(World(), play, play | told)
>>> loss_actor.shape
torch.Size([])
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

import plan as P

NO_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # before the first step: still, gripper open [D2]
Batch = dict[str, Tensor]  # windows, time-major; also figures by name
METHODS = ("lumos", "no_ditto", "no_latent_plan", "no_alignment")  # Table I


@dataclass(frozen=True)
class AgentConfig:
    """Table IV, in its row order; below the line, what the table leaves open."""

    batch_size: int = 512  # B, half play windows and half language windows [D6]
    sequence_length: int = 32  # T, states, with the padding [D23]
    min_window: int = 20  # states of the shortest window that is cut from a longer span [D23]
    max_window: int = 32  # of the longest
    features: int = 128  # d, perceptual representation of a state
    goal: int = 32  # g, latent goal
    plan_categoricals: int = 32  # C, of the latent plan
    plan_classes: int = 32  # K, of each
    alpha_1: float = 0.1  # α₁, KL loss scale
    alpha_2: float = 3.0  # α₂, contrastive loss scale
    delta: float = 0.8  # δ, KL balancing [D1]
    gamma: float = 0.995  # γ, discount
    lam: float = 0.95  # λ, of the λ-return
    actor_lr: float = 2e-4  # learning rate, Adam
    critic_lr: float = 3e-4  # the same of the critic
    slow_critic_interval: int = 100  # steps between two copies of the critic
    # ------------------------------------------------------------------ Table I
    method: str = "lumos"  # one of METHODS: the paper's method or one of its three ablations
    # ------------------------------------------------------------------ App. B
    perceptual_hidden: int = 1024  # width of the perceptual encoder
    plan_hidden: int = 2048  # of plan proposal
    transformer_hidden: int = 2048  # of plan recognition's feed-forward layers
    actor_layers: int = 8  # hidden layers of the actor
    actor_hidden: int = 256  # their width
    critic_layers: int = 8  # hidden layers of the critic
    critic_hidden: int = 1024  # their width
    # ------------------------------------------------------------------ not in the paper
    goal_hidden: int = 2048  # width of the goal encoders [D7]
    transformer_features: int = 4096  # F, length of plan recognition's features of a window [D7]
    gradient_clip: float = 100.0  # largest norm of the gradient [D7]
    anneal: float = 0.0  # last part of the steps, over which both learning rates fall to 0 [D25]
    critic_gradient: bool = True  # the actor's gradient passes through the critic, too [D28]
    reset_start: float = 0.5  # how often a window starts from a state without history [D8]
    rephrase: bool = False  # a window's sentence may be any span's of the same task [D11]


PRESETS = {
    "paper": AgentConfig(),
    "sim": AgentConfig(
        batch_size=144, sequence_length=5, min_window=5, max_window=5,
        actor_lr=6e-4, critic_lr=6e-4, anneal=0.3, perceptual_hidden=256,
        plan_hidden=256, plan_categoricals=16, plan_classes=16, actor_layers=4, critic_layers=4,
        critic_hidden=256, goal_hidden=256, transformer_hidden=256, transformer_features=256,
        critic_gradient=False, rephrase=True,
    ),
}  # fmt: skip
PRESETS["tiny"] = replace(
    PRESETS["sim"], batch_size=32, features=64, plan_categoricals=8, plan_classes=8,
    perceptual_hidden=64, plan_hidden=64, goal_hidden=64, transformer_hidden=64,
    transformer_features=64, actor_hidden=64, critic_hidden=64,
)  # fmt: skip

# What `Policy` does at run time; train.py keeps it in the checkpoint [D8, D23].
POLICY_PRESETS = {
    "paper": {"replan": 30, "reset_on_replan": False},
    "sim": {"replan": 15, "reset_on_replan": True},
    "tiny": {"replan": 15, "reset_on_replan": True},
}


# ---------------------------------------------------------------------------- equations
def intrinsic_reward(s_E: Tensor, s_pi: Tensor) -> Tensor:
    """r^int_t(s^E_t, s^π_t) = s^E_t · s^π_t / max(‖s^E_t‖, ‖s^π_t‖)²

    s_E, s_pi: (..., k). Returns (...,), at most 1, and 1 only where the two are equal: unlike the
    cosine it also falls when one is longer. Two zero vectors give 0 instead of 0/0 [D3].
    """
    s_E, s_pi = s_E.float(), s_pi.float()
    longest = torch.maximum(s_E.square().sum(-1), s_pi.square().sum(-1))
    return (s_E * s_pi).sum(-1) / longest.clamp_min(1e-8)  # Eq. 3: r^int_t


def lambda_return(r: Tensor, v: Tensor, gamma: float, lam: float) -> Tensor:
    """V^λ_t = r_t + γ ((1-λ) v_ψ(s_{t+1}) + λ V^λ_{t+1}),   V^λ_H = v_ψ(s_H)   (App. B).

    r: (H, B) rewards of the H steps, v: (H+1, B) the slow critic's values of s_0 ... s_H [D18].
    Returns (H, B). λ = 0 is one-step TD, λ = 1 Monte Carlo with a bootstrap.
    """
    v_lambda, out = v[-1], []
    for t in reversed(range(len(r))):
        v_lambda = r[t] + gamma * ((1 - lam) * v[t + 1] + lam * v_lambda)
        out.append(v_lambda)
    return torch.stack(out[::-1])


def critic_loss(v: Tensor, target: Tensor) -> Tensor:
    """L(ψ) = E[ Σ_t ½ (v_ψ(ŝ_t) - sg(V^λ_t))² ],   t = 0 ... H-1 (the paper: from 1) [D9].

    v, target: (H, B) values v_ψ and V^λ, both standardised, so the loss is Eq. 5's divided by
    deviation² [D18]; a mean over H and B [D9].
    """
    return 0.5 * (v - target.detach()).square().mean()  # Eq. 5: L(ψ)


def actor_loss(
    v_lambda: Tensor, kl: Tensor, contrast: Tensor, alpha_1: float, alpha_2: float
) -> Tensor:
    """L(θ) = E[ Σ_τ ( -V_λ(s_τ) + α₁ L_KL + α₂ L_contrast ) ].

    v_lambda: (H, B), its gradient reaches the actor through the frozen dynamics; a mean over
    τ = 0 ... H-1 (the paper: a sum to H) and B [D9]. kl, contrast: () (contrast is 0 if fewer than
    two windows enter Eq. 8).
    """
    return -v_lambda.mean() + alpha_1 * kl + alpha_2 * contrast  # Eq. 6: L(θ)


# ---------------------------------------------------------------------------- modules
def layers(n_in: int, hidden: int, count: int) -> nn.Sequential:
    """`count` fully connected layers, each with LayerNorm (eps 1e-3) and ELU [D7]."""
    blocks = []
    for i, o in pairwise([n_in] + [hidden] * count):
        blocks += [nn.Linear(i, o), nn.LayerNorm(o, eps=1e-3), nn.ELU()]
    return nn.Sequential(*blocks)


class Actor(nn.Module):
    """Eq. 4: a_t ~ π_θ(a_t | s_t, g) (and the plan): a tanh-transformed Gaussian."""

    def __init__(self, n_in: int, hidden: int, count: int):
        super().__init__()
        self.body = layers(n_in, hidden, count)
        self.mean = P.Float32Linear(hidden, 7)
        self.log_std = P.Float32Linear(hidden, 7)
        with torch.no_grad():
            self.mean.weight.mul_(0.01)  # first actions around 0, not at tanh's flat ends [D7]

    def forward(self, x: Tensor, sample: bool = True) -> Tensor:
        """x: (..., k + g + C*K). Returns actions (..., 7) in (-1, 1); without `sample`, tanh(mean).

        Reparameterised: the noise is an input, so the reward's gradient reaches mean and std.
        """
        x = self.body(x)
        mean = self.mean(x)
        if not sample:
            return mean.tanh()
        log_std = 3.5 * self.log_std(x).tanh() - 1.5  # in [-5, 2] [D7]
        return (mean + log_std.exp() * torch.randn_like(mean)).tanh()


class Critic(nn.Module):
    """Eq. 4's second line: v_ψ(s_t, g) ≈ E[ Σ_t γ^t r^int_t ]. x (..., k + g) -> (...,).

    The paper's sum ends at t = H; being bootstrapped, this one goes on [D9]. With a mean reward
    r̄ = 0.8, returns are about r̄ / (1-γ) = 160 and differ between states by tenths only. So the
    network predicts (V - mean) / deviation, and `forward` undoes that [D18]. The mean is r̄ / (1-γ),
    as in "Reward centering" (Naik et al., 2024); the returns' own mean would have to bootstrap
    itself first. The deviation is that of V^λ, as in PopArt (van Hasselt et al., "Learning values
    across many orders of magnitude", 2016), which also corrects the last layer for each change;
    here the statistics move slowly enough without.
    """

    def __init__(self, n_in: int, hidden: int, count: int):
        super().__init__()
        self.net = nn.Sequential(layers(n_in, hidden, count), P.Float32Linear(hidden, 1))
        with torch.no_grad():
            self.net[1].weight.mul_(0.01)  # first values: close to the mean [D7]
        for name, value in (("mean", 0.0), ("deviation", 1.0), ("updates", 0.0)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean + self.deviation * self.standard_value(x)

    def standard_value(self, x: Tensor) -> Tensor:
        """The network's guess of `standardise(V)`."""
        return self.net(x)[..., 0]

    def standardise(self, v: Tensor) -> Tensor:
        return (v - self.mean) / self.deviation

    @torch.no_grad()
    def update_statistics(self, r: Tensor, v_lambda: Tensor, gamma: float) -> None:
        """Moves the statistics, over some 100 batches, towards those of all processes' r and V^λ
        (H, B). No .item(): it would wait for the GPU."""
        centred = v_lambda - self.mean
        means = [x.mean() for x in (r, centred, centred.square())]
        r_mean, v_mean, v_square = P.all_gather(torch.stack(means)[None]).mean(0)
        self.updates.add_(1).clamp_(max=1000)  # the rates need no more
        rate = self.updates.reciprocal().clamp_min(0.01)  # at first, the mean of all so far
        self.mean.lerp_(r_mean / (1 - gamma), rate)
        # The first batch's V^λ bootstrap from values around 0: only its rewards mean something.
        rate = torch.where(self.updates > 1, (self.updates - 1).reciprocal().clamp_min(0.01), 0.0)
        variance = self.deviation.square().lerp(v_square - v_mean.square(), rate)
        self.deviation.copy_(variance.clamp_min(1e-6).sqrt())


def critic_figures(v: Tensor, target: Tensor, deviation: Tensor) -> Batch:
    """R² () of standardised values v as guesses of the target, of one shape, and the spread () of
    both, times the deviation by which they were standardised."""
    spread, missed = target.std(correction=0), (v - target).square().mean()
    return {
        "critic_r2": 1 - missed / spread.square().clamp_min(1e-8),
        "value_std": v.std(correction=0) * deviation,
        "target_std": spread * deviation,
    }


class Agent(nn.Module):
    """Everything that phase two trains: plan networks, goal encoders, actor and critic."""

    def __init__(self, config: AgentConfig, k: int):
        """k: the world model's latent dimensions."""
        super().__init__()
        self.config = c = config
        if c.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {c.method!r}")
        if not 2 <= c.min_window <= c.max_window <= c.sequence_length:
            raise ValueError("need 2 <= min_window <= max_window <= sequence_length")
        if c.batch_size < 2:
            raise ValueError("batch_size must be 2 or more: a play and a language window [D6]")
        if c.features % 8:
            raise ValueError("features must be a multiple of 8, the transformer's heads [D7]")
        shape = (c.plan_categoricals, c.plan_classes)
        self.perceptual = P.PerceptualEncoder(k, c.perceptual_hidden, c.features)
        self.goal_language = P.GoalEncoder(384, c.goal_hidden, c.goal)
        self.goal_latent = P.GoalEncoder(c.features, c.goal_hidden, c.goal)
        self.recognition = P.PlanRecognition(
            c.sequence_length, c.features, c.transformer_hidden, c.transformer_features, shape
        )
        self.proposal = P.PlanProposal(c.features, c.goal, c.plan_hidden, shape)
        self.alignment = P.Alignment(c.transformer_features, c.goal)
        # No latent plan: proposal and plan are left out; recognition's features still align [D15].
        self.with_plan = c.method != "no_latent_plan"
        n_plan = c.plan_categoricals * c.plan_classes if self.with_plan else 0
        self.actor = Actor(k + c.goal + n_plan, c.actor_hidden, c.actor_layers)
        # The critic sees state and goal, as Eq. 4 says; a target network follows it slowly.
        self.critic = Critic(k + c.goal, c.critic_hidden, c.critic_layers)
        self.slow_critic = Critic(k + c.goal, c.critic_hidden, c.critic_layers)
        self.slow_critic.requires_grad_(False)
        self.update_slow_critic()

    def update_slow_critic(self) -> None:
        """A hard copy, every `slow_critic_interval` updates [D18]."""
        self.slow_critic.load_state_dict(self.critic.state_dict())

    def actor_parameters(self) -> list[nn.Parameter]:
        """θ: everything but the two critics."""
        return [p for n, p in self.named_parameters() if "critic" not in n]

    # ------------------------------------------------------------------ goals and plans
    def encode(self, s_E: Tensor, language: Batch, gather=None) -> tuple[Tensor, Tensor, Batch]:
        """Windows s_E (T, B, k), those of `language` last -> goals g (B, g), recognised plans
        (B, C*K), and Eq. 6's other terms: plan KL, contrastive loss, and its accuracy.

        gather: plan.all_gather, to compare sentences with all processes' windows in Eq. 8.
        """
        n, c = s_E.shape[1] - len(language["emb"]), self.config  # n windows of play come first
        V = self.perceptual(s_E)  # (T, B, d)
        # Hindsight relabelling (Sec. III): a window's goal is its own end, or what was said of it.
        # V[-1] is a short window's end, too: its padding repeats it [D14].
        g = torch.cat([self.goal_latent(V[-1, :n]), self.goal_language(language["emb"])])
        # Recognition sees the whole window; the KL teaches proposal, from its start, to agree.
        q, features = self.recognition(V)
        zero = q.new_zeros(())
        plan, kl = q.new_zeros(len(q), 0), zero  # no plan
        if self.with_plan:
            p = self.proposal(V[0], g)
            plan, kl = P.sample_straight_through(q), P.kl_balanced(q, p, c.delta).mean()
        # Play windows have no sentence; of the others, those with `align` enter Eq. 8 [D11].
        contrast = accuracy = zero
        if c.method != "no_alignment":
            contrast, accuracy = self.alignment(features[n:], g[n:], language["align"], gather)
        return g, plan, {"plan_kl": kl, "contrast": contrast, "alignment_accuracy": accuracy}

    def propose(self, s: Tensor, g: Tensor) -> Tensor:
        """A plan (B, C*K) from the present s (B, k) alone, as at run time; (B, 0) without plans."""
        if not self.with_plan:
            return s.new_zeros(len(s), 0)
        return P.sample_straight_through(self.proposal(self.perceptual(s), g))

    # ------------------------------------------------------------------ practice
    def imagine(self, world, s_0: Tensor, g: Tensor, plan: Tensor, steps: int):
        """Acts for `steps` steps inside the frozen world model, from s_0 (B, k).

        Returns s_pi (steps + 1, B, k), s_0 first, and a (steps, B, 7), both differentiable.
        """
        context = torch.cat([g, plan], -1)
        h, z = world.split(s_0)
        s_pi, actions = [s_0], []
        for _ in range(steps):
            a = self.actor(torch.cat([s_pi[-1], context], -1))  # Eq. 4's first line
            h, z = world.imagine_step(h, z, a)
            actions.append(a)
            s_pi.append(torch.cat([h, z], -1))
        return torch.stack(s_pi), torch.stack(actions)

    def losses(self, world, play: Batch, language: Batch) -> tuple[Tensor, Tensor, Batch]:
        """One batch -> scalars L(θ) and L(ψ), figures. Imagination begins at the first states [D8].

        In training mode it also moves the critics' running statistics, as BatchNorm moves its own.
        """
        c, batch = self.config, join(play, language)
        s_E = batch["s_E"]

        # Goals and plans in hindsight, the plan networks' KL, and Eq. 8.
        g, plan, terms = self.encode(s_E, language, P.all_gather)
        if c.method == "no_ditto":
            return self.clone_loss(batch, g, plan, terms)

        # The actor practises for H steps in the frozen world model ...
        s_pi, a = self.imagine(world, s_E[0], g, plan, len(s_E) - 1)
        # ... and r_t rewards a_t by the states that it leads to, s_t+1 (Eq. 3 has s_t) [D9].
        r = intrinsic_reward(s_E[1:], s_pi[1:])  # (H, B)

        # V^λ is Eq. 5's target and Eq. 6's aim, both with the slow critic's values [D18]. With
        # critic_gradient, its gradient also reaches s_pi and g through the critic's input [D28].
        x = torch.cat([s_pi, g.expand(len(s_pi), -1, -1)], -1)
        v_slow = self.slow_critic(x if c.critic_gradient else x.detach())
        v_lambda = lambda_return(r, v_slow, c.gamma, c.lam)

        # The critic regresses V^λ, both sides standardised [D18].
        v = self.critic.standard_value(x[:-1].detach())
        target = self.critic.standardise(v_lambda.detach())
        loss_critic = critic_loss(v, target)
        # The actor maximises V^λ, through the dynamics; plan networks and goal encoders learn, too.
        kl, contrast = terms["plan_kl"], terms["contrast"]
        loss_actor = actor_loss(v_lambda, kl, contrast, c.alpha_1, c.alpha_2)

        figures = {"reward": r.mean(), "v_lambda": v_lambda.mean()} | terms
        figures |= critic_figures(v.detach(), target, self.critic.deviation)
        figures["action_mse"] = (a - batch["a"][:-1]).square().mean()
        figures |= {"loss_actor": loss_actor, "loss_critic": loss_critic}
        if self.training:
            self.critic.update_statistics(r, v_lambda, c.gamma)
            # Both critics have the new mean. The slow one keeps the deviation that its weights were
            # copied with; Eq. 6's gradient, which is computed after this, needs it unchanged, too.
            self.slow_critic.mean.copy_(self.critic.mean)
        return loss_actor, loss_critic, {k: x.detach() for k, x in figures.items()}

    def clone_loss(self, batch: Batch, g: Tensor, plan: Tensor, terms: Batch):
        """No DITTO (Table I): the squared error of sampled actions on the expert's latents takes
        -V_λ's place in Eq. 6, and nothing is imagined [D15]. Returns as `losses`, with L(ψ) = 0."""
        c, s_E = self.config, batch["s_E"]
        context = torch.cat([g, plan], -1).expand(len(s_E) - 1, -1, -1)
        a = self.actor(torch.cat([s_E[:-1], context], -1))
        error = (a - batch["a"][:-1]).square().mean(-1)  # (H, B)
        kl, contrast = terms["plan_kl"], terms["contrast"]
        # Eq. 6 with the negative error in the place of V_λ.
        loss = actor_loss(-error, kl, contrast, c.alpha_1, c.alpha_2)
        figures = terms | {"action_mse": error.mean(), "loss_actor": loss}
        return loss, loss.new_zeros(()), {k: x.detach() for k, x in figures.items()}


def join(play: Batch, language: Batch) -> Batch:
    """What play and language windows both have, play first, along B."""
    shared = [k for k in play if k in language]
    return {k: torch.cat([play[k], language[k]], 0 if play[k].dim() == 1 else 1) for k in shared}


class Policy:
    """The trained agent in an environment: `reset()` at each instruction, then `act` at each step.

    Filters observations through the world model, samples a plan from the proposal every `replan`
    steps [D13, D23], and thresholds the gripper, before it is sent and before it is fed back [D12].
    """

    def __init__(
        self, world, agent: Agent, skip: int = 1, sample: bool = True, replan: int = 30,
        reset_on_replan: bool = False,
    ):  # fmt: skip
        """skip: simulator steps that the caller holds each action for (30 Hz / the data's rate).
        sample: sample actions, as the paper says, or take tanh of the mean [D13].
        reset_on_replan: each plan starts from the present image alone, without history [D8]."""
        self.world, self.agent, self.skip, self.sample = world.eval(), agent.eval(), skip, sample
        self.replan, self.reset_on_replan = replan, reset_on_replan
        self.reset()

    def reset(self) -> None:
        """A new instruction: forget the past, and propose a plan at the next step."""
        self.steps, self.plan = 0, None
        self.forget()

    def forget(self) -> None:
        """h = z = 0, and `no action` before the next step."""
        self.state = self.world.initial(1)
        self.a_prev = torch.tensor([[NO_ACTION]], device=self.state[0].device)  # (1, 1, 7)

    @torch.no_grad()
    def act(self, obs: dict, embedding):
        """obs: the environment's, with images (64, 64, 3) uint8. embedding: (384,).
        obs None: nothing is seen, the world model imagines what its last action led to.

        Returns a numpy array of 7: the arm's six in (-1, 1), the gripper -1 (close) or 1 (open).
        """

        def tensor(x, dtype=None) -> Tensor:
            return torch.as_tensor(x, dtype=dtype, device=self.a_prev.device)[None]

        new_plan = self.steps % self.replan == 0
        if new_plan and self.reset_on_replan and obs is not None:  # a dream has no image
            self.forget()
        if obs is None:
            self.state = self.world.imagine_step(*self.state, self.a_prev[0])
        else:
            batch = {k: tensor(x)[None] for k, x in obs["rgb_obs"].items()}  # (1, 1, 64, 64, 3)
            if "robot_obs" in obs:  # cameras are enough for the paper's world model
                batch["robot_obs"] = tensor(obs["robot_obs"], torch.float32)[None]
            batch["a_prev"], batch["reset"] = self.a_prev, torch.zeros_like(self.a_prev[..., 0]) > 0
            h, z, _ = self.world.filter(batch, self.state)
            self.state = (h[-1], z[-1])
        s = torch.cat(self.state, -1)  # (1, k)
        g = self.agent.goal_language(tensor(embedding, torch.float32))
        if new_plan:
            self.plan = self.agent.propose(s, g)
        a = self.agent.actor(torch.cat([s, g, self.plan], -1), self.sample)
        a[:, 6] = torch.where(a[:, 6] > 0, 1.0, -1.0)
        self.a_prev, self.steps = a[None], self.steps + 1
        return a[0].cpu().numpy()
