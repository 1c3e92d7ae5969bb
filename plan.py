"""Latent plans, goals and their alignment with language. LUMOS Sec. IV-B, App. B, Eqs. 7, 8.

    symbol   code      shape        meaning
    s_t      s         (T, B, k)    latent states of a window                      Eq. 1
    V        V         (T, B, d)    perceptual representation of the window        App. B
    l        emb       (M, 384)     sentence embedding (paraphrase-MiniLM-L3-v2)   App. B
    g        g         (B, g)       latent goal, of a sentence or the last V       Sec. IV-B
             features  (B, F)       the transformer's features of the window       App. B
             plan      (B, C*K)     latent plan: C one-hot categoricals, flat      Sec. IV-B
    x_i, y_j x, y      (M, 32)      projections of features and of language goals  Eq. 8
    τ        tau       ()           trainable logarithm of 1 / temperature         Eq. 8

    training:  window s_0..s_T-1 -> V -> recognition -> plan      (hindsight: sees all of it)
    run time:  s_0 -> v_0, goal -> g  -> proposal    -> plan      (the KL teaches it to agree)

Copy this file alone. Needs: torch.

>>> import torch
>>> from plan import *
>>> V = PerceptualEncoder(k=40, hidden=64, d=32)(torch.randn(8, 4, 40))  # T = 8, B = 4
>>> g = GoalEncoder(384, hidden=64, goal=16)(torch.randn(4, 384))  # of sentences
>>> recognised, features = PlanRecognition(8, 32, 64, 48, plan=(4, 8))(V)
>>> proposed = PlanProposal(32, goal=16, hidden=64, plan=(4, 8))(V[0], g)
>>> kl = kl_balanced(recognised, proposed, delta=0.8).mean()  # Eq. 7
>>> sample_straight_through(recognised).shape
torch.Size([4, 32])
"""

import math
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


# ---------------------------------------------------------------------------- equations
def kl_balanced(q: Tensor, p: Tensor, delta: float) -> Tensor:
    """D_KL(q ‖ p) = (1-δ) D_KL(q ‖ sg(p)) + δ D_KL(sg(q) ‖ p)   with δ on the prior's term [D1].

    Here q is the recognised plan and p the proposed one: (..., C, K) logits. Returns (...,),
    summed over the C categoricals. The same function stands in world_model.py; a test says so.
    """

    def kl(q: Tensor, p: Tensor) -> Tensor:
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1))

    q, p = q.float(), p.float()
    # Eq. 7, again: recognition moves slowly towards proposal, then proposal fast to recognition
    return (1 - delta) * kl(q, p.detach()) + delta * kl(q.detach(), p)


def contrastive_loss(x: Tensor, y: Tensor, tau: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """½ ( mean_i CE(logits_per_latent(i), i) + mean_i CE(logits_per_text(i), i) ),
    logit(x_i, y_j) = cos_sim(x_i, y_j) · exp(τ).

    x: (M, n) latent features, y: (M, n) language features of the same M windows; only the diagonal
    pairs are true. mask (M,) bool: which windows take part. The others are masked, since boolean
    indexing makes the CPU wait for the GPU. Means over those that take part, where the paper prints
    sums [D9]. Returns the loss () and the accuracy (): how often a window's own sentence scores
    highest, ties with equal sentences included; zeros where fewer than two take part.
    """
    with without_autocast(x):
        logits = F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T * tau.exp()
    logits = logits.masked_fill(~(mask[:, None] & mask), -1e9)
    pairs = torch.arange(len(x), device=x.device).masked_fill(~mask, -100)  # -100 is ignored
    count = mask.sum().clamp(min=1)
    per_latent = F.cross_entropy(logits, pairs, reduction="sum") / count  # rows: latents
    per_text = F.cross_entropy(logits.T, pairs, reduction="sum") / count  # rows: sentences
    loss = 0.5 * (per_latent + per_text)  # Eq. 8: L_contrast
    found = (logits.diagonal() >= logits.amax(-1) - 1e-3) & mask  # ties count
    return loss, found.sum() / count * (count > 1)


def sample_straight_through(logits: Tensor) -> Tensor:
    """One-hot samples (..., C*K) of the logits (..., C, K), with the gradient of the probabilities.

    As in world_model.py; a test compares the two.
    """
    probabilities = logits.float().softmax(-1)
    u = torch.rand_like(probabilities[..., :1])  # inverse of the cumulative distribution
    index = (probabilities.cumsum(-1) < u).sum(-1).clamp_max(logits.shape[-1] - 1)
    sample = F.one_hot(index, logits.shape[-1]).to(probabilities.dtype)
    return (sample + probabilities - probabilities.detach()).flatten(-2)


def all_gather(x: Tensor) -> Tensor:
    """The rows (M, ...) of all processes that train together; alone, x itself. All must call it.

    Every process has the whole loss, and keeps the gradient of its own rows, times the number of
    processes, because DistributedDataParallel averages: together, one process's gradient with
    all rows. (torch's differentiable all_gather does the same by a second collective, and warns.)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x + (len(parts) - 1) * (x - x.detach())
    return torch.cat(parts)


# ---------------------------------------------------------------------------- modules
def without_autocast(x: Tensor) -> torch.autocast:
    """For logits and losses: bf16's 8 bits of precision are too few for them."""
    return torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False)


