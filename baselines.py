"""GCBC, MCIL and HULC, which LUMOS is compared with. LUMOS Sec. V-A, App. B, C, Table I.

    symbol   code      shape              meaning
    x_t      rgb_*     (T, B, 64, 64, 3)  images of the static and of the gripper camera   App. C
    V        V         (T, B, d)          perceptual representation of the window          App. B
    l        emb       (B, 384)           sentence embedding (paraphrase-MiniLM-L3-v2)     App. B
    g        g         (B, g)             latent goal, of a sentence or a last image       App. B
             plan      (B, n)             latent plan; n = 0 without one                   App. B
    a_t      a         (T, B, 7)          actions: arm in [-1, 1], gripper -1 or 1         App. D

             plan         recognition   alignment
    GCBC     none         none          off         the decoder sees V and g only
    MCIL     gaussian     birnn         off         a plan, recognised by hindsight
    HULC     categorical  transformer   on          plan.py's parts, which LUMOS took over

    training:  x_0..x_T-1 -> V -> recognition -> plan      (hindsight: sees all of it)
    run time:  x_0 -> v_0, goal -> g -> proposal -> plan   (the KL teaches it to agree)
    both:      decoder(v_0..v_t, g, plan) -> p(a_t)        (regresses the actions of the play)

[B1] to [B10] mark what differs from the paper or from HULC's code (github lukashermann/hulc).
Copy this file together with plan.py. Needs: torch.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence

import plan as P

CAMERAS = ("rgb_static", "rgb_gripper")
PLANS = ("none", "gaussian", "categorical")
RECOGNITIONS = ("none", "birnn", "transformer")


@dataclass(frozen=True)
class BaselineConfig:
    """HULC's numbers, in the row order of Table IV; below the line, what that table has not."""

    batch_size: int = 512  # half play windows and half language windows
    sequence_length: int = 32  # T, frames, with the padding
    min_window: int = 20  # frames of the shortest window
    max_window: int = 32  # of the longest
    features: int = 128  # d, half of it from each camera
    goal: int = 32  # g, latent goal
    plan_categoricals: int = 32  # C, of a categorical plan
    plan_classes: int = 32  # K, of each
    plan_gaussian: int = 256  # numbers of a Gaussian plan
    alpha_1: float = 0.01  # KL loss scale; LUMOS: 0.1
    alpha_2: float = 3.0  # contrastive loss scale
    delta: float = 0.8  # KL balancing of a categorical plan [B6]
    lr: float = 2e-4  # learning rate, Adam
    # ------------------------------------------------------------------ Table I: METHODS
    plan: str = "categorical"  # one of PLANS
    recognition: str = "transformer"  # one of RECOGNITIONS
    alignment: bool = True  # with the contrastive loss
    # ------------------------------------------------------------------ App. B, C
    plan_hidden: int = 2048  # width of plan proposal
    decoder_hidden: int = 2048  # width of the action decoder's layers
    mixtures: int = 10  # logistics of the mixture
    classes: int = 10  # per arm dimension, of MCIL too [B3]
    shift: int = 3  # pixels, of the augmentation at most
    # ------------------------------------------------------------------ HULC's code
    encoder_depth: int = 32  # channels of the first convolution
    encoder_hidden: int = 512  # width of its linear layer
    goal_hidden: int = 2048  # width of the goal encoders
    birnn_hidden: int = 2048  # width of plan recognition, recurrent
    transformer_hidden: int = 2048  # width of its feed-forward layers
    transformer_features: int = 4096  # length of what it says of the window
    # ------------------------------------------------------------------ as in AgentConfig
    anneal: float = 0.0  # last part of the steps, over which the learning rate falls to 0
    rephrase: bool = False  # a window's sentence: of any span of its task, not just its own [D11]


