"""The world model: a DreamerV2-style RSSM with two cameras. LUMOS Sec. IV-A, App. A, Eqs. 1, 2, 7.

    symbol    code        shape            meaning
    x_t       x           per camera (T, B, 3, 64, 64), images in [-1, 1]                Sec. IV-A
    e_t       e           (T, B, hidden)   both images, encoded, fused, ready for q      App. A
    a_{t-1}   a_prev      (T, B, 7)        the action that led to x_t                    App. D
              reset       (T, B) bool      h, z are forgotten: x_t is a start, or by ζ   App. A
    h_t       h           (T, B, H)        deterministic recurrent state                 Eq. 1
    z_t       z           (T, B, Z)        C one-hot categoricals of K classes, flat     Eq. 1
    s_t       s           (T, B, k)        latent state (h_t, z_t), k = H + Z            Eq. 1
    q, p      q, p        (T, B, C, K)     logits of the posterior and of the prior      Eq. 1

              x_0        x_1        x_2
               |          |          |
        a_-1->h_0 --a_0->h_1 --a_1->h_2 ...    each z_t also enters h_{t+1}
               z_0        z_1        z_2       a_-1 of an episode: `no action`, gripper open

One step: h_t from the state before and a_{t-1}; then z_t from h_t and the image (posterior), or
from h_t alone (prior). T is Table III's L; H is h's length here, the horizon in agent.py. Shape ()
is a scalar. `WorldModel` is the paper's; what presets `sim` and `tiny` need beside it stands at the
end, `SimWorldModel`.
Copy this file alone. Needs: torch.

>>> import torch
>>> from world_model import CAMERAS, WorldModel, WorldModelConfig
>>> world = WorldModel(WorldModelConfig(depth=4, hidden=32, deterministic=32))
>>> images = {f"rgb_{k}": torch.zeros(6, 2, 64, 64, 3, dtype=torch.uint8) for k in CAMERAS}
>>> batch = images | {"a_prev": torch.zeros(6, 2, 7), "reset": torch.zeros(6, 2, dtype=torch.bool)}
>>> loss, terms, state = world.loss(batch, world.initial(2))  # Eq. 2 of T = 6 frames, B = 2
>>> loss.backward()
>>> h, z = world.imagine_step(*state, torch.zeros(2, 7))  # Eq. 1 without an image
>>> world.decode(h[None], z[None])["static"].shape
torch.Size([1, 2, 3, 64, 64])
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAMERAS = ("static", "gripper")
Batch = dict[str, Tensor]  # of data.Sequences, time-major: rgb_static, rgb_gripper, a_prev, ...
State = tuple[Tensor, Tensor]  # h (B, H), z (B, Z)


@dataclass(frozen=True)
class WorldModelConfig:
    """Table III, in its row order; below the line, what the table leaves open."""

    batch_size: int = 50  # B, sequences
    sequence_length: int = 50  # L, frames
    deterministic: int = 1024  # H, length of h
    categoricals: int = 32  # C, of z
    classes: int = 32  # K; the latent has k = H + C*K = 2048 dimensions
    beta: float = 0.3  # β, KL loss scale
    delta: float = 0.8  # δ, KL balancing, on the prior's term [D1]
    zeta: float = 0.01  # ζ, RSSM reset probability
    learning_rate: float = 3e-4  # AdamW's
    gradient_clip: float = 100.0  # largest norm of the gradient
    adam_epsilon: float = 1e-5  # ε, AdamW's
    weight_decay: float = 5e-2  # decoupled (AdamW)
    # ------------------------------------------------------------------ not in Table III
    hidden: int = 1000  # width of the RSSM's one-hidden-layer heads [D7]
    depth: int = 48  # channels of the first convolution; the last has 8 times as many [D7]
    carry_state: bool = True  # batches continue each other, as in the authors' code [D10]

    # train.py's schedules; the paper has none, and only SimWorldModelConfig sets them [D25]
    anneal: ClassVar[float] = 0.0
    length_curriculum: ClassVar[int] = 1

    @property
    def stochastic(self) -> int:
        """Z, the length of z_t."""
        return self.categoricals * self.classes

    @property
    def latent(self) -> int:
        """k of Table III, the length of s_t."""
        return self.deterministic + self.stochastic


# ---------------------------------------------------------------------------- equations
def kl_balanced(q: Tensor, p: Tensor, delta: float) -> Tensor:
    """D_KL(q ‖ p) = (1-δ) D_KL(q ‖ sg(p)) + δ D_KL(sg(q) ‖ p)   with δ on the prior's term,
    where the paper prints it on the other [D1].

    q, p: (..., C, K) logits of C independent categoricals. Returns (...,): summed over the C
    categoricals, not averaged. Its value is the plain KL whatever δ is; δ only decides
    how much of the gradient moves p (the prior, fast) and how much q (the posterior, slowly).
    """

    def kl(q: Tensor, p: Tensor) -> Tensor:
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1))

    q, p = q.float(), p.float()
    # Eq. 7: posterior regulariser, then prior regulariser
    return (1 - delta) * kl(q, p.detach()) + delta * kl(q.detach(), p)


def sample_straight_through(logits: Tensor) -> Tensor:
    """One-hot samples (..., C*K) of the logits (..., C, K), with the gradient of the probabilities.

    Straight-through estimation (the paper's reference 26): forward the sample, backward as if it
    were softmax(logits).
    """
    probabilities = logits.float().softmax(-1)
    u = torch.rand_like(probabilities[..., :1])  # inverse of the cumulative distribution
    index = (probabilities.cumsum(-1) < u).sum(-1).clamp_max(logits.shape[-1] - 1)
    sample = F.one_hot(index, logits.shape[-1]).to(probabilities.dtype)
    return (sample + probabilities - probabilities.detach()).flatten(-2)


def elbo_loss(x: Batch, decoded: Batch, q: Tensor, p: Tensor, beta: float, delta: float):
    """min_φ E_q[ Σ_t -log p_φ(x_t | ŝ_t) + β D_KL(q_φ(z_t | h_t, x_t) ‖ p_φ(ẑ_t | h_t)) ]   [D9]

    x, decoded: per camera (T, B, 3, 64, 64) in [-1, 1]. q, p: (T, B, C, K) logits. The likelihoods
    are Gaussians of unit variance, so -log p is half the squared error, up to a constant; it is
    summed over pixels, channels and cameras, the KL over categoricals; both are averaged over T and
    B [D9]. Returns the loss () and its terms.
    """
    terms = {}
    for name, target in x.items():
        T, B = target.shape[:2]
        squared_error = F.mse_loss(decoded[name].float(), target, reduction="sum")
        terms[f"x_{name}"] = 0.5 * squared_error / (T * B)
    kl = kl_balanced(q, p, delta).mean()
    loss = sum(terms.values()) + beta * kl  # Eq. 2: the negative variational lower bound
    terms |= {"kl": kl, "loss": loss}
    return loss, {name: term.detach() for name, term in terms.items()}


# ---------------------------------------------------------------------------- modules
class ImageEncoder(nn.Module):
    """One camera: four convolutions, (N, 3, 64, 64) -> (N, 8 * depth, 2, 2): 64, 31, 14, 6, 2."""

    def __init__(self, depth: int, padding: int = 0):
        super().__init__()
        sizes = [3, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=2, padding=padding) for i, o in pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.elu(convolution(x))
        return x


def one_pixel(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """layer(x) of an image of one pixel, x (N, C), as one matrix product; without padding."""
    y = (x @ layer.weight.flatten(1)).unflatten(1, layer.weight.shape[1:])
    y = y.contiguous(memory_format=torch.channels_last)
    return y + layer.bias.view(1, -1, 1, 1).to(y.dtype)


class ImageDecoder(nn.Module):
    """One camera: transposed convolutions, (N, sizes[0]) -> (N, 3, 64, 64): 1, 5, 13, 30, 64."""

    def __init__(self, sizes: list[int], kernels: list[int], padding: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(i, o, kernel, stride=2, padding=padding * (n > 0))
            for n, ((i, o), kernel) in enumerate(zip(pairwise(sizes), kernels, strict=True))
        )

    def forward(self, x: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        """extra: added after the first layer."""
        first, *others = self.layers
        x = one_pixel(x, first) + extra
        for layer in others:
            x = layer(F.elu(x))
        return x


def without_autocast(x: Tensor) -> torch.autocast:
    """For logits and losses: bf16's 8 bits of precision are too few for them."""
    return torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False)