class Float32Linear(nn.Linear):
    """A linear layer that stays fp32 under autocast; as in world_model.py, a test compares them."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


def mlp(n_in: int, hidden: int, layers: int, n_out: int, last=nn.Linear) -> nn.Sequential:
    """`layers` fully connected layers with ReLU, then a linear one to n_out."""
    blocks = []
    for i, o in pairwise([n_in] + [hidden] * layers):
        blocks += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*blocks, last(hidden, n_out))


class PerceptualEncoder(nn.Module):
    """Latents (..., k) -> V (..., d): two layers, hidden size 1024; ends in a LayerNorm [D7]."""

    def __init__(self, k: int, hidden: int, d: int):
        super().__init__()
        self.net = nn.Sequential(mlp(k, hidden, 1, d), nn.LayerNorm(d))

    def forward(self, s: Tensor) -> Tensor:
        return self.net(s)


class GoalEncoder(nn.Module):
    """A goal (B, n) -> g (B, g). One for sentences (n = 384), one for the window's last V (n = d).

    Two hidden layers of 2048 as in HULC, and a LayerNorm at the end [D7].
    """

    def __init__(self, n_in: int, hidden: int, goal: int):
        super().__init__()
        self.net = nn.Sequential(mlp(n_in, hidden, 2, goal), nn.LayerNorm(goal))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PlanRecognition(nn.Module):
    """The whole window V (T, B, d) -> plan logits (B, C, K) and features (B, F).

    A transformer encoder of two blocks and eight heads over V plus a learned position; feed-forward
    2048, dropout 0.1, a linear layer to F = 4096 and the mean over time [D7].
    """

    def __init__(self, T: int, d: int, feedforward: int, features: int, plan: tuple[int, int]):
        super().__init__()
        self.plan = plan
        self.position = nn.Parameter(torch.randn(T, 1, d) * 0.02)
        block = nn.TransformerEncoderLayer(d, 8, feedforward, dropout=0.1)
        self.transformer = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.features = nn.Linear(d, features)
        self.logits = Float32Linear(features, plan[0] * plan[1])

    def forward(self, V: Tensor) -> tuple[Tensor, Tensor]:
        # The mean over time and the linear layer commute; the mean first costs T times less.
        features = self.features(self.transformer(V + self.position[: len(V)]).mean(0))
        return self.logits(features).unflatten(-1, self.plan), features


class PlanProposal(nn.Module):
    """Present v_0 (B, d) and goal g (B, g) -> plan logits (B, C, K): four layers of 2048."""

    def __init__(self, d: int, goal: int, hidden: int, plan: tuple[int, int]):
        super().__init__()
        self.plan = plan
        self.net = mlp(d + goal, hidden, 4, plan[0] * plan[1], Float32Linear)

    def forward(self, v_0: Tensor, g: Tensor) -> Tensor:
        return self.net(torch.cat([v_0, g], -1)).unflatten(-1, self.plan)


class Alignment(nn.Module):
    """Projects window features and language goals into one space of 32 numbers and compares them.

    Eq. 8's logits; projections of one hidden layer of 128, a temperature of 0.07 at first [D7].
    """

    def __init__(self, features: int, goal: int, out: int = 32):
        super().__init__()
        self.latent = mlp(features, 128, 1, out)
        self.text = mlp(goal, 128, 1, out)
        self.tau = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self, features: Tensor, g: Tensor, align: Tensor, gather=None
    ) -> tuple[Tensor, Tensor]:
        """features (M, F), g (M, g) of M annotated windows, align (M,) bool: which of them enter
        Eq. 8 [D11] -> loss (), accuracy (); zeros where they are fewer than two.

        gather: `all_gather`, so that the negatives are the whole batch's, not this process's.
        """
        x, y = self.latent(features), self.text(g)
        if gather is not None:
            x, y, align = gather(x), gather(y), gather(align.to(x.dtype)) > 0
        return contrastive_loss(x, y, self.tau, align)
