"""The policy inside its own world model, and who judges it there. LUMOS Table II, "World Model".

    simulator  look, act   step   look, act   step ...      the oracle knows what was done
    dream      look, act   imagine, act   imagine, act ...  nothing is seen after the first look:
                                                            the prior is sampled; a judge reads it

The judge is a small network that compares the latent now with that of the attempt's start and says
which task has been done between them, if any. It learns from the annotated spans of the training
split: what their last frames show was done; what they show well before that was not yet, and in
the play between one span's end and the next one's nothing was (that it has no annotation is no
proof: a few per cent of it may show a task done).
`evaluate.py --env dream` tries each instruction that the benchmark's chains come to from the same
picture in both worlds. What the simulator's oracle saw of all tasks then tells how far the judge
can be believed on latents of what was seen; where its precision or recall is under 0.9, it is not.
How it does on latents that were only imagined, nobody can tell: they have no other truth.

Copy this file together with data.py. Needs: torch, numpy, tqdm. World model, policy: arguments.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import data as D

# In frames of 1/30 s: up to 28 before its span's end a task is not done, in the last 2, a row
# at 15 Hz, it is; an annotated span ends up to 12 frames behind its success (teleop.SETTLE).
NOT_YET, LAST = 28, 2
ENOUGH = 5  # attempts in which a task was done, and at least 0.9 of both, for a judgement to count
STEPS, BATCH, SURE = 2000, 256, 0.95


class Judge(nn.Module):
    """s at an attempt's start, s now: (N, k) each -> logits (N, 1 + tasks); the first: nothing."""

    def __init__(self, k: int, tasks: list[str], hidden: int = 256):
        super().__init__()
        self.tasks = tasks
        self.net = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(2 * k, hidden), nn.LayerNorm(hidden), nn.ELU(),
            nn.Dropout(0.3), nn.Linear(hidden, 1 + len(tasks)),
        )  # fmt: skip

    def forward(self, start: Tensor, now: Tensor) -> Tensor:
        return self.net(torch.cat([start, now], -1))

    @torch.no_grad()
    def done(self, start: Tensor, now: Tensor) -> str | None:
        """The task that was done between two latents (1, k), or None. It is asked a hundred times
        in an attempt, and one wrong answer counts, so it must be sure."""
        p, best = self(start, now)[0].softmax(-1).max(-1)
        return self.tasks[best - 1] if best > 0 and p > SURE else None


def quiet_stretches(play: D.PlayData, not_yet: int) -> np.ndarray:
    """(Q, 2) rows [start, end), no longer than the longest span, in which no span ends: from one's
    end, or an episode's start, to `not_yet` rows before the next one's end."""
    longest, ends, out = np.diff(play.spans).max(), np.sort(play.spans[:, 1]), []
    for first, last in play.episodes:
        here = ends[(ends > first) & (ends <= last)]
        for a, b in zip([first, *here], here - not_yet, strict=False):
            out += [(x, min(x + longest, b)) for x in range(a, b, longest)]
    return np.array(out, int).reshape(-1, 2)


@torch.no_grad()
def latents_of_spans(
    world, play: D.PlayData, spans: np.ndarray, batch: int = 64
) -> tuple[Tensor, Tensor]:
    """s (M, L, k) float16 of the frames of spans (M, 2), each filtered from h = z = 0 as a policy
    with a new instruction does it (and goes on, unless it forgets [D8]), the last one repeated; and
    their lengths (M,)."""
    device, lengths = world.decoder_in.weight.device, spans[:, 1] - spans[:, 0]
    out = torch.empty(len(spans), lengths.max(), world.config.latent, dtype=torch.float16)
    for i in trange(0, len(spans), batch, desc="judge: latents", unit="batch"):
        first, last = spans[i : i + batch].T
        rows = np.minimum(first + np.arange(lengths.max())[:, None], last - 1)
        frames = play.frames(rows, fresh=True)
        frames = {k: x.to(device) for k, x in frames.items()}
        h, z, _ = world.filter(frames, world.initial(len(first)))  # (L, B, H), (L, B, Z)
        out[i : i + batch] = torch.cat([h, z], -1).transpose(0, 1).half().cpu()
    return out, torch.from_numpy(lengths)


def train_judge(world, play: D.PlayData, seed: int = 0) -> Judge:
    """A judge of the tasks in `play`'s annotations (its training split), by cross-entropy: a third
    of each batch are spans at their end, the others spans well before it and quiet stretches."""
    device, tasks = world.decoder_in.weight.device, sorted(set(play.tasks))
    not_yet, last = (-(-n // play.meta["skip"]) for n in (NOT_YET, LAST))  # in rows
    names = torch.tensor([1 + tasks.index(task) for task in play.tasks])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quiet = quiet_stretches(play, not_yet)
        quiet = quiet[torch.randperm(len(quiet))[: len(play.spans)].numpy()]
        s, lengths = latents_of_spans(world, play, np.concatenate([play.spans, quiet]))
        judge = Judge(world.config.latent, tasks).to(device).train()
        optimizer = torch.optim.AdamW(judge.parameters(), 1e-3, weight_decay=0.05)
        names = F.pad(names, (0, len(quiet)))
        still = not_yet * (names > 0)  # rows at the end in which it may have been done
        early = (lengths > still + 1).nonzero()[:, 0]  # spans with rows before, quiet stretches
        for step in trange(STEPS, desc="judge", unit="step"):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / STEPS)
            ended = torch.arange(BATCH) % 3 == 0  # a span at its end, else what comes before one
            m = torch.randint(len(play.spans), (BATCH,))
            m = torch.where(ended, m, early[torch.randint(len(early), (BATCH,))])
            most = (lengths[m] - still[m]).clamp_min(1)  # rows in which it was surely not done yet
            at = lambda most: (torch.rand(BATCH) * most).long()  # a row, uniformly
            start = at(most)
            now = torch.where(ended, lengths[m] - 1 - at(torch.tensor(last)), at(most))
            start = torch.minimum(start, now)
            logits = judge(*(s[m, t].to(device).float() for t in (start, now)))
            loss = F.cross_entropy(logits, torch.where(ended, names[m], 0).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge.eval()


def attempt(policy, judge: Judge, obs: dict, embedding, task: str, limit: int) -> bool:
    """One instruction in the dream, from one observation on; limit: in simulator steps."""
    policy.reset()
    policy.act(obs, embedding)
    start = torch.cat(policy.state, -1)
    for _ in range(policy.skip, limit + 1, policy.skip):
        policy.act(None, embedding)
        if judge.done(start, torch.cat(policy.state, -1)) == task:
            return True
    return False


class Watched:
    """An oracle that also asks the judge, each time the policy has looked, and notes what both saw
    of all tasks since the attempt began: `truth` and `judged`, sets of tasks."""

    def __init__(self, oracle, policy, judge: Judge):
        self.oracle, self.policy, self.judge = oracle, policy, judge
        self.start, self.last, self.truth, self.judged = None, None, set(), set()

    def __call__(self, start, info, task) -> bool:
        if self.policy.state is not self.last:
            self.look()
            self.truth |= {x for x in self.judge.tasks if self.oracle(start, info, x)}
        done = self.oracle(start, info, task)
        self.truth |= {task} if done else set()
        return done

    def look(self) -> None:
        self.last, now = self.policy.state, torch.cat(self.policy.state, -1)
        self.start = now if self.start is None else self.start
        self.judged |= {self.judge.done(self.start, now)} - {None}


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