METHODS = {  # replace(PRESETS[preset], **METHODS[stage])
    "gcbc": {"plan": "none", "recognition": "none", "alignment": False},  # [B4]
    "mcil": {"plan": "gaussian", "recognition": "birnn", "alignment": False},
    "hulc": {"plan": "categorical", "recognition": "transformer", "alignment": True},
}
PRESETS = {
    "paper": BaselineConfig(),
    "sim": BaselineConfig(
        batch_size=64, sequence_length=16, min_window=10, max_window=16, plan_categoricals=16,
        plan_classes=16, plan_gaussian=64, lr=5e-4, plan_hidden=256, decoder_hidden=512,
        encoder_depth=16, encoder_hidden=256, goal_hidden=256, birnn_hidden=256,
        transformer_hidden=256, transformer_features=256, anneal=0.3, rephrase=True,
    ),
}  # fmt: skip
PRESETS["tiny"] = replace(
    PRESETS["sim"], batch_size=16, sequence_length=8, min_window=6, max_window=8, features=64,
    plan_categoricals=8, plan_classes=8, plan_gaussian=16, plan_hidden=64, decoder_hidden=128,
    encoder_depth=8, encoder_hidden=64, goal_hidden=64, birnn_hidden=64, transformer_hidden=64,
    transformer_features=64,
)  # fmt: skip
POLICY_PRESETS = {"paper": {"replan": 30}, "sim": {"replan": 15}, "tiny": {"replan": 8}}


# ---------------------------------------------------------------------------- equations
def log_likelihood(a: Tensor, logits: Tensor, mean: Tensor, log_s: Tensor, classes: int) -> Tensor:
    """log p(a) = Σ_d log Σ_m π_m [ σ((a_d + w - μ_m) / s_m) - σ((a_d - w - μ_m) / s_m) ].

    The discretised mixture of logistics on [-1, 1]: a class reaches w = 1 / (classes - 1) to either
    side of its centre, the first one to -∞ and the last one to +∞, so that all sum to one.
    a: (..., D); logits (of π), mean (μ), log_s (of s): (..., D, M). Returns (...,), summed
    over D. HULC's code approximates where a class has next to no probability, this is exact [B8].
    """
    a, w, s_inverse = a[..., None], 1 / (classes - 1), torch.exp(-log_s)
    # σ(u) - σ(l) = σ(u) σ(-l) (1 - exp(l - u)): three factors, whose logarithms never overflow
    log_below = F.logsigmoid((a + w - mean) * s_inverse)
    log_above = F.logsigmoid(-(a - w - mean) * s_inverse)
    log_class = log_below + log_above + torch.log(-torch.expm1(-2 * w * s_inverse))
    log_class = torch.where(a < -1 + 1e-3, log_below, log_class)
    log_class = torch.where(a > 1 - 1e-3, log_above, log_class)
    return (logits.log_softmax(-1) + log_class).logsumexp(-1).sum(-1)


def sample_mixture(logits: Tensor, mean: Tensor, log_s: Tensor) -> Tensor:
    """(..., D, M) each -> (..., D) in [-1, 1]: a component by its π, then its inverse CDF at a
    uniform number. What falls outside is clipped [B9]."""
    component = Categorical(logits=logits).sample()[..., None]
    mean, log_s = (x.gather(-1, component)[..., 0] for x in (mean, log_s))
    noise = torch.logit(torch.rand_like(mean), eps=1e-5)
    return (mean + log_s.exp() * noise).clamp(-1, 1)


def gaussian(statistics: Tensor) -> Normal:
    """(..., 2, n), means and standard deviations before their softplus -> n Gaussians."""
    mean, std = statistics.unbind(-2)
    return Normal(mean, F.softplus(std) + 1e-4, validate_args=False)


