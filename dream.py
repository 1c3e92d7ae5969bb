"""The policy inside its own world model, and who judges it there. LUMOS Table II, "World Model".

    simulator  look, act   step   look, act   step ...      the oracle knows what was done
    dream      look, act   imagine, act   imagine, act ...  nothing is seen after the first look:
                                                            the prior is sampled; a judge reads it

The judge is a small network that compares the latent now with that of the attempt's start and says
which tasks have been done between them. Its first half learns to read the table from one latent:
doors, lights, blocks, hand; its second half compares two readings, and learns from pairs of frames
of the training split what the simulator's oracle, put back into both, says was done.
`evaluate.py --env dream` tries each instruction that the benchmark's chains come to from the same
picture in both worlds. What the simulator's oracle saw of all tasks then tells how far the judge
can be believed on latents of what was seen; where its precision or recall is under 0.9, it is not.
After a success in the simulator the policy acts on for a moment, and the next instruction begins
there, so these are not the benchmark's chains.
How it does on latents that were only imagined, nobody can tell: they have no other truth.

Copy this file together with data.py. Needs: torch, numpy, tqdm. World model, policy, simulator and
oracle: arguments.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import data as D

ENOUGH = 5  # attempts in which a task was done, and at least 0.9 of both, for a judgement to count
STRETCHES, MOMENTS, LONGEST = 6000, 4, 360  # of play that the judge learns from; simulator steps
CLIPS, SEEN = 6000, 15  # it reads latents with the history that a policy has which forgets
STEPS, BATCH = 4000, 256
LOOKS, BEHIND = 5, 10  # one says little, so the mean of 5 counts; and looks behind a success


def table_of(play: D.PlayData, rows) -> Tensor:
    """What the judge reads (N, 20): sliding door, drawer, both lights, the tcp's xyz, the gripper's
    width, and of each block xyz and whether it is within 4 cm of the tcp."""
    scene, robot = (torch.from_numpy(x[rows]) for x in (play.scene_obs, play.robot_obs))
    blocks = scene[:, 6:].unflatten(-1, (3, 6))[..., :3]  # (N, 3, 3)
    near = ((blocks - robot[:, None, :3]).norm(dim=-1) < 0.04).float()
    return torch.cat([scene[:, [0, 1, 4, 5]], robot[:, [0, 1, 2, 6]], blocks.flatten(1), near], -1)


class Judge(nn.Module):
    """s at an attempt's start, s now: (N, k) each -> logits (N, tasks): done since, or not."""

    def __init__(self, k: int, tasks: list[str]):
        super().__init__()
        self.tasks = tasks
        block = lambda i, o, p: (nn.Linear(i, o), nn.LayerNorm(o), nn.ELU(), nn.Dropout(p))
        self.reader = nn.Sequential(*block(k, 512, 0.1), *block(512, 256, 0.1), nn.Linear(256, 20))
        self.net = nn.Sequential(
            *block(40, 256, 0.3), *block(256, 128, 0.1), nn.Linear(128, len(tasks))
        )

    def forward(self, start: Tensor, now: Tensor) -> Tensor:
        return self.compare(self.reader(start), self.reader(now))

    def compare(self, start: Tensor, now: Tensor) -> Tensor:
        """Two readings (N, 20)."""
        return self.net(torch.cat([start, now - start], -1))


PAIRS = np.triu_indices(MOMENTS, 1)  # of a stretch's moments, the earlier ones and the later ones


