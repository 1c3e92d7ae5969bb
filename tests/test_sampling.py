"""Batches of play: sequences for the world model, windows for the agent, cached latents."""

import json

import numpy as np
import pytest
import torch
from conftest import write_packed

import data as D

N, EPISODES, SPANS = 265, [[0, 201], [201, 265]], [[33, 97], [133, 163], [201, 265]]


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> D.PlayData:
    """A packed split: robot_obs[r, 0] is r."""
    root = tmp_path_factory.mktemp("data") / "packed"
    write_packed(root, N)
    images = np.random.default_rng(0).integers(0, 256, (2, N, 64, 64, 3), np.uint8)
    arrays = dict(zip(D.CAMERAS, images, strict=True)) | {"episodes": EPISODES, "spans": SPANS}
    arrays["robot_obs"] = np.arange(N * 15, dtype=np.float32).reshape(N, 15) / 15
    for k, x in arrays.items():
        np.save(root / "training" / f"{k}.npy", x)
    lang = {"sentences": ["x", "y", "x"], "tasks": ["a", "b", "a"]}
    (root / "training" / "lang.json").write_text(json.dumps(lang))
    return D.PlayData(root, "training")


def rows(batch) -> np.ndarray:
    """Which row of the data each frame of a batch is."""
    return np.rint(batch["robot_obs"][..., 0].numpy()).astype(int)


@pytest.mark.parametrize("B, L", [(5, 9), (4, 7), (1, 265), (3, 100)])
def test_d10_rows_go_on_exactly_and_an_epoch_covers_every_frame(play, B, L):
    s = D.Sequences(play, B, L, seed=3)
    for epoch in range(2):
        steps = range(epoch * s.steps_per_epoch, (epoch + 1) * s.steps_per_epoch)
        batches = [s.batch(step) for step in steps]
        assert all(batch["rgb_static"].shape == (L, B, 64, 64, 3) for batch in batches)
        batch = {k: torch.cat([x[k] for x in batches]) for k in batches[0]}
        r = rows(batch)
        assert (np.diff(r, axis=0) % N == 1).all()
        reset = np.isin(r, [0, 201])  # an epoch's first step, an episode's first frame
        reset[0] = True
        assert batch["reset"].dtype == torch.bool and (batch["reset"].numpy() == reset).all()
        a_prev = np.where(reset[..., None], np.float32(D.NO_ACTION), play.actions[r - 1])
        assert (batch["a_prev"].numpy() == a_prev).all()
        for k in D.CAMERAS:
            assert batch[k].dtype == torch.uint8 and (batch[k].numpy() == getattr(play, k)[r]).all()
        seen = np.bincount(r.ravel(), minlength=N)
        assert seen.min() >= 1 and (r.size > N or seen.max() == 1)  # once where it divides
    offsets = [rows(s.batch(e * s.steps_per_epoch))[0, 0] for e in range(5)]
    assert len(set(offsets)) > 1  # another offset for each epoch


def test_app_a_starts_are_drawn_in_the_episode_and_clipped_to_its_end(play):
    s = D.Sequences(play, 200, 50, seed=0, carry=False)
    batches = [s.batch(step) for step in range(8)]
    batch = {k: torch.cat([x[k] for x in batches], 1) for k in batches[0]}
    r = rows(batch)
    assert (np.diff(r, axis=0) == 1).all()
    assert ((r[0] >= 201) | (r[-1] < 201)).all()  # never across the border of two episodes
    assert batch["reset"][0].all() and not batch["reset"][1:].any()
    assert (batch["a_prev"][0] == torch.tensor(D.NO_ACTION)).all()
    assert (batch["a_prev"][1:].numpy() == play.actions[r[:-1]]).all()
    # Clipping heaps the last 50 of each episode on its last admissible start: 50 of 265 draws.
    share = np.bincount(r[0], minlength=N) / r[0].size
    np.testing.assert_allclose(share[[151, 215]], 50 / 265, atol=0.03)
    assert share[0] < 0.02
    only = D.Sequences(play, 50, 65, seed=0, carry=False)  # the second episode has 64 frames
    assert (rows(only.batch(0))[-1] < 201).all()
    with pytest.raises(D.DataError, match="202"):
        D.Sequences(play, 2, 202, seed=0, carry=False)


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("carry", [True, False])
def test_data_that_is_kept_on_a_device_gives_the_same_batches_and_is_not_read(play, carry):
    kept = D.PlayData(play.path.parent, "training")
    size = sum(getattr(kept, k).nbytes for k in (*D.CAMERAS, "robot_obs", "actions", "is_start"))
    assert not kept.keep_on("cpu", 2 * size - 1) and not kept.kept, "more than half of what is free"
    assert kept.keep_on("cpu", 2 * size)
    one, other = (D.Sequences(data, 4, 16, seed=1, carry=carry) for data in (play, kept))
    for k in D.CAMERAS:
        setattr(kept, k, None)
    for step in range(one.steps_per_epoch + 1):
        a, b = one.batch(step), other.batch(step)
        assert a.keys() == b.keys() and equal(a, b)