def shifted(images: Tensor, offset: Tensor) -> Tensor:
    """Images (N, S, S, 3), each moved by offset (N, 2) whole pixels to the right and down; its edge
    fills the gap. At whole pixels bilinear interpolation gives the pixels themselves [B1]."""
    n, S = torch.arange(len(images), device=images.device), images.shape[1]
    pixel = torch.arange(S, device=images.device)
    column, row = ((pixel - x[:, None]).clamp(0, S - 1) for x in offset.unbind(-1))  # (N, S)
    return images[n[:, None, None], row[:, :, None], column[:, None, :]]


# ---------------------------------------------------------------------------- modules
class CameraEncoder(nn.Module):
    """Images (N, 64, 64, 3) uint8 -> (N, n_out); App. C's convolutions leave maps of 7 x 7.

    Static camera: a spatial softmax says where each of the channels is most active. Gripper camera:
    a fully connected layer of 128 in its place. Then HULC's two layers and LayerNorm.
    """

    def __init__(self, depth: int, hidden: int, n_out: int, spatial_softmax: bool):
        super().__init__()
        channels = 2 * depth
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, depth, 4, 2), nn.ReLU(inplace=True),
            nn.Conv2d(depth, channels, 2, 2), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 2, 2), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.flat = None if spatial_softmax else nn.Linear(channels * 7 * 7, 128)
        n_in = 2 * channels if spatial_softmax else 128
        self.head = nn.Sequential(P.mlp(n_in, hidden, 1, n_out), nn.LayerNorm(n_out))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.convolutions(images.permute(0, 3, 1, 2).float() / 127.5 - 1)  # (N, C, 7, 7)
        if self.flat is not None:
            return self.head(self.flat(maps.flatten(1)).relu())
        share = maps.float().flatten(-2).softmax(-1).unflatten(-1, maps.shape[-2:])
        at = torch.linspace(-1, 1, maps.shape[-1], device=maps.device)
        x, y = (share.sum(-2) * at).sum(-1), (share.sum(-1) * at).sum(-1)  # (N, C) each
        return self.head(torch.cat([x, y], -1))


class BiRNNRecognition(nn.Module):
    """MCIL's: the whole window V (T, B, d) -> plan statistics (B, 2, n) and features (B, F).

    Two layers; the features are the last state of either direction: both saw the window [B7].
    """

    def __init__(self, d: int, hidden: int, plan: tuple[int, int]):
        super().__init__()
        self.plan = plan
        self.rnn = nn.RNN(d, hidden, 2, bidirectional=True)
        self.statistics = P.Float32Linear(2 * hidden, plan[0] * plan[1])

    def forward(self, V: Tensor) -> tuple[Tensor, Tensor]:
        _, state = in_fp32(self.rnn, V)
        features = torch.cat([state[-2], state[-1]], -1)  # the last layer, forwards and backwards
        return self.statistics(features).unflatten(-1, self.plan), features


class ActionDecoder(nn.Module):
    """V (T, B, d), g (B, g), plan (B, n) -> p(a_t): two recurrent layers of 2048 with ReLU, 10
    logistics per arm dimension and two classes of the gripper. All of d is seen [B2]."""

    def __init__(self, n_in: int, hidden: int, mixtures: int):
        super().__init__()
        self.rnn = nn.RNN(n_in, hidden, 2, nonlinearity="relu")
        self.arm = P.Float32Linear(hidden, 3 * 6 * mixtures)
        self.gripper = P.Float32Linear(hidden, 2)

    def forward(self, V: Tensor, g: Tensor, plan: Tensor, state: Tensor | None = None):
        """Returns the mixture (logits, mean, log_s), each (T, B, 6, M), the gripper's logits
        (T, B, 2), close first, and the recurrent state to go on from."""
        context = torch.cat([g, plan], -1).expand(len(V), -1, -1)
        x, state = in_fp32(self.rnn, torch.cat([V, context], -1), state)
        logits, mean, log_s = self.arm(x).unflatten(-1, (3, 6, -1)).unbind(-3)
        return (logits, mean, log_s.clamp_min(-7)), self.gripper(x), state


