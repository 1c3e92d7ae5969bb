"""What a model knows: probe, tracking, predictions, dreams. LUMOS Fig. 3, Table II's last column.

    probe      scene_obs, read from the latents of held-out play by a small network
    tracking   how well the agent follows held-out windows in the world model
    predict    Fig. 3: a few frames, then 195 steps from the recorded actions alone
    dream      the policy acts in the world model, from one observation on

    python diagnostics.py predict --checkpoint RUN/wm.pt --data data/play --out DIR
    python diagnostics.py probe   --checkpoint RUN/wm.pt --data data/play --out DIR

World model, agent and policy are arguments. Copy this file together with data.py, agent.py and
plan.py. Needs: torch, numpy, imageio, tqdm; for the commands also tyro, scikit-image and train.py.
"""

import functools
import json
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import agent as A
import data as D

# Of scene_obs: sliding door, drawer, both lights, and the blocks' xyz (not their angles).
SCENE = [0, 1, 4, 5, *(6 + 6 * block + i for block in range(3) for i in range(3))]
# Fig. 3: frames that are seen, frames of a clip (or the longest episode's), clips.
CONTEXT, FRAMES, CLIPS = 5, 200, 8


# ---------------------------------------------------------------------------- a run
class Log:
    """What a run says: lines, and the same as JSONL. writes: one of several processes does."""

    def __init__(self, folder: Path, stage: str, writes: bool = True):
        self.path, self.writes = folder / f"{stage}.jsonl", writes
        self.validated = set()  # steps

    def cut(self, step: int) -> None:
        """Removes records after a checkpoint's step, for those steps will be done again."""
        if not self.writes or not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        with D.naming(self.path, "Remove the damaged line"):
            records = [json.loads(x) for x in lines if x.endswith("\n")]
            records = [r for r in records if r["step"] <= step]
            self.validated = {r["step"] for r in records if r["kind"] == "validate"}
        text = "".join(json.dumps(r) + "\n" for r in records)
        D.write_text(self.path, text)

    def write(self, kind: str, step: int, figures: dict[str, float], seconds: float) -> None:
        """kind: train or validate. seconds: that the run has taken until now."""
        if not self.writes:
            return
        record = {"step": step, "kind": kind, "hours": round(seconds / 3600, 4)}
        record |= {k: float(f"{float(x):.5g}") for k, x in figures.items()}
        with D.naming(self.path, D.MAKE_ROOM), self.path.open("a") as f:
            f.write(json.dumps(record) + "\n")
        tqdm.write("  ".join(f"{k} {x}" for k, x in record.items()), file=sys.stdout)


def write_images(path: Path, images: np.ndarray, **how) -> None:
    content = imageio.imwrite("<bytes>", images, extension=path.suffix, **how)
    D.write(path, lambda file: file.write(content))


def mean(figures: list[dict]) -> dict[str, float]:
    return {k: sum(float(f[k]) for f in figures) / len(figures) for k in figures[0]}


# ---------------------------------------------------------------------------- tracking
@torch.no_grad()
def track(agent: A.Agent, world, batches: D.WindowBatches, count: int = 4) -> dict[str, float]:
    """How well the agent follows held-out windows, as at run time from a state without history:
    `follow`'s figures, and its reward as a share of the expert's, of which holding still is 0."""
    windows = (batches.batch(i, reset_start=1.0) for i in range(count))
    figures = mean([follow(agent, world, play, language) for play, language in windows])
    span = figures["reward_expert"] - figures["reward_hold"]
    for plan in ("proposed", "recognised"):
        if f"reward_{plan}" in figures:
            share = (figures[f"reward_{plan}"] - figures["reward_hold"]) / span
            figures[f"tracking_{plan}"] = share
    return figures


