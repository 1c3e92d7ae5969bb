"""What data.py promises: recordings in, exact batches out, and errors that name the file."""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import data as D

ROOT = Path(D.__file__).parent
EPISODES = {"training": [(553_567, 553_767), (600_000, 600_063)], "validation": [(37_682, 37_781)]}
SPANS = {"training": [(553_600, 553_664), (553_700, 553_730), (600_000, 600_064)]}
SPANS["validation"] = [(37_700, 37_764)]
TASKS = json.loads((ROOT / "assets" / "sentences.json").read_text())["tasks"]
# embeddings.npy of omegaconf 2.3: a task with one sentence, one with two. zlib, base 85.
LIST_CONFIG = (
    "c-p0t-A@xi5Wufra#DgZs82rBL{c!=pusPqX%xhS%AtY}KHz2VZp)lrcQ1Q;kVZ)Gfk2ae>-zWV?6!OeG(NbOYiD"
    "O>e=|FC)Av5FefUyvcAOveh-RUvFV^aN>-D)>z0HLbg!x=V)TmcTl2O!WKvIhPnc2D8e(nF(_(A#CyRu`Ky2J8L+"
    "HLqD7qrpI6B!dBNLQ-~U(k@VOo}{|y02BmdTKSsqJc|ax12-0R0#Bu{-kGGg;^-6N+i1}HU7o*=el=1FqKqcPkWx"
    "X`Wu)1X*Hz|dRuy5&!{R-Df1&icB!z6672*Uicm2DU~GuDPw_}YRTbL{=h-hWupPr*a-HGQxK$;>m{zxVhi((RSG"
    "$qKnKVMYt=0H@+$;??eLefrW^vu`P)Q;piB^+m=K_*Zt!|>XBr&66?ZoNypetzGw`EY*@GoW<q4b)Wis4;@Z#0xc"
    "vm4|wmYii;l}$dz!{w=rIU|WaR;BN>t6@r2+6mdt5U$3p<O|NF?x{&ZGoI{F;fEvy1Xe?yB*;eqGOH176YOae+ZM"
    "uORUV3mSUTk*eUJ!RN-?wHCul-Dlnpb4`8-f#eo6$Y{wkjVotAGIHy6qWb$Bq89>P34f+jpUhNm7p+t=`-2aE6un"
    "kEf+gXXs;5UhC0#V?Ub6U>~Pf@xKixxj&7enKM+_eandEFCtk!Y`lTVHG}ZVS{d*U4wC)K>Vn&JsyhZ)5k_$>g^z"
    "!XM?qzOTlcAO;z@Huzku+u{~KWmPY^elp9=uDvUq@sEKShmLVXf#u=(<9^`1mi~NH*BE4zDO!FkMM4UWS6J)}M0o"
    ")!vc6aSa9W>2rMhfo1W}Xw28h-#7>c}q"
)  # fmt: skip