def test_batches_are_pure_functions_of_seed_and_step(play):
    for make in (
        lambda seed: D.Sequences(play, 3, 8, seed=seed),
        lambda seed: D.Sequences(play, 3, 8, seed=seed, carry=False),
        lambda seed: D.Windows(play, 5, kind="play", seed=seed),
        lambda seed: D.Windows(play, 5, kind="lang", seed=seed),
    ):
        one, two = make(7), make(7)
        wanted = [one.batch(step) for step in range(4)]
        assert all(equal(two.batch(step), wanted[step]) for step in (3, 0, 2, 1))
        assert not equal(make(8).batch(0), wanted[0]) and not equal(wanted[0], wanted[1])


@pytest.mark.parametrize("kind", ["play", "lang"])
def test_windows_have_20_to_32_frames_inside_their_episode_or_span(play, kind):
    bounds = play.episodes if kind == "play" else play.spans
    batch = D.Windows(play, 4000, kind=kind).batch(0)
    assert batch["index"].shape == (32, 4000) and batch["a"].shape == (32, 4000, 7)
    start, length = batch["index"][0].numpy(), batch["length"].numpy()
    assert ((bounds[:, :1] <= start) & (start + length <= bounds[:, 1:])).any(0).all()
    # Every start that leaves room for the shortest window, the last one included.
    assert set(start) == {s for a, b in bounds for s in range(a, b - 20 + 1)}
    assert set(length) == set(range(20, 33))


def test_windows_of_play_keep_away_from_bursts_and_reach_up_to_them(play, monkeypatch):
    disturbed = np.zeros(N, bool)
    disturbed[[40, 41, 50, 120, 230]] = True  # rows 42 to 50 are too short for a window
    monkeypatch.setattr(play, "disturbed", disturbed)
    index = D.Windows(play, 3000).batch(0)["index"].numpy()
    assert not disturbed[index].any()
    clean = [(0, 40), (51, 120), (121, 201), (201, 230), (231, 265)]
    assert set(index[0]) == {s for a, b in clean for s in range(a, b - 20 + 1)}
    assert {39, 119, 229} <= set(index[-1])


def test_padding_holds_the_last_frame_and_its_gripper_and_moves_no_arm(play):
    batch = D.Windows(play, 64, kind="play").batch(0)
    for b, n in enumerate(batch["length"].tolist()):
        index, a = batch["index"][:, b].numpy(), batch["a"][:, b].numpy()
        assert (np.diff(index[:n]) == 1).all() and (index[n:] == index[n - 1]).all()
        assert (a[:n] == play.actions[index[:n]]).all()
        assert (a[n:, :6] == 0).all() and (a[n:, 6] == a[n - 1, 6]).all()
        assert index[-1] == index[0] + n - 1  # the hindsight goal is the last real frame


def test_language_windows_carry_their_sentence_and_d11_marks_the_last_8_places(play):
    batch = {k: x.numpy() for k, x in D.Windows(play, 1500, kind="lang").batch(0).items()}
    (first, end), start = play.spans[batch["span"]].T, batch["index"][0]
    assert (first <= start).all() and (batch["emb"] == play.span_emb[batch["span"]]).all()
    assert (batch["align"] == (start > end - 20 - 8)).all()


def test_d30_a_rephrased_window_has_any_sentence_of_its_task_each_as_often(play):
    """Spans 0 and 2 are of one task, span 1 of another; all else is as without it."""
    own, other = (D.Windows(play, 3000, kind="lang", rephrase=x).batch(0) for x in (False, True))
    assert all(torch.equal(own[k], other[k]) for k in own if k != "emb")
    said = (other["emb"].numpy()[:, None] == play.span_emb).all(-1)  # (3000, spans)
    for span, shares in enumerate(([0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5])):
        here = said[other["span"] == span].mean(0)
        np.testing.assert_allclose(here, shares, atol=0.05)


def test_every_span_is_as_likely_however_short_and_every_start_of_a_play_window(play):
    lang, drawn = D.Windows(play, 3000, kind="lang").batch(0), D.Windows(play, 3000).batch(0)
    share = np.bincount(lang["span"].numpy(), minlength=3) / 3000
    np.testing.assert_allclose(share, 1 / 3, atol=0.03)
    share = (drawn["index"][0] >= 201).float().mean()  # 182 and 45 admissible starts
    assert abs(share - 45 / 227) < 0.03


def test_a_span_shorter_than_a_window_is_one_window_that_holds_its_end(play):
    batch = D.Windows(play, 200, T=40, min_len=32, max_len=40, kind="lang").batch(0)
    short = batch["span"] == 1  # it has 30 frames
    assert short.any()
    assert (batch["index"][0, short] == 133).all() and (batch["length"][short] == 30).all()
    assert (batch["index"][30:, short] == 162).all() and batch["align"][short].all()
    assert (batch["length"][~short] >= 32).all()