def labelled_stretches(play: D.PlayData, env, oracle, tasks: list[str], rng, count: int):
    """rows (N, MOMENTS) of `play`, each N in one episode and in order, and labels (N, P, tasks):
    what the oracle says was done between each pair of them.

    Of three stretches two are about an annotated span: rows in it, its end, and one up to a second
    behind; the third is anywhere, and at most an attempt long."""
    hz, ends = round(play.meta["hz"]), play.episodes[:, 1]
    rows, labels = np.empty((count, MOMENTS), int), torch.empty(count, len(PAIRS[0]), len(tasks))
    for k in trange(count, desc="judge: what was done", unit="stretch"):
        if k % 3:
            first, last = play.spans[rng.integers(len(play.spans))]
            behind = last - 1 + rng.integers(hz)
            rows[k] = *rng.integers(first, last, MOMENTS - 2), last - 1, behind
        else:
            first = rng.integers(len(play))
            rows[k] = first + rng.integers(LONGEST * hz // 30, size=MOMENTS)
        rows[k] = np.minimum(np.sort(rows[k]), ends[np.searchsorted(ends, first, "right")] - 1)
        infos = []
        for row in rows[k]:
            env.reset(*(x[row].astype(float) for x in (play.robot_obs, play.scene_obs)))
            infos.append(env.get_info())
        for p, (a, b) in enumerate(zip(*PAIRS, strict=True)):
            labels[k, p] = torch.tensor([oracle(infos[a], infos[b], task) for task in tasks])
    return rows, labels


@torch.no_grad()
def latents_of_spans(world, play: D.PlayData, spans: np.ndarray, batch: int = 64) -> Tensor:
    """s (M, L, k) float16 of the frames of spans (M, 2), each filtered from h = z = 0 as a policy
    does it that has a new instruction, or forgets [D8]; the last one is repeated."""
    device, lengths = world.decoder_in.weight.device, spans[:, 1] - spans[:, 0]
    out = torch.empty(len(spans), lengths.max(), world.config.latent, dtype=torch.float16)
    for i in trange(0, len(spans), batch, desc="judge: latents", unit="batch"):
        first, last = spans[i : i + batch].T
        rows = np.minimum(first + np.arange(lengths.max())[:, None], last - 1)
        frames = play.frames(rows, fresh=True)
        frames = {k: x.to(device) for k, x in frames.items()}
        h, z, _ = world.filter(frames, world.initial(len(first)))  # (L, B, H), (L, B, Z)
        out[i : i + batch] = torch.cat([h, z], -1).transpose(0, 1).half().cpu()
    return out


def fit(parameters, loss_of, count: int, name: str) -> None:
    """STEPS of AdamW, its rate falling to 0, on loss_of(i) with i (BATCH,) of `count` examples."""
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05)
    for step in trange(STEPS, desc=f"judge: {name}", unit="step"):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / STEPS)
        loss = loss_of(torch.randint(count, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_judge(world, play: D.PlayData, env, oracle, tasks: list[str], seed: int = 0) -> Judge:
    """A judge of `tasks`. play: a training split; env, oracle: of the simulator that it is of."""
    device, rng = world.decoder_in.weight.device, np.random.default_rng(seed)
    begin = np.repeat(play.episodes[:, 0], np.diff(play.episodes)[:, 0])  # of each row's episode

    def history(rows: np.ndarray) -> np.ndarray:
        """Spans (N, 2) of 1 to SEEN frames of which `rows` (N,) are the last ones."""
        seen = rng.integers(1, SEEN + 1, size=len(rows))
        return np.stack([np.maximum(rows - seen + 1, begin[rows]), rows + 1], -1)

    @torch.no_grad()
    def readings(spans: np.ndarray) -> Tensor:
        """What is read (N, 20) in the last frames of spans (N, 2)."""
        s = latents_of_spans(world, play, spans)[np.arange(len(spans)), np.diff(spans)[:, 0] - 1]
        return torch.cat([judge.reader(x.to(device).float()) for x in s.split(4096)])

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(world.config.latent, list(tasks)).to(device).train()
        spans = history(rng.integers(len(play), size=CLIPS))
        s = latents_of_spans(world, play, spans)
        clips = spans[:, :1] + np.arange(s.shape[1])  # their rows, where they are that long
        real = clips < spans[:, 1:]
        s, y = s[torch.from_numpy(real)], table_of(play, clips[real]).to(device)
        y = (y - y.mean(0)) / y.std(0).clamp_min(1e-3)
        read = lambda i: F.smooth_l1_loss(judge.reader(s[i].to(device).float()), y[i], beta=0.1)
        fit(judge.reader.parameters(), read, len(s), "reads")

        rows, labels = labelled_stretches(play, env, oracle, tasks, rng, STRETCHES)
        judge.reader.eval()
        start, now = rows.ravel()[:, None] + [0, 1], history(rows.ravel())  # one frame, more frames
        a, b = (readings(x).unflatten(0, rows.shape) for x in (start, now))
        a, b = a[:, PAIRS[0]].flatten(0, 1), b[:, PAIRS[1]].flatten(0, 1)
        labels = labels.flatten(0, 1).to(device)
        compare = lambda i: F.binary_cross_entropy_with_logits(judge.compare(a[i], b[i]), labels[i])
        fit(judge.net.parameters(), compare, len(labels), "compares")
    return judge.eval()


class Verdict:
    """What the judge says of one attempt: `done`, a set of tasks, after each `look` at a latent."""

    def __init__(self, judge: Judge):
        self.judge, self.start, self.last, self.done = judge, None, [], set()

    @torch.no_grad()
    def look(self, now: Tensor) -> set[str]:
        """now: (1, k). The first look is the attempt's start."""
        self.start = now if self.start is None else self.start
        self.last = [*self.last, self.judge(self.start, now)[0].sigmoid()][-LOOKS:]
        likely = torch.stack(self.last).mean(0) > 0.5
        if len(self.last) == LOOKS:
            self.done |= {t for t, yes in zip(self.judge.tasks, likely, strict=True) if yes}
        return self.done


def attempt(policy, judge: Judge, obs: dict, embedding, task: str, limit: int) -> bool:
    """One instruction in the dream, from one observation on; limit: in simulator steps."""
    policy.reset()
    policy.act(obs, embedding)
    verdict = Verdict(judge)
    verdict.look(torch.cat(policy.state, -1))
    for _ in range(policy.skip, limit + 1, policy.skip):
        policy.act(None, embedding)
        if task in verdict.look(torch.cat(policy.state, -1)):
            return True
    return False


class Watched:
    """An oracle that also asks the judge, each time the policy has looked, and notes what both saw
    of all tasks since the attempt began: `truth` and `verdict.done`, sets of tasks. It says yes
    BEHIND looks after the success, for at first what was done is only just done."""

    def __init__(self, oracle, policy, judge: Judge):
        self.oracle, self.policy, self.verdict = oracle, policy, Verdict(judge)
        self.last, self.truth, self.solved, self.left = None, set(), False, BEHIND

    def __call__(self, start, info, task) -> bool:
        if self.policy.state is not self.last:
            self.last = self.policy.state
            self.verdict.look(torch.cat(self.last, -1))
            tasks = self.verdict.judge.tasks
            self.truth |= {x for x in tasks if self.oracle(start, info, x)}
            self.left -= self.solved
        if self.oracle(start, info, task):
            self.truth, self.solved = self.truth | {task}, True
        return self.left <= 0


def summarise(records: list[dict]) -> dict:
    """Per task: how often it was solved in the dream and in the simulator, of n attempts from the
    same pictures; the judge's precision and recall (None: nothing to divide by), and the number of
    attempts, of whatever instruction, that they are of."""
    tasks, judge = {}, {}
    for r in records:
        for a in r["attempts"]:
            n = tasks.setdefault(a["task"], [0, 0, 0])
            n[0], n[1], n[2] = n[0] + a["dream"], n[1] + a["sim"], n[2] + 1
    attempts = [a for r in records for a in r["attempts"]]
    for task in sorted({x for a in attempts for x in (a["task"], *a["truth"], *a["judged"])}):
        both = sum(task in a["truth"] and task in a["judged"] for a in attempts)
        true, said = (sum(task in a[k] for a in attempts) for k in ("truth", "judged"))
        judge[task] = {"done": true, "precision": both / said if said else None}
        judge[task]["recall"] = both / true if true else None
    return {"dream": tasks, "judge": judge}


def trusted(judge: dict) -> bool:
    return judge["done"] >= ENOUGH and min(judge["precision"] or 0, judge["recall"] or 0) >= 0.9


def table(result: dict) -> str:
    """The judge first, then the rates that it is believed about."""
    share = lambda x: "-" if x is None else f"{x:.2f}"
    lines = [f"{'The judge':<28}{'done':>6}{'precision':>11}{'recall':>8}"]
    for task, j in result["judge"].items():
        lines.append(f"{task:<28}{j['done']:>6}{share(j['precision']):>11}{share(j['recall']):>8}")
    lines += ["", f"{'Solved':<28}{'n':>6}{'dream':>11}{'sim':>8}"]
    for task, (dream, sim, n) in result["dream"].items():
        imagined = f"{dream / n:.1%}" if trusted(result["judge"][task]) else "not judged"
        lines.append(f"{task:<28}{n:>6}{imagined:>11}{sim / n:>8.1%}")
    return "\n".join(lines)