def follow(agent: A.Agent, world, play: A.Batch, language: A.Batch) -> A.Batch:
    """One batch's figures (), over the windows' real steps. Both dicts also have length (B,), their
    states before the padding, and gripper (B,), the gripper's command before the window.

    reward_proposed, reward_recognised: Eq. 3 with either plan; mse_*: of the arm's actions there.
    reward_hold, reward_expert: the yardsticks, holding still and replaying the expert's actions.
    critic_r2, value_std, target_std: what the critic knows of the returns.
    mse_observed, mse_still: on the expert's latents, of the arm's actions and of no motion;
    gripper_observed: how often the gripper's sign is right there.
    """
    c, batch = agent.config, A.join(play, language)
    s_E, s_0, actions = batch["s_E"], batch["s_E"][0], batch["a"][:-1]
    real = torch.arange(len(actions), device=s_0.device)[:, None] < batch["length"] - 1  # [D14]
    g, recognised, figures = agent.encode(s_E, language)
    plans = {"proposed": agent.propose(s_0, g)}
    if agent.with_plan:
        plans["recognised"] = recognised
    for name, plan in plans.items():
        s_pi, a = agent.imagine(world, s_0, g, plan, len(actions))
        r = A.intrinsic_reward(s_E[1:], s_pi[1:])
        figures[f"reward_{name}"] = r[real].mean()
        figures[f"mse_{name}"] = (a - actions)[real][:, :6].square().mean()
    if c.method != "no_ditto":  # with the last plan, as in training
        x = torch.cat([s_pi, g.expand(len(s_pi), -1, -1)], -1)
        v_lambda = A.lambda_return(r, agent.slow_critic(x), c.gamma, c.lam)
        v = agent.critic.standard_value(x[:-1])
        target = agent.critic.standardise(v_lambda)
        figures |= A.critic_figures(v[real], target[real], agent.critic.deviation)

    context = torch.cat([g, plans["proposed"]], -1).expand(len(actions), -1, -1)
    a = agent.actor(torch.cat([s_E[:-1], context], -1), sample=False)
    figures["mse_observed"] = (a - actions)[real][:, :6].square().mean()
    figures["mse_still"] = actions[real][:, :6].square().mean()
    figures["gripper_observed"] = (a[real][:, 6].sign() == actions[real][:, 6]).float().mean()

    hold = torch.zeros_like(actions)
    hold[..., 6] = batch["gripper"]
    for name, given in (("hold", hold), ("expert", actions)):
        state, rewards = world.split(s_0), []
        for a, s in zip(given, s_E[1:], strict=True):
            state = world.imagine_step(*state, a)
            rewards.append(A.intrinsic_reward(s, torch.cat(state, -1)))
        figures[f"reward_{name}"] = torch.stack(rewards)[real].mean()
    return figures


