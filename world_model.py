"""The world model: a DreamerV2-style RSSM with two cameras. LUMOS Sec. IV-A, App. A, Eqs. 1, 2, 7.

    symbol    code        shape            meaning
    x_t       static,     (T, B, 64, 64, 3) camera images, uint8 until the encoder       Sec. IV-A
              gripper
    e_t       e           (T, B, E)        both images, encoded and fused                App. A
    a_{t-1}   a_prev      (T, B, 7)        the action that led to x_t                    App. D
    h_t       h           (T, B, H)        deterministic recurrent state                 Eq. 1
    z_t       z           (T, B, Z)        C one-hot categoricals of K classes, flattened Eq. 1
    p_t                   (T, B, 11)       with proprioception, the end of z: arm's pose D5
    s_t       s           (T, B, k)        latent state (h_t, z_t), k = H + Z            Eq. 1
    q, p      q, p        (T, B, C, K)     logits of the posterior and of the prior      Eq. 1

              x_0        x_1        x_2            One step: first h from the step before, then
               |          |          |             z from h and the image (posterior) or from h
    NO_ACTION->h_0 --a_0->h_1 --a_1->h_2 ...       alone (prior). The action a_{t-1} enters h_t.
               z_0        z_1        z_2

Copy this file alone. Needs: torch.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class WorldModelConfig:
    """Table III, in its row order; below the line, what the table leaves open [D7]."""

    batch_size: int = 50  # B
    sequence_length: int = 50  # L
    deterministic: int = 1024  # H
    categoricals: int = 32  # C
    classes: int = 32  # K; the latent has k = H + C*K = 2048 dimensions, or more [D5]
    beta: float = 0.3  # β, KL loss scale
    delta: float = 0.8  # δ, KL balancing, on the prior's term [D1]
    zeta: float = 0.01  # ζ, RSSM reset probability
    learning_rate: float = 3e-4
    gradient_clip: float = 100.0
    adam_epsilon: float = 1e-5
    weight_decay: float = 5e-2  # decoupled (AdamW)
    # ------------------------------------------------------------------ not in Table III [D7]
    hidden: int = 1000  # width of the RSSM's one-hidden-layer heads
    depth: int = 48  # channels of the first convolution; the last has 8 times as many
    proprioception: bool = False  # x_t is also robot_obs; z_t ends with the arm's pose p_t [D5]
    carry_state: bool = True  # sequences continue, with their state, from batch to batch [D10]
    decode_every: int = 1  # reconstruct every n-th frame of a training batch [D19]
    anneal: float = 0.0  # last part of the steps, over which the learning rate falls to 0 [D7]
    gain: float = 1.0  # at the start, of the weights before and behind the posterior's sample [D25]
    harden: float = 0.0  # first part of the steps, over which q's mean turns into samples [D25]
    shorter: int = 1  # for half of the steps: batches of so many times more, shorter pieces [D26]
    cells: bool = False  # a categorical for each of 4 x 4 cells of both images [D27]

    @property
    def discrete(self) -> int:
        """C*K, the length of z_t's one-hots, which come first."""
        return self.categoricals * self.classes

    @property
    def stochastic(self) -> int:
        """Z, the length of z_t: its one-hots, then p_t [D5]."""
        return self.discrete + len(POSE) * self.proprioception

    @property
    def latent(self) -> int:
        """k of Table III (and the pose, with proprioception)."""
        return self.deterministic + self.stochastic


# Two CPU cores or one small GPU need a smaller model of the same kind; Table III's other rows stay.
PRESETS = {
    "paper": WorldModelConfig(),
    "sim": WorldModelConfig(
        batch_size=8, sequence_length=32, deterministic=512, learning_rate=8e-4,
        hidden=512, depth=16, proprioception=True, carry_state=False, decode_every=4, anneal=0.6,
        gain=3.0, harden=0.15, shorter=4, cells=True,
    ),
    "tiny": WorldModelConfig(
        batch_size=8, sequence_length=16, deterministic=64, categoricals=8, classes=8,
        learning_rate=1e-3, hidden=64, depth=4, proprioception=True,
    ),
}  # fmt: skip