class Float32Linear(nn.Linear):
    """A linear layer that stays fp32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class Head(nn.Module):
    """The RSSM's building block: (sum of linear layers) -> LayerNorm -> ELU [-> logits].

    Separate linear layers whose outputs are added are one layer on the concatenation, but for their
    first weights [D7]; apart, the part that does not depend on the recurrence can be computed for
    all steps at once, as `encode` does.
    """

    def __init__(self, inputs: tuple[int, ...], hidden: int, out: int | None = None):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(n, hidden, bias=i == 0) for i, n in enumerate(inputs))
        self.norm = nn.LayerNorm(hidden, eps=1e-3)
        self.out = Float32Linear(hidden, out) if out else nn.Identity()

    def forward(self, first: Tensor, rest: Tensor | float = 0.0) -> Tensor:
        """`first` through the first linear layer; `rest`: the other ones' output, precomputed."""
        return self.out(F.elu(self.norm(self.inputs[0](first) + rest)))


class WorldModel(nn.Module):
    """Encoder, recurrent state f, representation model q, dynamics predictor p, decoder (Eq. 1)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = c = config
        if c.classes > 256:
            raise ValueError("classes: at most 256, because latents are cached as bytes")
        E, logits = 32 * c.depth, c.categoricals * c.classes  # E: length of a camera's features
        # x_t -> e_t: a CNN for each camera; their features are concatenated and fused (App. A).
        self.encoders = nn.ModuleDict({k: ImageEncoder(c.depth) for k in CAMERAS})
        self.fuse = Head((2 * E,), E)
        # (z_{t-1}, a_{t-1}) -> GRU -> h_t; h_t -> prior of ẑ_t; (h_t, e_t) -> posterior of z_t.
        self.recurrent_in = Head((c.stochastic, 7), c.hidden)
        self.gru = nn.GRUCell(c.hidden, c.deterministic)
        self.prior_head = Head((c.deterministic,), c.hidden, logits)
        self.posterior_head = Head((c.deterministic, E), c.hidden, logits)
        # s_t -> x̂_t: a transposed CNN for each camera, behind one linear layer for both [D7].
        self.decoder_in = nn.Linear(c.latent, E)
        sizes = [E, 4 * c.depth, 2 * c.depth, c.depth, 3]
        self.decoders = nn.ModuleDict({k: ImageDecoder(sizes, [5, 5, 6, 6]) for k in CAMERAS})
        self.initialise()

    def initialise(self) -> None:
        """Xavier weights, a recurrence of orthonormal columns, zero biases [D7]; channels-last."""
        for name, p in self.named_parameters():
            if name == "gru.weight_hh":
                nn.init.orthogonal_(p)
            elif p.dim() > 1:
                nn.init.xavier_uniform_(p)
            elif "bias" in name:
                nn.init.zeros_(p)
        self.to(memory_format=torch.channels_last)
        for decoder in self.decoders.values():  # but what `one_pixel` uses as a matrix
            decoder.layers[0].to(memory_format=torch.contiguous_format)

    @property
    def device(self) -> torch.device:
        return self.gru.weight_hh.device

    def set_statistics(self, robot_mean: Tensor, robot_std: Tensor) -> None:
        """Mean and deviation (15,) of the training set's robot_obs; cameras need neither."""

    # ------------------------------------------------------------------ the pieces of Eq. 1
    def initial(self, batch: int) -> State:
        """h = z = 0."""
        sizes = (self.config.deterministic, self.config.stochastic)
        h, z = (torch.zeros(batch, n, device=self.device) for n in sizes)
        return h, z

    def see(self, batch: Batch) -> Batch:
        """x_t of a batch: its uint8 images (T, B, 64, 64, 3) -> per camera (T, B, 3, 64, 64)."""
        return {k: to_float(batch[f"rgb_{k}"]) for k in CAMERAS}

    def encode(self, x: Batch) -> Tensor:
        """x_t -> e_t (T, B, hidden): both images, fused, after the posterior's layer for images; it
        does not depend on h, so all t are computed at once."""
        maps = [self.encoders[k](x[k].flatten(0, 1)).flatten(1) for k in CAMERAS]
        fused = self.fuse(torch.cat(maps, -1)).unflatten(0, x["static"].shape[:2])
        return self.posterior_head.inputs[1](fused)

    def recurrent(self, h: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """h_{t-1} (B, H), z_{t-1} (B, Z), a_{t-1} (B, 7) -> h_t = f_φ(ŝ_{t-1}, a_{t-1}) (B, H)."""
        x = self.recurrent_in(z, self.recurrent_in.inputs[1](a))
        # Under autocast the cell rounds h to bf16; it is handed on as fp32.
        return self.gru(x, h.to(x.dtype)).float()  # Eq. 1: recurrent state

    def posterior(self, h: Tensor, e: Tensor) -> Tensor:
        """Logits (..., C, K) of q_φ(z_t | h_t, x_t), the representation model."""
        return self.posterior_head(h, e).unflatten(-1, (-1, self.config.classes))

    def represent(self, h: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """z_t ~ q_φ(z_t | h_t, x_t) (..., Z), and q's logits (..., C, K)."""
        q = self.posterior(h, e)
        return sample_straight_through(q), q

    def prior(self, h: Tensor) -> Tensor:
        """Logits (..., C, K) of p_φ(ẑ_t | h_t), the dynamics predictor: it never sees x_t."""
        return self.prior_head(h).unflatten(-1, (-1, self.config.classes))

    def decode(self, h: Tensor, z: Tensor) -> Batch:
        """x̂_t ~ p_φ(x̂_t | ŝ_t): h (T, B, H), z (T, B, Z) -> the mean image of each camera, as x."""
        x = self.decoder_in(torch.cat([h, z], -1)).flatten(0, 1)
        return {k: self.decoders[k](x).unflatten(0, h.shape[:2]) for k in CAMERAS}

    # ------------------------------------------------------------------ observing and imagining
    def observe(self, e: Tensor, a_prev: Tensor, reset: Tensor, state: State):
        """Filters T observations: e (T, B, hidden), a_prev (T, B, 7), reset (T, B) bool.

        state: before them; where reset is true, it is forgotten (h = z = 0).
        Returns h (T, B, H), z (T, B, Z), q's logits (T, B, C, K).
        """
        h, z = state
        keep, steps = (~reset)[..., None].float(), []
        for t in range(len(e)):  # a reset forgets h and z, not a_prev [D10]
            h = self.recurrent(h * keep[t], z * keep[t], a_prev[t])  # what is known before x_t
            z, q = self.represent(h, e[t])  # and what x_t adds
            steps.append((h, z, q))
        return tuple(torch.stack(x) for x in zip(*steps, strict=True))

    def filter(self, batch: Batch, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """`observe` for a batch of data.Sequences, without random resets."""
        return self.observe(self.encode(self.see(batch)), batch["a_prev"], batch["reset"], state)

    def imagine_step(self, h: Tensor, z: Tensor, a: Tensor) -> State:
        """(h_t, z_t), a_t -> (h_{t+1}, ẑ_{t+1}): one step without an observation."""
        h = self.recurrent(h, z, a)
        return h, sample_straight_through(self.prior(h))

    def reset_some(self, reset: Tensor) -> Tensor:
        """In training single steps (T, B) are reset with ζ: play has few resets (App. A, [D10])."""
        if not self.training:
            return reset
        return reset | (torch.rand(reset.shape, device=reset.device) < self.config.zeta)

    def loss(self, batch: Batch, state: State) -> tuple[Tensor, Batch, State]:
        """One batch of data.Sequences -> Eq. 2's loss (), its terms, the last state (detached)."""
        c, x, reset = self.config, self.see(batch), self.reset_some(batch["reset"])
        # The expectation over q in Eq. 2 is one sample of z_1:T, drawn step by step.
        h, z, q = self.observe(self.encode(x), batch["a_prev"], reset, state)
        # Each latent state must reconstruct its images; each prior must predict its posterior.
        loss, terms = elbo_loss(x, self.decode(h, z), q, self.prior(h), c.beta, c.delta)
        return loss, terms, (h[-1].detach(), z[-1].detach())

    # ------------------------------------------------------------------ for others
    def split(self, s: Tensor) -> State:
        """s (..., k) -> h (..., H), z (..., Z)."""
        return s[..., : self.config.deterministic], s[..., self.config.deterministic :]

    def predict(self, batch: Batch, context: int) -> tuple[Batch, Batch]:
        """Open-loop prediction (Fig. 3): filters `context` frames, then sees only the actions.

        Returns `show` twice: of each frame's posterior, and of the prediction, which is that
        posterior for the first `context` frames.
        """
        h, z, _ = self.filter(batch, self.initial(batch["reset"].shape[1]))
        states = list(zip(h[:context], z[:context], strict=True))
        for a in batch["a_prev"][context:]:
            states.append(self.imagine_step(*states[-1], a))
        predicted = (torch.stack(x) for x in zip(*states, strict=True))
        return self.show(h, z), self.show(*predicted)

    def show(self, h: Tensor, z: Tensor) -> Batch:
        """What states (T, B, ...) look like: uint8 (T, B, 64, 64, 3) per camera."""
        return {k: to_uint8(x) for k, x in self.decode(h, z).items()}

    def classes_of(self, z: Tensor) -> Tensor:
        """z (..., Z) -> the class of each of its categoricals, (..., C) uint8, for a cache."""
        c = self.config
        one_hots = z[..., : c.categoricals * c.classes].unflatten(-1, (-1, c.classes))
        return one_hots.argmax(-1).to(torch.uint8)

    def latent_z(self, classes: Tensor, robot_obs: Tensor) -> Tensor:
        """The inverse: classes (..., C) and the same frames' robot_obs (..., 15) -> z (..., Z)."""
        return F.one_hot(classes.long(), self.config.classes).flatten(-2).float()


def to_float(x: Tensor) -> Tensor:
    """uint8 (..., 64, 64, 3) in 0..255 -> float (..., 3, 64, 64) in [-1, 1], channels-last."""
    if x.shape[-3:] != (64, 64, 3) or x.dtype != torch.uint8:
        what = f"images must be uint8 (..., 64, 64, 3), got {x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{what}; shrink them with data.resize_area first")
    return x.float().mul_(1 / 127.5).sub_(1).movedim(-1, -3)


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of to_float, clipped: (..., 3, H, W) -> (..., H, W, 3) uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).movedim(-3, -1).to(torch.uint8)


# ---------------------------------------------------------------------------- presets sim and tiny
# [D5] Of robot_obs, z_t takes in: tcp position, finger width, joints. The euler angles jump by 2π,
# and follow from the joints. σ: how exactly that is predicted, in the training set's deviations.
POSE, POSE_SIGMA = (0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13), 0.03


@dataclass(frozen=True)
class SimWorldModelConfig(WorldModelConfig):
    """What presets `sim` and `tiny` need beside the paper; the schedules are train.py's."""

    carry_state: bool = False  # as the paper says [D10]
    spatial_latents: bool = False  # a categorical for each of 4 x 4 cells of both images [D5]
    length_curriculum: int = 1  # first half of the steps: so many times more, shorter pieces [D25]
    decode_every: int = 1  # reconstruct every n-th frame of a training batch [D25]
    anneal: float = 0.0  # last part of the steps, over which the learning rate falls to 0 [D25]

    @property
    def stochastic(self) -> int:
        """Z: z_t's one-hots, then the arm's pose p_t."""
        return super().stochastic + len(POSE)


class SimWorldModel(WorldModel):
    """x_t is also the arm's robot_obs, and z_t ends with its pose p_t (11 numbers) [D5].

    With spatial_latents, each of the 2 x 16 cells of both images also has a categorical of its own:
    its features are added to the categorical's logits, its sample to the decoder's 4 x 4 map.
    """

    def __init__(self, config: SimWorldModelConfig):
        super().__init__(config)
        c, E, logits = config, 32 * config.depth, config.categoricals * config.classes
        if c.sequence_length % (c.length_curriculum * c.decode_every):
            raise ValueError("length_curriculum * decode_every must divide sequence_length [D25]")
        if c.length_curriculum > 1 and c.carry_state:
            raise ValueError("pieces of another length cannot carry the state on [D25]")
        if c.spatial_latents and c.categoricals != 2 * 4 * 4:
            raise ValueError("spatial_latents: two images of 4 x 4 cells need 32 categoricals [D5]")
        self.register_buffer("robot_mean", torch.zeros(15))
        self.register_buffer("robot_std", torch.ones(15))
        self.register_buffer("pose_columns", torch.tensor(POSE), persistent=False)
        self.motion = nn.Linear(c.deterministic + 7, len(POSE))
        self.posterior_head = Head((c.deterministic, E + 15), c.hidden, logits)
        if c.spatial_latents:  # images of 64, 32, 16, 8, 4 pixels, and back
            self.encoders = nn.ModuleDict({k: ImageEncoder(c.depth, padding=1) for k in CAMERAS})
            self.fuse = Head((8 * E,), E)
            self.own = nn.ModuleDict({k: nn.Conv2d(8 * c.depth, c.classes, 1) for k in CAMERAS})
            sizes = [E, 8 * c.depth, 4 * c.depth, 2 * c.depth, c.depth, 3]
            for k in CAMERAS:
                self.decoders[k] = ImageDecoder(sizes, [4] * 5, padding=1)
                self.decoders[k].own = nn.Conv2d(c.classes, 8 * c.depth, 1)
        self.initialise()

    def set_statistics(self, robot_mean: Tensor, robot_std: Tensor) -> None:
        """robot_obs is measured in the training set's deviations (15,) from its mean (15,)."""
        self.robot_mean.copy_(robot_mean)
        self.robot_std.copy_(robot_std)

    def standardise(self, robot_obs: Tensor) -> Tensor:
        return (robot_obs - self.robot_mean) / self.robot_std

    def see(self, batch: Batch) -> Batch:
        return super().see(batch) | {"robot": self.standardise(batch["robot_obs"])}

    def encode(self, x: Batch) -> Tensor:
        """e_t: p_t, then what the posterior's head takes, then what cells add to its logits."""
        robot, shape = x["robot"], x["static"].shape[:2]
        maps = {k: self.encoders[k](x[k].flatten(0, 1)) for k in CAMERAS}
        fused = self.fuse(torch.cat([m.flatten(1) for m in maps.values()], -1)).unflatten(0, shape)
        e = self.posterior_head.inputs[1](torch.cat([fused.float(), robot], -1))
        e = torch.cat([robot.index_select(-1, self.pose_columns), e], -1)
        if not self.config.spatial_latents:
            return e
        with without_autocast(e):  # (T*B, 32, K) of 2 x 16 cells
            cells = torch.cat([self.own[k](m.float()).flatten(2).mT for k, m in maps.items()], 1)
        return torch.cat([e, cells.flatten(1).unflatten(0, shape)], -1)

    def posterior(self, h: Tensor, e: Tensor) -> Tensor:
        hidden = self.config.hidden
        _, e, cells = e.tensor_split([len(POSE), len(POSE) + hidden], -1)
        q = super().posterior(h, e)
        return q + cells.unflatten(-1, q.shape[-2:]) if self.config.spatial_latents else q

    def represent(self, h: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """z_t ends with p_t, as it is observed."""
        one_hots, q = super().represent(h, e)
        return torch.cat([one_hots, e[..., : len(POSE)]], -1), q

    def imagine_step(self, h: Tensor, z: Tensor, a: Tensor) -> State:
        """ẑ_{t+1} ends with p_t and the motion that h_{t+1} and a_t tell."""
        h, one_hots = super().imagine_step(h, z, a)
        p = z[..., -len(POSE) :] + self.motion(torch.cat([h, a], -1))
        return h, torch.cat([one_hots, p], -1)

    def decode(self, h: Tensor, z: Tensor) -> Batch:
        if not self.config.spatial_latents:
            return super().decode(h, z)
        x = self.decoder_in(torch.cat([h, z], -1)).flatten(0, 1)
        cells = z[..., : -len(POSE)].unflatten(-1, (len(CAMERAS), 4, 4, self.config.classes))
        cells = cells.flatten(0, 1).movedim(-1, 2).unbind(1)  # per camera (T*B, K, 4, 4)
        images = {}
        for k, own in zip(CAMERAS, cells, strict=True):
            images[k] = self.decoders[k](x, self.decoders[k].own(own)).unflatten(0, h.shape[:2])
        return images

    def loss(self, batch: Batch, state: State) -> tuple[Tensor, Batch, State]:
        """`WorldModel.loss`, with -log p of the arm's motion.

        In training the sum over t of Eq. 2 is estimated, without bias, from every n-th frame:
        neighbours tell almost the same, and decoding is most of a step's work [D25].
        """
        c, x, reset = self.config, self.see(batch), self.reset_some(batch["reset"])
        decode_every = c.decode_every if self.training else 1
        e, a_prev = self.encode(x), batch["a_prev"]
        h, z, q = self.observe(e, a_prev, reset, state)
        some = torch.arange(0, len(h), decode_every, device=h.device)
        if decode_every > 1:  # from a random one on
            some = some + torch.randint(decode_every, (), device=h.device)
        x = {k: x[k].index_select(0, some) for k in CAMERAS}
        decoded = self.decode(h.index_select(0, some), z.index_select(0, some))
        # How far the arm moves, in σ, is a Gaussian of unit variance, too. After a reset h does not
        # know where the arm was: those frames are left out.
        p, known = z[..., -len(POSE) :], ~reset[1:, :, None]
        x["robot"] = (p[1:] - p[:-1]) * known / POSE_SIGMA
        decoded["robot"] = self.motion(torch.cat([h, a_prev], -1)[1:]) * known / POSE_SIGMA
        loss, terms = elbo_loss(x, decoded, q, self.prior(h), c.beta, c.delta)
        return loss, terms, (h[-1].detach(), z[-1].detach())

    def show(self, h: Tensor, z: Tensor) -> Batch:
        """Also tcp (T, B, 3), m."""
        tcp = z[..., -len(POSE) :][..., :3] * self.robot_std[:3] + self.robot_mean[:3]
        return super().show(h, z) | {"tcp": tcp}

    def latent_z(self, classes: Tensor, robot_obs: Tensor) -> Tensor:
        p = self.standardise(robot_obs).index_select(-1, self.pose_columns)
        return torch.cat([super().latent_z(classes, robot_obs), p], -1)


def make_world_model(config: WorldModelConfig) -> WorldModel:
    """The model that a configuration is of."""
    return SimWorldModel(config) if isinstance(config, SimWorldModelConfig) else WorldModel(config)


# Two CPU cores or one small GPU need a smaller model of the same kind; Table III's other rows stay.
PRESETS = {
    "paper": WorldModelConfig(),
    "sim": SimWorldModelConfig(
        batch_size=8, sequence_length=32, deterministic=512, learning_rate=8e-4, hidden=512,
        depth=16, spatial_latents=True, length_curriculum=4, decode_every=4, anneal=0.6,
    ),
    "tiny": SimWorldModelConfig(
        batch_size=8, sequence_length=16, deterministic=64, categoricals=8, classes=8,
        learning_rate=1e-3, hidden=64, depth=4, carry_state=True,
    ),
}  # fmt: skip