# ---------------------------------------------------------------------------- probe
def probe(world, train: tuple, held_out: tuple, steps: int = 3000) -> dict:
    """What do the latents know? A small network reads scene_obs from s.

    train, held_out: (Latents, PlayData) of the two splits; it learns from the first and is judged
    on the second. Returns the medians of its errors, and those of the training split's median.
    """

    def pairs(latents, data) -> tuple[Tensor, Tensor]:
        rows = np.linspace(0, len(data) - 1, min(len(data), 50_000)).astype(int)
        h, classes, robot_obs, scene_obs = (
            torch.from_numpy(x[rows]).to(world.device)
            for x in (latents.h, latents.z, data.robot_obs, data.scene_obs)
        )
        s = torch.cat([h.float(), world.latent_z(classes, robot_obs)], -1)
        return s, scene_obs[:, SCENE]

    x, y = pairs(*train)
    x_test, y_test = pairs(*held_out)
    mean, std = y.mean(0), y.std(0).clamp_min(1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(x.shape[-1], 256), torch.nn.ELU(), torch.nn.Linear(256, len(SCENE))
        ).to(world.device)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
        for _ in tqdm(range(steps), desc="probe", unit="step"):
            i = torch.randint(len(x), (256,), device=world.device)
            loss = F.smooth_l1_loss(net(x[i]), (y[i] - mean) / std, beta=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        figures = probe_figures(net(x_test) * std + mean, y_test)
    # Of 0 and 1 the median is the majority.
    return figures | {"chance": probe_figures(y.median(0).values, y_test)}


def probe_figures(guess: Tensor, y: Tensor) -> dict:
    """Medians of the errors of a guess (N, 13) or (13,) of scene_obs' columns SCENE, y (N, 13)."""
    error = (guess - y).abs().cpu()

    def cm(distance: Tensor) -> float:
        return round(100 * float(distance.median()), 2)

    blocks = {"red": error[:, 4:6], "blue": error[:, 7:9], "pink": error[:, 10:12]}
    return {
        "door_cm": cm(error[:, 0]),
        "drawer_cm": cm(error[:, 1]),
        "lights_right": round(float((error[:, 2:4] < 0.5).float().mean()), 4),
        "block_xy_cm": {name: cm(xy.norm(dim=-1)) for name, xy in blocks.items()},
    }


# ---------------------------------------------------------------------------- predictions
def eventful(data: D.PlayData, L: int, n: int = 3) -> dict[str, Tensor]:
    """The n stretches of L frames in which doors and lights change most: worth a prediction."""
    starts = data.stretches(L)
    scene = data.scene_obs[:, SCENE[:4]] / [0.28, 0.22, 1, 1]
    change = [np.ptp(scene[a : a + L], axis=0).sum() for a in starts]
    first = np.sort(starts[np.argsort(change)[-n:]])
    return data.frames(first + np.arange(L)[:, None], fresh=True)


def prediction_picture(batch: dict, seen: dict, unseen: dict, hz: float) -> np.ndarray:
    """seen, unseen: what the world model predicts. Rows: for three sequences and both cameras, the
    truth, the reconstruction from the posterior, the prediction from CONTEXT frames on. Columns:
    moments, the last context frame first, at time 0. Twice the images' size, with names."""
    from PIL import Image, ImageDraw, ImageFont

    T, B = batch["reset"].shape
    moments = np.unique(np.linspace(CONTEXT - 1, T - 1, 12).astype(int))
    rows = {}
    for b in range(min(B, 3)):
        for k in ("static", "gripper"):
            kinds = {"truth": batch[f"rgb_{k}"], "reconstruction": seen[k], "prediction": unseen[k]}
            for kind, x in kinds.items():
                images = x[moments, b].cpu().numpy()  # (12, 64, 64, 3)
                rows[f"{b + 1}: {k}\n{kind}"] = np.concatenate([*images], 1)
    images = enlarged(np.concatenate([*rows.values()]))
    left, top, size = 118, 24, 128  # pixels
    picture = Image.new("RGB", (left + images.shape[1], top + len(images)), "white")
    picture.paste(Image.fromarray(images), (left, top))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, name in enumerate(rows):
        draw.text((8, top + i * size + 44), name, "black", font)
    for i, t in enumerate(moments):
        draw.text((left + i * size + 4, 3), f"{(t - CONTEXT + 1) / hz:.1f} s", "black", font)
    return np.asarray(picture)


def enlarged(images: np.ndarray) -> np.ndarray:
    """(..., H, W, 3) -> (..., 2 H, 2 W, 3)"""
    return images.repeat(2, -3).repeat(2, -2)


def predict(checkpoint: str, data: str, out: Path, seed: int = 0, device: str = "cpu") -> None:
    """Fig. 3: 5 frames of held-out play, then 195 steps from the recorded actions alone.

    Writes prediction.png, prediction.gif (truth above prediction) and prediction.json: PSNR (dB)
    and SSIM of each step after the context, over all clips: of the prediction, of the
    reconstruction from the posterior, which sees every frame, and of the last context frame, held;
    with proprioception [D5] also how far the tcp is from the truth, in cm, median over clips.

    Args:
        checkpoint: RUN/wm.pt, or an agent's
        data: folder made by data.py pack, of which validation/ is predicted
        out: folder of what is written
        seed: of the clips and of the samples
        device: cpu, cuda, cuda:1, ...
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    import train

    loaded = train.load_checkpoint(Path(checkpoint), "wm", device)
    world = train.load_world_model(loaded, device)
    play = D.PlayData(data, "validation")
    train.same_kind(loaded, play.meta, data)
    frames = min(FRAMES, play.longest)
    first = np.random.default_rng(seed).permutation(play.stretches(frames))[:CLIPS]
    batch = play.frames(first + np.arange(frames)[:, None], fresh=True)
    with torch.no_grad():
        torch.manual_seed(seed)
        seen, unseen = world.predict(D.to_device(batch, device), CONTEXT)
    psnr = functools.partial(peak_signal_noise_ratio, data_range=255)
    ssim = functools.partial(structural_similarity, data_range=255, channel_axis=-1)
    result = {
        "checkpoint": str(checkpoint), "step": loaded["step"], "hz": play.meta["hz"],
        "context": CONTEXT, "frames": frames, "clips": len(first), "seed": seed,
    }  # fmt: skip
    if "tcp" in unseen:  # [D5]
        tcp = batch["robot_obs"][..., :3].numpy()  # (T, B, 3)
        for name, x in (("prediction", unseen["tcp"].cpu().numpy()), ("copy", tcp[CONTEXT - 1])):
            error = 100 * np.median(np.linalg.norm(x - tcp, axis=-1), axis=-1)
            result[f"tcp_cm_{name}"] = np.round(error[CONTEXT:], 2).tolist()
    film = []
    for k in tqdm(("static", "gripper"), desc="prediction", unit="camera"):
        truth = batch[f"rgb_{k}"].numpy()  # (T, B, 64, 64, 3)
        copied = torch.tensor(truth[CONTEXT - 1]).expand(*truth.shape)
        for name, x in {"prediction": unseen[k], "reconstruction": seen[k], "copy": copied}.items():
            pairs = list(zip(truth[CONTEXT:], x[CONTEXT:].cpu().numpy(), strict=True))
            curves = {"psnr": [psnr(*at_t) for at_t in pairs]}  # of the clips' mean error
            curves["ssim"] = [np.mean(list(map(ssim, *at_t))) for at_t in pairs]
            result |= {f"{m}_{k}_{name}": np.round(c, 3).tolist() for m, c in curves.items()}
        both = np.concatenate([truth, unseen[k].cpu().numpy()], 2)  # (T, B, 128, 64, 3)
        film.append(np.concatenate(both[:, :4].swapaxes(0, 1), 2))  # (T, 128, 4 * 64, 3)
    out = Path(out)
    picture = prediction_picture(batch, seen, unseen, play.meta["hz"])
    write_images(out / "prediction.png", picture)
    write_film(out / "prediction.gif", enlarged(np.concatenate(film, 1)), play.meta["hz"])
    D.write_json(out / "prediction.json", result)
    parts = {"1-10": slice(0, 10), "11-50": slice(10, 50), "51-": slice(50, None)}
    print(f"{'mean over steps':<30}" + "".join(f"{name:>9}" for name in parts))
    for name, curve in result.items():
        if isinstance(curve, list):
            print(f"{name:<30}" + "".join(f"{np.mean(curve[p]):>9.2f}" for p in parts.values()))


# ---------------------------------------------------------------------------- dreams
@torch.no_grad()
def dream(policy, obs: dict | None, embedding, limit: int = 360) -> tuple[np.ndarray, np.ndarray]:
    """The policy in its own world model: it sees `obs`, then imagines what its actions lead to.

    obs: an environment's observation with images (64, 64, 3); None: it goes on from its own latent.
    embedding: (384,) of the instruction. limit: simulator steps. Returns what both cameras would
    see at each of the policy's steps, the first included: static and gripper, each
    (n, 64, 64, 3) uint8. Table II's last column is people who watch such films.
    """
    if obs is not None:
        policy.reset()
    states = []
    for t in range(0, limit + 1, policy.skip):
        policy.act(obs if t == 0 else None, embedding)
        states.append(policy.state)
    h, z = (torch.stack(x) for x in zip(*states, strict=True))  # (n, 1, H), (n, 1, Z)
    images = policy.world.show(h, z)  # (n, 1, 64, 64, 3)
    return tuple(images[k][:, 0].cpu().numpy() for k in ("static", "gripper"))


def write_film(path: Path, frames: np.ndarray, hz: float) -> None:
    """frames (n, H, W, 3) uint8 -> a GIF."""
    write_images(path, frames, duration=1000 / hz, loop=0)


# ---------------------------------------------------------------------------- command line
def probe_checkpoint(checkpoint: str, data: str, out: Path, device: str = "cpu") -> None:
    """Writes probe.json: what a world model's latents know of a scene that is known.

    Args:
        checkpoint: RUN/wm.pt, or an agent's
        data: folder made by data.py pack
        out: folder of what is written
        device: cpu, cuda, cuda:1, ...
    """
    import train

    loaded = train.load_checkpoint(Path(checkpoint), "wm", device)
    world = train.load_world_model(loaded, device)
    splits = [D.PlayData(data, split) for split in ("training", "validation")]
    train.same_kind(loaded, splits[0].meta, data)
    latents = [D.cache_latents(world, x, train.identity(world.state_dict())) for x in splits]
    figures = probe(world, *zip(latents, splits, strict=True))
    D.write_json(Path(out) / "probe.json", {"step": loaded["step"]} | figures)
    print(json.dumps(figures, indent=1))


def main(arguments: list[str] | None = None) -> None:
    import tyro

    commands = {"predict": predict, "probe": probe_checkpoint}
    how = {"description": __doc__, "use_underscores": True}
    with D.command("diagnostics.py"):
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, **how)


if __name__ == "__main__":
    main()