# [D5] Of robot_obs, z_t takes in: tcp position, finger width, joints. The euler angles jump by 2π,
# and follow from the joints. σ: how exactly that is predicted, in the training set's deviations.
POSE, POSE_SIGMA = (0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13), 0.03


# ---------------------------------------------------------------------------- equations
def kl_balanced(q: Tensor, p: Tensor, delta: float) -> Tensor:
    """D_KL(q ‖ p) = (1-δ) D_KL(q ‖ sg(p)) + δ D_KL(sg(q) ‖ p)   with δ on the prior's term [D1].

    q, p: (..., C, K) logits of C independent categoricals. Returns (...,): summed over the C
    categoricals, averaged over nothing. Its value is the plain KL whatever δ is; δ only decides
    how much of the gradient moves p (the prior, fast) and how much q (the posterior, slowly).
    """

    def kl(q: Tensor, p: Tensor) -> Tensor:
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1))

    q, p = q.float(), p.float()
    # Eq. 7: posterior regulariser, then prior regulariser
    return (1 - delta) * kl(q, p.detach()) + delta * kl(q.detach(), p)


def sample_straight_through(logits: Tensor, softness: float | Tensor = 0.0) -> Tensor:
    """One-hot samples (..., C*K) of the logits (..., C, K), with the gradient of the probabilities.

    Straight-through estimation [26]: forward the sample, backward as if it were softmax(logits).
    softness > 0 [D25]: forward, the sample is drawn so far towards its mean, the probabilities.
    """
    probabilities = logits.float().softmax(-1)
    u = torch.rand_like(probabilities[..., :1])  # the class in whose share of 0..1 it falls:
    index = (probabilities.cumsum(-1) < u).sum(-1).clamp_max(logits.shape[-1] - 1)
    one_hot = F.one_hot(index, logits.shape[-1]).to(probabilities.dtype)
    sample = torch.lerp(one_hot, probabilities.detach(), softness)
    return (sample + probabilities - probabilities.detach()).flatten(-2)