def frame(i: int, static: int = 200, gripper: int = 84) -> dict:
    """One frame as CALVIN stores it, also what we do not need; its values tell its id."""
    rng = np.random.default_rng(i)
    action = np.append(rng.uniform(-1, 1, 6), 1.0 if i // 7 % 2 else -1.0)
    images = {"rgb_static": (static, static, 3), "rgb_gripper": (gripper, gripper, 3)}
    images = {k: rng.integers(0, 256, s, np.uint8) for k, s in images.items()}
    other = {"actions": action + 1, "depth_gripper": np.zeros((gripper, gripper), np.float32)}
    state = {"robot_obs": np.full(15, i / 10), "scene_obs": np.full(24, i / 100)}
    return {"rel_actions": action} | state | images | other


def rewrite(path: Path, content) -> None:
    """Anew, for a test's copy of a file is a link to the only one. A dict is pickled."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.array(content, object if isinstance(content, dict) else None))


def record(root: Path, static: int = 200, gripper: int = 84) -> Path:
    """A small recording in CALVIN's format: two training episodes, one for validation."""
    for split, episodes in EPISODES.items():
        (root / split).mkdir(parents=True)
        np.save(root / split / "ep_start_end_ids.npy", np.array(episodes))
        for first, last in episodes:
            for i in range(first, last + 1):
                np.savez(root / split / f"episode_{i:07d}.npz", **frame(i, static, gripper))
        n = len(SPANS[split])
        emb = np.random.default_rng(0).normal(size=(n, 1, 384)).astype(np.float32)
        language = {"ann": [f"do {i}" for i in range(n)], "task": ["open_drawer"] * n, "emb": emb}
        told = {"language": language, "info": {"indx": SPANS[split], "episodes": []}}
        rewrite(root / split / D.LANGUAGE / "auto_lang_ann.npy", told)
    return root


@pytest.fixture(scope="module")
def calvin(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "calvin")


@pytest.fixture(scope="module")
def packed(calvin) -> Path:
    D.pack(calvin, calvin.parent / "packed", procs=2)
    return calvin.parent / "packed"


@pytest.fixture
def copy(calvin, tmp_path) -> Path:
    """A recording to damage; its files are links: write new ones instead of changing them."""
    return Path(shutil.copytree(calvin, tmp_path / "copy", copy_function=os.link))


def replace(path: Path, **changes) -> None:
    path.unlink()
    np.savez(path, **{k: v for k, v in (frame(0) | changes).items() if v is not None})


def area_average(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The definition: each pixel is cut into `size` parts; n parts are averaged."""
    n, x = x.shape[axis], np.moveaxis(x, axis, 0).repeat(size, 0)
    return np.moveaxis(x.reshape(size, n, *x.shape[1:]).mean(1), 0, axis)


@pytest.mark.parametrize("shape", [(84, 84), (128, 128), (200, 200), (200, 150)])
def test_images_shrink_by_area_averaging_as_cv2_inter_area_does(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    got = D.resize_area(image)
    assert got.dtype == np.uint8 and got.shape == (64, 64, 3)
    assert np.abs(got - area_average(area_average(image, 64, 0), 64, 1)).max() <= 0.501
    stack = D.resize_area(np.stack([image, 255 - image])[None])
    assert stack.shape == (1, 2, 64, 64, 3) and (stack[0, 0] == got).all()
    assert D.resize_area(got) is got  # 64 x 64 already
    with pytest.raises(ValueError, match=r"\(63, 64, 3\), expected uint8"):
        D.resize_area(got[:63])
    cv2 = pytest.importorskip("cv2")
    want = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(got.astype(int) - want).max() <= 1


def test_packing_keeps_every_frame_and_number(packed):
    play = D.PlayData(packed, "training")
    ids = np.concatenate([np.arange(a, b + 1) for a, b in EPISODES["training"]])
    assert len(play) == len(ids)
    for row in (0, 100, 200, 201, len(play) - 1):
        want = frame(int(ids[row]))
        want["actions"] = want["rel_actions"]
        for k in ("actions", "robot_obs", "scene_obs"):
            np.testing.assert_allclose(getattr(play, k)[row], want[k], rtol=1e-6)
        for k in D.CAMERAS:
            assert (getattr(play, k)[row] == D.resize_area(want[k])).all()
    assert play.episodes.tolist() == [[0, 201], [201, 265]]  # the inclusive ends are kept
    assert play.spans.tolist() == [[33, 97], [133, 163], [201, 265]]  # (s, s + 64) is 64 frames
    assert play.meta["hz"] == 30 and play.meta["source"] == "calvin"
    assert play.meta["text_encoder"] == D.TEXT_ENCODER
    assert not Path(f"{packed}.part").exists()


def test_skip_2_averages_arm_actions_takes_the_last_gripper_and_halves_spans(calvin, tmp_path):
    D.pack(calvin, tmp_path / "slow", skip=2)
    d = D.PlayData(tmp_path / "slow", "training")
    assert d.episodes.tolist() == [[0, 100], [100, 132]]  # per episode; the odd 201st frame goes
    for row, i in ((0, 553_567), (57, 553_567 + 114), (100, 600_000)):
        a, b = (frame(j)["rel_actions"] for j in (i, i + 1))
        np.testing.assert_allclose(d.actions[row, :6], (a[:6] + b[:6]) / 2, atol=1e-6)
        assert d.actions[row, 6] == b[6]
        assert d.robot_obs[row, 0] == np.float32(i / 10)
    # Kept ids in [553600, 553664) are 553601, 553603, ...: rows 17 to 48.
    assert d.spans.tolist() == [[17, 49], [67, 82], [100, 132]]
    assert d.meta["hz"] == 15 and d.meta["skip"] == 2


def test_a_robots_recording_has_64_float32_pixels_no_scene_and_its_recording_json_travels(tmp_path):
    src = record(tmp_path / "ours", 64, 64)
    about = {"source": "robot", "renderer": "tiny", "hz": 15, "action_scale": [0.02, 0.05]}
    about |= {"skip": 2, "text_encoder": D.TEXT_ENCODER}  # its frames last two steps already
    for path in src.glob("*/episode_*.npz"):
        with np.load(path) as z:
            f = {k: z[k] for k in D.CAMERAS}
            f |= {k: z[k].astype("f4") for k in ("rel_actions", "robot_obs")}
        np.savez(path, **f)
    for split in EPISODES:
        (src / split / "recording.json").write_text(json.dumps(about | {"frames": len(split)}))
    D.pack(src, tmp_path / "packed")
    d = D.PlayData(tmp_path / "packed", "training")
    assert (d.rgb_static[204] == frame(600_003, 64, 64)["rgb_static"]).all()
    assert not d.scene_obs[:].any() and d.meta["skip"] == 2 and d.meta["hz"] == 15
    assert d.meta["renderer"] == "tiny" and d.meta["source"] == "robot"


def test_without_language_the_world_model_has_its_data_and_the_agent_an_error(copy, tmp_path):
    shutil.rmtree(copy / "training" / D.LANGUAGE)
    D.pack(copy, tmp_path / "packed", lang_folder="none")
    d = D.PlayData(tmp_path / "packed", "training")
    assert len(d.spans) == 0 and d.meta["text_encoder"] is None
    D.Sequences(d, 2, 10, 0).batch(0), D.Windows(d, 2).batch(0)
    with pytest.raises(D.DataError, match=r"packed/training has no language.*--lang-folder"):
        D.Windows(d, 2, kind="lang")


def truncate(path: Path) -> None:
    half = path.read_bytes()[:1000]
    path.unlink()
    path.write_bytes(half)


E7 = "training/episode_0600007.npz"
IDS = "training/ep_start_end_ids.npy"
ABOUT = "training/recording.json"
ANN = f"training/{D.LANGUAGE}/auto_lang_ann.npy"


def annotate(path: Path, part: str = "language", **changes) -> None:
    d = D.load_pickled_npy(path)
    rewrite(path, d | {part: d[part] | changes})


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


DAMAGE = {
    "truncated": (E7, truncate, "truncated|not a zip|record it again"),
    "missing": (E7, Path.unlink, "0600007.npz: .*No such file"),
    "no key": (E7, lambda p: replace(p, rel_actions=None), "rel_actions"),
    "shape": (E7, lambda p: replace(p, rel_actions=np.ones(6)), r"rel_actions is float64 \(6,\)"),
    "dtype": (E7, lambda p: replace(p, rgb_static=np.zeros((200, 200, 3))), "expected uint8"),
    "size": (E7, lambda p: replace(p, rgb_static=np.zeros((99, 99, 3), "u1")), r"\(200, 200, 3\)"),
    "bomb": (E7, lambda p: replace(p, rgb_tactile=np.zeros(2**26, "u1")), "would inflate"),
    "nan": (E7, lambda p: replace(p, robot_obs=np.full(15, np.nan)), "robot_obs .* finite"),
    "range": (E7, lambda p: replace(p, rel_actions=np.full(7, 2.0)), r"not in \[-1, 1\]"),
    "gripper": (E7, lambda p: replace(p, rel_actions=np.zeros(7)), "gripper"),
    "rate": (ABOUT, lambda p: p.write_text('{"hz": "x"}'), r"recording\.json: .*\['x'"),
    "scale": (ABOUT, lambda p: p.write_text('{"action_scale": [1]}'), "2 \\+ 1 positive numbers"),
    "encoder": (ABOUT, lambda p: p.write_text('{"text_encoder": "X"}'), "is 'X', expected"),
    "no ids": (IDS, Path.unlink, "ep_start_end_ids.npy"),
    "short": (IDS, lambda p: rewrite(p, [(553_567, 553_580)]), "shorter than a window.*--skip"),
    "overlap": (IDS, lambda p: rewrite(p, [(553_567, 553_600), (553_590, 553_650)]), "overlap"),
    "endless": (IDS, lambda p: rewrite(p, [(553_567, 10**12)]), "No such file.*take it out"),
    "float ids": (IDS, lambda p: rewrite(p, [(0.5, 40.5)]), "ep_start_end_ids.npy"),
    "no annotations": (ANN, Path.unlink, "--lang-folder"),
    "outside": (ANN, lambda p: annotate(p, "info", indx=[(553_767, 553_800)] * 3), "in no episode"),
    "empty span": (ANN, lambda p: annotate(p, "info", indx=[(553_600, 553_600)] * 3), "are empty"),
    "uneven": (ANN, lambda p: annotate(p, task=["open_drawer"]), "auto_lang_ann.npy"),
    "width": (ANN, lambda p: annotate(p, emb=np.zeros((3, 1, 768))), "auto_lang_ann.npy"),
    "other model": (ANN, lambda p: annotate(p, ann=[*D.embedding_table()][:3]), "embedded 0"),
    "code": (ANN, lambda p: rewrite(p, {"language": Bomb()}), "exec, which is refused"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_input_names_the_file_and_leaves_nothing_half_written(case, copy, tmp_path):
    file, damage, message = DAMAGE[case]
    damage(copy / file)
    with pytest.raises(D.DataError, match=message) as error:
        D.pack(copy, tmp_path / "packed")
    assert Path(file).name in str(error.value)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_annotations_of_any_numpy_are_read(protocol, tmp_path):
    value = {"emb": np.arange(6.0).reshape(2, 3), "n": np.int64(3), "ann": ["é", np.str_("b")]}
    value["names"] = np.array(["a", "bc"])
    text = pickle.dumps(np.array(value, dtype=object), protocol)
    with open(tmp_path / "x.npy", "wb") as f:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(f, header)
        f.write(text.replace(b"numpy._core.multi", b"numpy.core.multi") if protocol == 2 else text)
    got = D.load_pickled_npy(tmp_path / "x.npy")
    assert (got["emb"] == value["emb"]).all() and got["n"] == 3 and got["ann"] == ["é", "b"]
    assert got["names"].tolist() == ["a", "bc"]


def test_sentences_that_are_omegaconfs_are_read_as_plain_lists(tmp_path):
    (tmp_path / "embeddings.npy").write_bytes(zlib.decompress(base64.b85decode(LIST_CONFIG)))
    got = D.load_pickled_npy(tmp_path / "embeddings.npy")
    told = {task: row["ann"] for task, row in got.items()}
    assert told == {"open_drawer": ["pull it open"], "turn_on_led": ["press it", "switch it on"]}
    assert [row["emb"].tolist() for row in got.values()] == [[[[0, 0]]], [[[1, 1]]]]


def test_another_text_encoder_is_an_error_and_calvins_own_language_folder_is_of_ours(calvin):
    D.same_text_encoder("sentence-transformers/" + D.TEXT_ENCODER, D.TEXT_ENCODER, "checkpoint")
    with pytest.raises(D.DataError, match="all-MiniLM"):
        D.same_text_encoder("all-MiniLM-L6-v2", D.TEXT_ENCODER, "checkpoint")
    meta = D.read_about(calvin / "training", 1, "lang_annotations")
    assert meta["text_encoder"] == D.TEXT_ENCODER


def test_a_full_disk_is_found_before_anything_is_written(calvin, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(D.DataError, match=r"rgb_static\.npy.*No space left.*Make room"):
        D.pack(calvin, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


# The name of a packed file, what happens to it, and what is said of it.
DAMAGED = [
    ("actions.npy", flip, "actions.npy: .*checksum"),
    ("spans.npy", flip, "spans.npy: .*checksum"),
    ("lang.json", flip, "lang.json: "),
    ("../meta.json", flip, "meta.json: "),
    ("robot_obs.npy", truncate, r"training/robot_obs\.npy: .*damaged.*data\.py pack SRC"),
    ("actions.npy", lambda p: rewrite(p, np.load(p)[:99]), "'actions': 99"),
    ("actions.npy", lambda p: rewrite(p, np.load(p)[:, :6]), r"actions.*float32 \(265, 6\)"),
    ("actions.npy", lambda p: rewrite(p, np.load(p) * 1e9), "actions has .* beyond 1.001"),
    ("scene_obs.npy", lambda p: rewrite(p, np.load(p).astype("f8")), "scene_obs.*float64"),
    ("episodes.npy", lambda p: rewrite(p, np.load(p) - 1), "episodes do not cover its 265"),
    ("episodes.npy", lambda p: rewrite(p, np.load(p)[:1]), "episodes do not cover"),
    ("spans.npy", lambda p: rewrite(p, np.load(p) + 10), "outside of its 265 frames"),
    ("span_emb.npy", lambda p: rewrite(p, np.load(p)[:2]), r"\[3, 2, 3, 3\]"),
    ("span_emb.npy", lambda p: rewrite(p, np.load(p) * np.nan), "span_emb has .* not finite"),
    ("../meta.json", lambda p: p.write_text(p.read_text().replace("30", "-3")), "positive numbers"),
    ("../meta.json", lambda p: p.write_text('{"hz": "3"}'), r"meta\.json: source is None"),
    ("lang.json", lambda p: p.write_text(p.read_text().replace('"do 0"', "0")), "json: .* no text"),
    ("lang.json", lambda p: p.write_text("[]"), r"lang\.json: it holds a list.*damaged"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_packed_arrays_that_are_damaged_or_do_not_belong_together_are_named(
    name, damage, message, packed, tmp_path
):
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    if damage is not flip:
        (copy / "training" / D.SUMS).unlink()  # for what else would find it
    damage(copy / "training" / name)
    with pytest.raises(D.DataError, match=message):
        D.PlayData(copy, "training")


def test_folders_and_numbers_that_do_not_fit_are_told(calvin, packed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(D.DataError, match=r"file/packed\.part: .*give another folder"):
        D.pack(calvin, tmp_path / "file" / "packed")
    with pytest.raises(D.DataError, match="exists"):  # never overwritten
        D.pack(calvin, packed)
    with pytest.raises(D.DataError, match="Not packed yet"):
        D.PlayData(calvin, "training")
    for option in ("--skip", "--procs"):
        with pytest.raises(SystemExit, match=f"{option} 0.*at least 1"):
            D.main(["pack", str(calvin), str(tmp_path / "packed"), option, "0"])


def test_a_killed_pack_leaves_no_folder_and_goes_on_where_it_was(calvin, packed, tmp_path):
    """While it runs, a second one is refused; after it, another recording or other options are."""
    code = "import data, sys, time; data.BLOCK = 16; old = data.read_frame\n"
    code += "data.read_frame = lambda *a: (time.sleep(0.02), old(*a))[1]\n"
    code += f"data.pack({str(calvin)!r}, {str(tmp_path / 'packed')!r}, procs=2)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    killed, part = tmp_path / "packed", tmp_path / "packed.part/training"
    progress = part / "packing.json"
    while not progress.exists() or json.loads(progress.read_text())["done"] < 32:
        assert child.poll() is None
        time.sleep(0.01)
    with pytest.raises(D.DataError, match=rf"packed\.part is in use by process {child.pid} on"):
        D.pack(calvin, killed)
    child.kill()
    child.wait()
    with pytest.raises(D.DataError, match="Not packed yet"):
        D.PlayData(killed, "training")
    state = json.loads(progress.read_text())
    for change in ({"digest": "another recording's"}, {"meta": {}}, {"source": "another's"}):
        progress.write_text(json.dumps(state | change))
        with pytest.raises(D.DataError, match="another recording or options"):
            D.pack(calvin, killed)
    progress.write_text(json.dumps(state))
    robot_obs = np.load(part / "robot_obs.npy", mmap_mode="r+")
    robot_obs[: state["done"]] = -1  # seen if one is done twice
    D.pack(calvin, killed)
    whole, resumed = D.PlayData(packed, "training"), D.PlayData(killed, "training")
    assert 0 < state["done"] < len(whole) and (resumed.robot_obs[: state["done"]] == -1).all()
    for k in D.SHAPES:
        first = state["done"] if k == "robot_obs" else 0
        assert (getattr(resumed, k)[first:] == getattr(whole, k)[first:]).all()


def test_another_recording_and_other_options_have_another_mark(copy):
    digest = D.read_episodes(copy / "training", 1)[-1]
    replace(copy / E7, robot_obs=np.ones(15))
    assert D.read_episodes(copy / "training", 1)[-1] != digest
    once, twice = (D.read_about(copy / "training", skip, D.LANGUAGE) for skip in (1, 2))
    assert once != twice


def test_every_committed_sentence_has_its_embedding_and_needs_no_text_encoder():
    every = [s for t in TASKS.values() for s in (*t["train"], *t["validation"])]
    emb = D.encode(every)
    assert emb.shape == (len(every), 384) and emb.dtype == np.float32 and np.isfinite(emb).all()
    assert (D.encode([f"  {every[0].upper()} "]) == emb[0]).all()  # an uncased encoder
    assert len(np.unique(emb.round(3), axis=0)) == len(set(every))


def test_a_linear_classifier_reads_the_task_from_every_held_out_sentence():
    y = np.repeat(np.arange(34), [len(t["train"]) for t in TASKS.values()])
    x = D.encode([s for t in TASKS.values() for s in t["train"]])
    test = D.encode([t["validation"][0] for t in TASKS.values()]) - x.mean(0)
    x = x - x.mean(0)
    W = np.linalg.solve(x.T @ x + np.eye(384), x.T @ np.eye(34)[y])  # ridge regression
    assert (test @ W).argmax(1).tolist() == list(range(34))


def test_an_unknown_sentence_without_sentence_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(D.DataError, match=r"whistle.*pip install sentence-transformers"):
        D.encode(["whistle a tune"])