def in_fp32(rnn: nn.RNN, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Without autocast, whose recurrent layers on a GPU are float16 and would need a loss scale."""
    with P.without_autocast(x):
        return rnn(x.float(), state)


class Baseline(nn.Module):
    """One policy with three switches: GCBC, MCIL or HULC."""

    def __init__(self, config: BaselineConfig):
        super().__init__()
        c = config
        if c.plan not in PLANS or c.recognition not in RECOGNITIONS:
            got = f"got plan {c.plan!r} and recognition {c.recognition!r}"
            raise ValueError(f"{got}, expected one of {PLANS} and one of {RECOGNITIONS}")
        if c.recognition == "none" and (c.plan != "none" or c.alignment):
            raise ValueError("a plan and the alignment need a recognition, birnn or transformer")
        if c.features % 16:
            raise ValueError("features must be a multiple of 16: 2 cameras, 8 attention heads")
        self.config, d = config, c.features
        sizes = (c.encoder_depth, c.encoder_hidden, d // 2)
        self.encoders = nn.ModuleDict({k: CameraEncoder(*sizes, k == CAMERAS[0]) for k in CAMERAS})
        self.goal_language = P.GoalEncoder(384, c.goal_hidden, c.goal)
        self.goal_image = P.GoalEncoder(d, c.goal_hidden, c.goal)
        categorical = (c.plan_categoricals, c.plan_classes)
        shape = categorical if c.plan == "categorical" else (2, c.plan_gaussian)
        n_plan = {"none": 0, "gaussian": shape[1], "categorical": shape[0] * shape[1]}[c.plan]
        features = c.transformer_features
        if c.recognition == "birnn":
            features = 2 * c.birnn_hidden
            self.recognition = BiRNNRecognition(d, c.birnn_hidden, shape)
        if c.recognition == "transformer":
            self.recognition = P.PlanRecognition(
                c.sequence_length, d, c.transformer_hidden, features, shape
            )
        if c.plan != "none":
            self.proposal = P.PlanProposal(d, c.goal, c.plan_hidden, shape)
        if c.alignment:
            self.alignment = P.Alignment(features, c.goal)
        self.decoder = ActionDecoder(d + c.goal + n_plan, c.decoder_hidden, c.mixtures)

    # ------------------------------------------------------------------ parts
    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """rgb_static, rgb_gripper (T, B, 64, 64, 3) uint8 -> V (T, B, d). In training every image
        is shifted at random by 0 to 3 pixels, the only augmentation (App. C) [B1]."""
        V, most = [], self.config.shift
        for name, encoder in self.encoders.items():
            images = batch[name].flatten(0, 1)
            if self.training:
                offset = torch.randint(-most, most + 1, (len(images), 2), device=images.device)
                images = shifted(images, offset)
            V.append(encoder(images).unflatten(0, batch[name].shape[:2]))
        return torch.cat(V, -1)

    def sample_plan(self, statistics: Tensor) -> Tensor:
        """What recognition or proposal say, (B, C, K) or (B, 2, n) -> a plan (B, C*K) or (B, n),
        with a straight-through or a reparameterised gradient."""
        if self.config.plan == "categorical":
            return P.sample_straight_through(statistics)
        return gaussian(statistics).rsample()

    def plan_kl(self, q: Tensor, p: Tensor) -> Tensor:
        """D_KL(q ‖ p) (B,) from recognition q to proposal p; only HULC balances it [B6]."""
        if self.config.plan == "categorical":
            return P.kl_balanced(q, p, self.config.delta)
        return kl_divergence(gaussian(q), gaussian(p)).sum(-1)

    def action_nll(self, V: Tensor, g: Tensor, plan: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(a) () of the arm, summed over its dimensions, and of the gripper; means over T, B.
        The held end of short windows counts, too: it teaches to stay at the goal [D14]."""
        mixture, gripper, _ = self.decoder(V, g, plan)
        arm_nll = -log_likelihood(a[..., :6], *mixture, self.config.classes).mean()
        opens = (a[..., 6] > 0).long()
        return arm_nll, F.cross_entropy(gripper.flatten(0, 1), opens.flatten())

    # ------------------------------------------------------------------ HULC's loss
    def loss(self, play: dict[str, Tensor], language: dict[str, Tensor]):
        """mean of both modalities ( -log p(a) + α₁ L_KL ) + α₂ L_contrast -> loss (), figures.

        play, language: as many windows of either, rgb_static, rgb_gripper (T, B, 64, 64, 3) uint8,
        a (T, B, 7); language also emb (B, 384), align (B,) bool: which windows are aligned [D11].
        """
        c, B = self.config, len(language["emb"])
        V = torch.cat([self.encode(play), self.encode(language)], 1)  # (T, 2B, d)
        a = torch.cat([play["a"], language["a"]], 1)
        g = torch.cat([self.goal_image(V[-1, :-B]), self.goal_language(language["emb"])])

        plan, zero = V[0, :, :0], V.new_zeros(())
        kl, contrast, accuracy = zero, zero, zero
        if c.recognition != "none":
            q, features = self.recognition(V)
        if c.plan != "none":
            p = self.proposal(V[0], g)
            plan, kl = self.sample_plan(q), self.plan_kl(q, p).mean()
        if c.alignment:
            gather = P.all_gather if self.training else None  # all processes' negatives [B10]
            contrast, accuracy = self.alignment(features[-B:], g[-B:], language["align"], gather)

        arm, gripper = self.action_nll(V, g, plan, a)
        loss = arm + gripper + c.alpha_1 * kl + c.alpha_2 * contrast
        figures = {"plan_kl": kl, "contrast": contrast, "alignment_accuracy": accuracy}
        figures |= {"arm_nll": arm, "gripper_nll": gripper, "loss": loss}
        if not self.training and c.plan != "none":  # the plan that run time has
            arm, gripper = self.action_nll(V, g, self.sample_plan(p), a)
            figures |= {"arm_nll_proposed": arm, "gripper_nll_proposed": gripper}
        return loss, {k: x.detach() for k, x in figures.items()}


class BaselinePolicy:
    """The trained policy: `reset()` at each instruction, then `act`. Every `replan` steps it
    proposes a plan from what it sees then, and its decoder forgets what it saw before [B5]."""

    def __init__(self, model: Baseline, skip: int = 1, replan: int = 30):
        """skip: simulator steps that each action is held for (30 Hz / the data's rate)."""
        self.model, self.skip, self.replan = model.eval(), skip, replan
        self.reset()

    def reset(self) -> None:
        """A new instruction: forget the past, and propose a plan at the next step."""
        self.steps, self.plan, self.state = 0, None, None

    @torch.no_grad()
    def act(self, obs: dict, embedding):
        """obs: the environment's, with images (64, 64, 3) uint8. embedding: (384,).

        Returns a numpy array of 7: the arm's six in [-1, 1], the gripper -1 (close) or 1 (open).
        """
        model, device = self.model, next(self.model.parameters()).device
        images = {k: torch.as_tensor(obs["rgb_obs"][k], device=device)[None, None] for k in CAMERAS}
        V = model.encode(images)  # (1, 1, d)
        emb = torch.as_tensor(embedding, dtype=torch.float32, device=device)
        g = model.goal_language(emb[None])
        if self.steps % self.replan == 0:
            self.plan, self.state = V[0, :, :0], None
            if model.config.plan != "none":
                self.plan = model.sample_plan(model.proposal(V[0], g))
        mixture, gripper, self.state = model.decoder(V, g, self.plan, self.state)
        arm = sample_mixture(*mixture)  # (1, 1, 6)
        opens = 2.0 * gripper.argmax(-1, keepdim=True) - 1
        self.steps += 1
        return torch.cat([arm, opens], -1)[0, 0].cpu().numpy()