def elbo_loss(
    x: dict[str, Tensor], decoded: dict[str, Tensor], q: Tensor, p: Tensor,
    beta: float, delta: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """min_φ E_q[ Σ_t -log p_φ(x_t | ŝ_t) + β D_KL(q_φ(z_t | h_t, x_t) ‖ p_φ(ẑ_t | h_t)) ]

    x, decoded: per camera (T', B, 3, 64, 64) in [-1, 1]; with [D5] robot (T - 1, B, 11), in σ.
    q, p: (T, B, C, K) logits. The likelihoods are Gaussians of unit variance, so -log p is half the
    squared error; it is summed over pixels, channels and cameras, the KL over categoricals; both
    are averaged over T and B [D9]. T' < T frames may stand for all [D19]. robot is a motion, given
    h_t and a_{t-1}. Returns the loss () and its terms.
    """
    error = {
        name: 0.5
        * F.mse_loss(decoded[name].float(), true, reduction="sum")
        / len(true.flatten(0, 1))
        for name, true in x.items()
    }
    kl = kl_balanced(q, p, delta).mean()
    loss = sum(error.values()) + beta * kl  # Eq. 2: the negative variational lower bound
    terms = {f"x_{name}": e.detach() for name, e in error.items()}
    return loss, terms | {"kl": kl.detach(), "loss": loss.detach()}


# ---------------------------------------------------------------------------- modules
def one_pixel(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """layer(x) of an image of one pixel, x (N, C), as one matrix product; without padding."""
    y = (x @ layer.weight.flatten(1)).unflatten(1, layer.weight.shape[1:])
    y = y.contiguous(memory_format=torch.channels_last)
    return y + layer.bias.view(1, -1, 1, 1).to(y.dtype)


class ImageEncoder(nn.Module):
    """One camera: four convolutions (kernel 4, stride 2): (N, 3, 64, 64) -> (N, 8 * depth, n, n).

    64 -> 31 -> 14 -> 6 -> n = 2 pixels; with cells, padded: 64 -> 32 -> 16 -> 8 -> n = 4 [D27].
    """

    def __init__(self, depth: int, cells: bool = False):
        super().__init__()
        sizes = [3, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=2, padding=int(cells)) for i, o in pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.elu(convolution(x))
        return x


class ImageDecoder(nn.Module):
    """One camera: transposed convolutions, stride 2: (N, 32 * depth) -> (N, 3, 64, 64).

    1 -> 5 -> 13 -> 30 -> 64 pixels; with cells 1 -> 4 -> 8 -> 16 -> 32 -> 64, and each pixel of
    the 4 x 4 also sees its own categorical of `classes`: (N, classes, 4, 4) [D27].
    """

    def __init__(self, depth: int, classes: int | None = None):
        super().__init__()
        sizes, kernels = [32 * depth, 4 * depth, 2 * depth, depth, 3], [5, 5, 6, 6]
        if classes:
            sizes, kernels = [32 * depth, 8 * depth, *sizes[1:]], [4] * 5
            self.own = nn.Conv2d(classes, 8 * depth, 1)
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(i, o, k, stride=2, padding=int(classes is not None and n > 0))
            for n, ((i, o), k) in enumerate(zip(pairwise(sizes), kernels, strict=True))
        )

    def forward(self, x: Tensor, own: Tensor | None = None) -> Tensor:
        first, *others = self.layers
        x = one_pixel(x, first)
        x = x if own is None else x + self.own(own)
        for layer in others:
            x = layer(F.elu(x))
        return x


class Head(nn.Module):
    """The RSSM's building block: inputs -> (sum of linear layers) -> LayerNorm -> ELU [-> linear].

    Separate linear layers whose outputs are added equal one layer on the concatenation [D7]; apart,
    the part that does not depend on the recurrence can be computed for all steps at once.
    """

    def __init__(self, inputs: tuple[int, ...], hidden: int, out: int | None = None):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(n, hidden, bias=i == 0) for i, n in enumerate(inputs))
        self.norm = nn.LayerNorm(hidden, eps=1e-3)
        self.out = nn.Linear(hidden, out) if out else nn.Identity()

    def forward(self, first: Tensor, rest: Tensor | float = 0.0) -> Tensor:
        """`first` through the first linear layer; `rest`: the other ones' output, precomputed."""
        return self.out(F.elu(self.norm(self.inputs[0](first) + rest)))


class WorldModel(nn.Module):
    """Encoder, recurrent state f, representation model q, dynamics predictor p, decoder (Eq. 1)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = c = config
        if c.sequence_length % (c.shorter * c.decode_every):
            raise ValueError("shorter * decode_every must divide sequence_length [D19, D26]")
        if c.shorter > 1 and c.carry_state:
            raise ValueError("pieces of another length cannot carry the state on: shorter 1 [D26]")
        if c.classes > 256:
            raise ValueError("classes: at most 256, for latents are cached as bytes")
        if c.cells and c.categoricals != 2 * 4 * 4:
            raise ValueError("cells: two images of 4 x 4 cells need 32 categoricals [D27]")
        cameras, embedding, z = ("static", "gripper"), 32 * c.depth, c.discrete
        self.encoders = nn.ModuleDict({k: ImageEncoder(c.depth, c.cells) for k in cameras})
        self.fuse = Head((2 * embedding * (4 if c.cells else 1),), embedding)
        if c.cells:  # one categorical's logits from one cell's features [D27]
            self.own = nn.ModuleDict({k: nn.Conv2d(8 * c.depth, c.classes, 1) for k in cameras})
        if c.proprioception:  # [D5] normalised by the training set's mean and deviation
            self.register_buffer("robot_mean", torch.zeros(15))
            self.register_buffer("robot_std", torch.ones(15))
            self.register_buffer("pose_columns", torch.tensor(POSE), persistent=False)
            self.motion = nn.Linear(c.deterministic + 7, len(POSE))
        self.recurrent_in = Head((c.stochastic, 7), c.hidden)
        self.gru = nn.GRUCell(c.hidden, c.deterministic)
        self.prior_head = Head((c.deterministic,), c.hidden, z)
        e = embedding + 15 * c.proprioception
        self.posterior_head = Head((c.deterministic, e), c.hidden, z)
        self.decoder_in = nn.Linear(c.latent, embedding)  # shared by both decoders [D7]
        classes = c.classes if c.cells else None
        self.decoders = nn.ModuleDict({k: ImageDecoder(c.depth, classes) for k in cameras})
        self.apply(initialise)
        with torch.no_grad():  # [D25]
            self.posterior_head.out.weight.mul_(c.gain)
            self.decoder_in.weight[:, c.deterministic : c.deterministic + z].mul_(c.gain)
            for k in cameras if c.cells else ():
                self.own[k].weight.mul_(c.gain)
                self.decoders[k].own.weight.mul_(c.gain)
        # Of the posterior's samples, set while training [D25]; a number would be compiled in.
        self.register_buffer("softness", torch.zeros(()), persistent=False)
        self.to(memory_format=torch.channels_last)
        for decoder in self.decoders.values():  # but what `one_pixel` uses as a matrix
            decoder.layers[0].to(memory_format=torch.contiguous_format)

    # ------------------------------------------------------------------ the pieces of Eq. 1
    def initial(self, batch: int) -> tuple[Tensor, Tensor]:
        """h = z = 0: (B, H), (B, Z)."""
        c, device = self.config, self.decoder_in.weight.device
        return (
            torch.zeros(batch, c.deterministic, device=device),
            torch.zeros(batch, c.stochastic, device=device),
        )

    def encode(self, images: dict[str, Tensor], robot_obs: Tensor | None = None) -> Tensor:
        """Per camera (T, B, 3, 64, 64) from `to_float`, robot_obs (T, B, 15) -> e (T, B, E).

        With cells, C*K more numbers end e: what each cell says of its own categorical [D27].
        """
        T, B = images["static"].shape[:2]
        maps = {k: encoder(images[k].flatten(0, 1)) for k, encoder in self.encoders.items()}
        e = self.fuse(torch.cat([x.flatten(1) for x in maps.values()], -1)).unflatten(0, (T, B))
        if self.config.proprioception:
            if robot_obs is None:
                raise ValueError("this world model was trained with proprioception: pass robot_obs")
            e = torch.cat([e.float(), self.standardise(robot_obs)], -1)
        if self.config.cells:
            own = [self.own[k](x).flatten(2).mT for k, x in maps.items()]  # (T*B, 16, K) each
            e = torch.cat([e, torch.cat(own, 1).flatten(1).unflatten(0, (T, B))], -1)
        return e

    def standardise(self, robot_obs: Tensor) -> Tensor:
        """robot_obs (..., 15) in units of the training set's deviation from its mean [D5]."""
        return (robot_obs - self.robot_mean) / self.robot_std

    def pose(self, robot_obs: Tensor) -> Tensor:
        """robot_obs (..., 15) -> p (..., 11), the end of z [D5]; else (..., 0)."""
        if not self.config.proprioception:
            return robot_obs[..., :0]
        return self.standardise(robot_obs).index_select(-1, self.pose_columns)

    def recurrent(self, h: Tensor, z: Tensor, a_part: Tensor) -> Tensor:
        """h_t = f_φ(ŝ_{t-1}, a_{t-1}); a_part: the action's linear layer, already applied."""
        x = self.recurrent_in(z, a_part)
        return self.gru(x, h.to(x.dtype)).float()  # Eq. 1: recurrent state

    def prior(self, h: Tensor) -> Tensor:
        """Logits (..., C, K) of ẑ_t ~ p_φ(ẑ_t | h_t): the dynamics predictor, blind to x_t."""
        c = self.config
        return self.prior_head(h).float().unflatten(-1, (c.categoricals, c.classes))

    def posterior(self, h: Tensor, e_part: Tensor, own: Tensor | float = 0.0) -> Tensor:
        """Logits (..., C, K) of z_t ~ q_φ(z_t | h_t, x_t); e_part: e through its linear layer.

        own: (..., C, K), what the cells add [D27].
        """
        c = self.config
        q = self.posterior_head(h, e_part).float().unflatten(-1, (c.categoricals, c.classes))
        return q + own

    def decode(self, s: Tensor) -> dict[str, Tensor]:
        """x̂_t ~ p_φ(x̂_t | ŝ_t): s (T, B, k) -> per camera the mean (T, B, 3, 64, 64), [-1, 1]."""
        c, x, own = self.config, self.decoder_in(s).flatten(0, 1), {}
        if c.cells:  # [D27] (T*B, K, 4, 4) per camera
            z = s[..., c.deterministic :][..., : c.discrete].flatten(0, 1)
            z = z.unflatten(-1, (2, 4, 4, c.classes))
            own = dict(zip(self.decoders, z.movedim(-1, 2).unbind(1), strict=True))
        images = {k: decoder(x, own.get(k)) for k, decoder in self.decoders.items()}
        return {k: x.unflatten(0, s.shape[:2]) for k, x in images.items()}

    # ------------------------------------------------------------------ observing and imagining
    def observe(
        self, e: Tensor, a_prev: Tensor, reset: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Filters T observations: e (T, B, E), a_prev (T, B, 7), reset (T, B) bool, state (h, z).

        Where reset is true, the state before the step is forgotten (h = z = 0).
        Returns h (T, B, H), z (T, B, Z), q logits (T, B, C, K).
        """
        c, (h, z) = self.config, state
        keep = (~reset)[..., None].float()
        # Everything that does not depend on the recurrence, for the whole sequence at once:
        a_part = self.recurrent_in.inputs[1](a_prev)  # (T, B, hidden)
        E = self.posterior_head.inputs[1].in_features
        e_part = self.posterior_head.inputs[1](e[..., :E])  # (T, B, hidden)
        own = e[..., E:].float().unflatten(-1, (-1, c.classes)) if c.cells else [0.0] * len(e)
        p = e[..., :0]
        if c.proprioception:  # [D5]
            p = e[..., E - 15 : E].index_select(-1, self.pose_columns)
        hs, zs, qs = [], [], []
        for t in range(e.shape[0]):
            h = self.recurrent(h * keep[t], z * keep[t], a_part[t])
            q = self.posterior(h, e_part[t], own[t])
            z = torch.cat([sample_straight_through(q, self.softness * self.training), p[t]], -1)
            hs.append(h), zs.append(z), qs.append(q)
        return torch.stack(hs), torch.stack(zs), torch.stack(qs)

    def filter(
        self, batch: dict[str, Tensor], state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`observe` from uint8 images: a batch of data.Sequences, without random resets."""
        images = {k: to_float(batch[f"rgb_{k}"]) for k in self.encoders}
        e = self.encode(images, batch["robot_obs"])
        return self.observe(e, batch["a_prev"], batch["reset"], state)

    def imagine_step(self, h: Tensor, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """(h_t, z_t), a_t -> (h_{t+1}, ẑ_{t+1}): one step without an observation. a: (B, 7)."""
        c, p = self.config, z[..., self.config.discrete :]
        h = self.recurrent(h, z, self.recurrent_in.inputs[1](a))
        p = p + self.motion(torch.cat([h, a], -1)) if c.proprioception else p  # [D5]
        return h, torch.cat([sample_straight_through(self.prior(h)), p], -1)

    def predict(self, batch: dict[str, Tensor], context: int) -> tuple[dict, dict]:
        """Open-loop prediction (Fig. 3): filters `context` frames, then sees only the actions.

        batch: data.Sequences' (T, B, ...). Returns per camera uint8 (T, B, 64, 64, 3): every frame
        reconstructed from the posterior, and predicted (the same during the context); with
        proprioception [D5] also tcp (T, B, 3), m.
        """
        h, z, _ = self.filter(batch, self.initial(batch["reset"].shape[1]))
        s = torch.cat([h, z], -1)
        h, z, predicted = h[context - 1], z[context - 1], list(s[:context])
        for a in batch["a_prev"][context:]:
            h, z = self.imagine_step(h, z, a)
            predicted.append(torch.cat([h, z], -1))

        def seen_in(s: Tensor) -> dict[str, Tensor]:
            out = {k: to_uint8(x) for k, x in self.decode(s).items()}
            if self.config.proprioception:
                tcp = s[..., -len(POSE) :][..., :3]
                out["tcp"] = tcp * self.robot_std[:3] + self.robot_mean[:3]
            return out

        return seen_in(s), seen_in(torch.stack(predicted))

    def loss(
        self, batch: dict[str, Tensor], state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """One batch of data.Sequences -> Eq. 2's loss (), its terms, and the last state (detached).

        In training mode single steps are reset with probability ζ, keeping the real a_{t-1}.
        """
        c, reset = self.config, batch["reset"]
        if self.training:
            reset = reset | (torch.rand(reset.shape, device=reset.device) < c.zeta)
        images = {k: to_float(batch[f"rgb_{k}"]) for k in self.encoders}
        e = self.encode(images, batch["robot_obs"])
        h, z, q = self.observe(e, batch["a_prev"], reset, state)
        # The sum over t of Eq. 2 is estimated, without bias, from every n-th frame [D19]:
        # neighbours tell almost the same, and decoding is most of a step's work.
        n = c.decode_every if self.training else 1
        s, x = torch.cat([h, z], -1), images
        if n > 1:
            some = torch.arange(0, len(h), n, device=h.device)
            some = some + torch.randint(n, (), device=h.device)
            s = s.index_select(0, some)
            x = {k: to_float(batch[f"rgb_{k}"].index_select(0, some)) for k in images}
        decoded = self.decode(s)
        if c.proprioception:  # [D5] how far the arm moves; not known after a reset
            p, known = z[..., c.discrete :], ~reset[1:, :, None]
            x["robot"] = (p[1:] - p[:-1]) * known / POSE_SIGMA
            motion = self.motion(torch.cat([h, batch["a_prev"]], -1)[1:])
            decoded["robot"] = motion * known / POSE_SIGMA
        loss, terms = elbo_loss(x, decoded, q, self.prior(h), c.beta, c.delta)
        return loss, terms, (h[-1].detach(), z[-1].detach())


def to_float(x: Tensor) -> Tensor:
    """uint8 (..., 64, 64, 3) in 0..255 -> float (..., 3, 64, 64) in [-1, 1], channels-last."""
    if x.shape[-3:] != (64, 64, 3) or x.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8 (..., 64, 64, 3), got {x.dtype} {tuple(x.shape)}; "
            "shrink them with data.resize_area first"
        )
    return x.float().mul_(1 / 127.5).sub_(1).movedim(-1, -3)


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of to_float, clipped: (..., 3, H, W) -> (..., H, W, 3) uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).movedim(-3, -1).to(torch.uint8)


def initialise(module: nn.Module) -> None:
    """Xavier weights, zero biases, orthogonal recurrence [D7]."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GRUCell):
        nn.init.xavier_uniform_(module.weight_ih)
        nn.init.orthogonal_(module.weight_hh)
        nn.init.zeros_(module.bias_ih)
        nn.init.zeros_(module.bias_hh)
