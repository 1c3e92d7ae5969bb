"""Play data: read, check, pack, sample. LUMOS Sec. III, App. A, App. B, App. D.

    symbol   code       shape              meaning
    x_t      rgb_*      (L, B, 64, 64, 3)  camera images, uint8 until the encoder    App. A
    a_{t-1}  a_prev     (L, B, 7)          the action that led to x_t                App. D
    a_t      a          (T, B, 7)          the action that leads to x_{t+1}          App. D
    l        emb        (B, 384)           embedding of an annotated span's sentence App. B
    s_g      index[-1]  (B,)               hindsight goal: the window's last frame   Sec. III

    frame      0          1      2    |   3          4     |: an episode ends
    actions    a_0 -----> a_1 -> a_2      a_3 -----> a_4   actions[t] is commanded AT frame t
    a_prev     NO_ACTION  a_0    a_1      NO_ACTION  a_3   actions[t-1], NO_ACTION after a reset
    reset      True       False  False    True       False

A recording is in CALVIN's format, one npz per frame; `python data.py pack SRC DST [--skip N]` turns
it once into flat memory-mapped arrays at 64 x 64, for Sequences (world model) and Windows (agent).
`python data.py annotate SRC spans.csv` gives a recording its language.
CALVIN's episodes include their last frame, its spans (start, start + 64) are 64 frames: without the
last. Once packed, both are [start, end).
Copy this file alone. Needs: numpy, torch (tqdm to pack; sentence-transformers for new sentences).
"""

import argparse
import csv
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

ASSETS = Path(__file__).parent / "assets"
SIZE = 64  # pixels, App. C
BLOCK = 256  # packed frames that a process makes at a time
MIN_LEN, MAX_LEN = 20, 32  # Table IV: shortest and longest window
CAMERAS, VECTORS = ("rgb_static", "rgb_gripper"), {"actions": 7, "robot_obs": 15, "scene_obs": 24}
SHAPES = {c: (SIZE, SIZE, 3) for c in CAMERAS} | {k: (n,) for k, n in VECTORS.items()}
DTYPES = {c: np.uint8 for c in CAMERAS} | {k: np.float32 for k in VECTORS}
TEXT_ENCODER, EMBEDDING = "paraphrase-MiniLM-L3-v2", 384  # App. B
ALL = slice(None)
NO_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # before the first step: the gripper is open
# What recording.json says of our recordings. CALVIN's have no such file, and are like this:
CALVIN = {"source": "calvin", "renderer": "egl", "hz": 30, "action_scale": [0.02, 0.05]}


MAKE_ROOM = "Make room, or correct the permissions, and repeat the command"


class DataError(RuntimeError):
    """Data that cannot be used. The message names the file, what is wrong and the remedy."""


@contextmanager
def naming(path, remedy: str):
    """Whatever goes wrong inside is told as a DataError that names the file and the remedy."""
    try:
        yield path
    except DataError:
        raise
    except Exception as e:
        raise DataError(f"{path}: {e} ({type(e).__name__}). {remedy}.") from e


def write(path: Path, fill) -> None:
    """fill(file) writes beside, then it is renamed: the file is old or new, never half of one."""
    part = path.with_name(f"part_{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "wb") as f:
            fill(f)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        raise DataError(f"could not write {path}: {error}. {MAKE_ROOM}.") from error
    finally:
        part.unlink(missing_ok=True)


def resize_area(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """uint8 (..., H, W, 3) -> (..., size, size, 3): area averaging, cv2.INTER_AREA's within 1."""
    *lead, H, W, C = images.shape
    if images.dtype != np.uint8 or C != 3 or min(H, W) < size:
        want = f"uint8 (..., H, W, 3), {size} pixels or more"
        raise ValueError(f"images are {images.dtype} {images.shape}, expected {want}")
    if H == W == size:
        return images

    def weights(n: int) -> np.ndarray:  # (size, n): pixel i averages [i n/size, (i+1) n/size)
        edge, pixel = np.arange(size + 1)[:, None] * n / size, np.arange(n)
        overlap = np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel)
        return (np.maximum(overlap, 0) * size / n).astype(np.float32)

    x = weights(H) @ images.reshape(*lead, H, W * C).astype(np.float32)
    return np.rint(weights(W) @ x.reshape(*lead, size, W, C)).astype(np.uint8)


class SafeUnpickler(pickle.Unpickler):
    """Numpy arrays and plain containers only: a stranger's pickle could otherwise run any code."""

    ALLOWED = ("numpy.ndarray", "numpy.dtype", "_codecs.encode", "numpy._core.numeric._frombuffer")
    ALLOWED += ("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar")

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core.", "numpy._core.")  # numpy 1's name
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def load_pickled_npy(path: Path):
    """The Python object in a .npy file, as CALVIN keeps its annotations, without running code."""
    with open(path, "rb") as f:
        np.lib.format.read_magic(f), np.lib.format.read_array_header_1_0(f)
        return SafeUnpickler(f).load().item()


def same_text_encoder(have: str | None, want: str | None, where) -> None:
    """The encoder's name travels with data and checkpoints; vectors of two encoders never mix."""
    if Path(have or "").name != Path(want or "").name:
        raise DataError(f"{where}: text encoder is {have!r}, expected {want!r}. Use one for both.")


def _key(sentence: str) -> str:
    return " ".join(sentence.lower().split())  # the encoder is uncased: case and blanks don't count


@lru_cache
def embedding_table() -> dict[str, np.ndarray]:
    """The committed sentences, embedded by TEXT_ENCODER: {sentence: (384,)}."""
    if not (ASSETS / "embeddings.npz").exists():  # data.py was copied out alone
        return {}
    with np.load(ASSETS / "embeddings.npz", allow_pickle=False) as z:
        return dict(zip(map(_key, z["sentences"].tolist()), z["embeddings"], strict=True))


def encode(sentences: list[str], encoder: str = TEXT_ENCODER, table: bool = True) -> np.ndarray:
    """Sentences -> (S, 384) float32: from the committed table, else by sentence-transformers.

    encoder: a model of the hub, or a local folder whose last part is the model's name.
    """
    known = dict(embedding_table()) if table and Path(encoder).name == TEXT_ENCODER else {}
    if new := [s for s in dict.fromkeys(sentences) if _key(s) not in known]:
        remedy = f"pip install sentence-transformers; without a hub, a folder .../{TEXT_ENCODER}"
        with naming(f"sentence {new[0]!r}, not among the committed ones, by {encoder}", remedy):
            from sentence_transformers import SentenceTransformer

            made = SentenceTransformer(encoder, device="cpu").encode(new)
        known |= {_key(s): e for s, e in zip(new, made, strict=True)}
    return np.stack([known[_key(s)] for s in sentences]).astype(np.float32)


def embed(encoder: str = TEXT_ENCODER, assets: Path = ASSETS) -> None:
    """Writes embeddings.npz: every sentence of sentences.json, then those of tabletop.json."""
    spec = json.loads((assets / "sentences.json").read_text())
    same_text_encoder(encoder, spec["text_encoder"], assets / "sentences.json")
    every = {s for t in spec["tasks"].values() for kind in ("train", "validation") for s in t[kind]}
    rows = json.loads((assets / "tabletop.json").read_text())["rows"]
    robot = {x["sentence"] for row in rows for x in row["tasks"].values()} - every
    parts = sorted(every), sorted(robot)  # apart: in other batches the last bits differ
    e = np.concatenate([encode(part, encoder, table=False) for part in parts])
    every = parts[0] + parts[1]
    if e.shape != (len(every), EMBEDDING) or not np.isfinite(e).all():
        raise DataError(f"{encoder} gave {e.shape}, not {(len(every), EMBEDDING)} finite numbers.")
    arrays = {"sentences": every, "embeddings": e, "text_encoder": spec["text_encoder"]}
    write(assets / "embeddings.npz", lambda f: np.savez(f, **arrays))


def read_frame(folder: Path, i: int, scene: bool, sizes: dict[str, tuple]) -> dict:
    """Frame i, checked. scene: it has a scene_obs. sizes: (H, W, 3) of the cameras, where known."""
    path, frame = folder / f"episode_{i:07d}.npz", {}
    with naming(path, "Copy or record it again"), np.load(path, allow_pickle=False) as z:
        for k in [*SHAPES][: None if scene else -1]:
            x = frame[k] = z[name := "rel_actions" if k == "actions" else k]
            if k in CAMERAS:  # of any size, but images are never enlarged
                want = sizes.get(k, (*(max(n, SIZE) for n in x.shape[:2]), 3))
                kind, ok = "uint8", x.dtype == np.uint8
            else:
                want, kind = SHAPES[k], "finite floats"
                ok = x.dtype.kind == "f" and np.isfinite(x).all()
            if not ok or x.shape != want:
                raise ValueError(f"{name} is {x.dtype} {x.shape}, expected {kind} {want}")
        if np.abs(a := frame["actions"]).max() > 1.001 or abs(a[6]) < 0.999:
            raise ValueError(f"rel_actions {a} not in [-1, 1], or their gripper not -1 or +1")
    return frame


def read_language(folder: Path, encoder: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Annotations: spans of frame ids (M, 2), embeddings (M, 384), {"sentences", "tasks"}: [M]."""
    path, there = folder / "auto_lang_ann.npy", sorted(p.name for p in folder.parent.glob("lang*"))
    with naming(path, f"Annotate again; or --lang-folder: one of {there}, or none (no language)"):
        d = load_pickled_npy(path)
        lang = {"sentences": list(d["language"]["ann"]), "tasks": list(d["language"]["task"])}
        spans = np.array(d["info"]["indx"], np.int64).reshape(len(lang["tasks"]), 2)
        emb = np.array(d["language"]["emb"], np.float32).reshape(len(spans), EMBEDDING)
        known = embedding_table() if encoder == TEXT_ENCODER else {}
        rows = zip(lang["sentences"], emb, strict=True)
        good = [np.abs(e - known.get(_key(s), e)).max() < 0.01 for s, e in rows]
        if not good or not all(good):  # also where not finite
            raise ValueError(f"{len(good)} annotations, of which {encoder} embedded {sum(good)}")
    return spans, emb, lang


def read_held_out(folder: Path) -> dict[str, np.ndarray]:
    """One validation sentence per task: tasks (K,), sentences (K,), embeddings (K, 384)."""
    with naming(folder / "embeddings.npy", "Annotate again, or --lang-folder none") as path:
        d = load_pickled_npy(path)
        emb = np.array([x["emb"] for x in d.values()], np.float32).reshape(len(d), EMBEDDING)
        return {"tasks": [*d], "sentences": [x["ann"][0] for x in d.values()], "embeddings": emb}


def annotate(folder, spans, encoder: str = TEXT_ENCODER) -> None:
    """Language for a recording without it: spans.csv -> the annotation files of both splits.

    Columns: start,end,sentence,task. Frames [start, end) of one episode, `end` is not one of them;
    an unknown task may be left empty, the sentence then stands for it. The first sentence of a
    task in validation/ becomes the one that the policy is asked with. Raises DataError.
    """
    folder, lang, found = Path(folder), f"lang_{Path(encoder).name}", {}
    with naming(spans, "Columns: start,end,sentence,task; `end` is the first frame after the span"):
        with open(spans, newline="") as f:
            rows = [{k: (x or "").strip() for k, x in row.items()} for row in csv.DictReader(f)]
        rows = [(int(r["start"]), int(r["end"]), r["sentence"], r.get("task")) for r in rows]
        for split in ("training", "validation"):
            bounds = np.load(folder / split / "ep_start_end_ids.npy", allow_pickle=False)
            bounds = bounds.reshape(-1, 2) + np.array([0, 1])
            inside = [((bounds[:, 0] <= a) & (b <= bounds[:, 1])).any() for a, b, *_ in rows]
            found[split] = [r for r, ok in zip(rows, inside, strict=True) if ok]
        placed = [r for of in found.values() for r in of]
        if bad := [r for r in rows if not r[2] or r[0] >= r[1] or r not in placed]:
            raise ValueError(f"{len(bad)} spans are empty, mute or in no episode, first {bad[0]}")
        if empty := [split for split, of in found.items() if not of]:
            raise ValueError(f"no span is in an episode of {empty[0]}/")
    asked = {}  # task: its sentence at run time
    for *_, sentence, task in found["validation"] + found["training"]:
        asked.setdefault(task or sentence, sentence)
    files = {}
    for split, of in found.items():
        ann, emb = [r[2] for r in of], encode([r[2] for r in of], encoder)[:, None]  # (N, 1, 384)
        language = {"ann": ann, "task": [r[3] or r[2] for r in of], "emb": emb}
        info = {"episodes": [], "indx": [r[:2] for r in of]}
        files[folder / split / lang / "auto_lang_ann.npy"] = {"language": language, "info": info}
    told = zip(asked.items(), encode([*asked.values()], encoder), strict=True)
    told = {task: {"emb": e[None, None], "ann": [sentence]} for (task, sentence), e in told}
    files[folder / "validation" / lang / "embeddings.npy"] = told
    for path, content in files.items():
        array = np.array(content, dtype=object)
        write(path, lambda f, x=array: np.save(f, x, allow_pickle=True))
    print({split: len(of) for split, of in found.items()}, "spans,", len(asked), "tasks")


def plan_split(folder: Path, skip: int, lang_folder: str) -> dict:
    """What is known of a split without reading its frames (but the first), checked."""
    remedy = "It holds an episode's first and last frame per row; correct it, or record again"
    with naming(folder / "ep_start_end_ids.npy", remedy) as path:
        ids = np.load(path, allow_pickle=False).astype(np.int64, casting="same_kind").reshape(-1, 2)
        ids = ids[np.argsort(ids[:, 0])] + (0, 1)  # from here on [start, end)
        length = (ids[:, 1] - ids[:, 0]) // skip  # an episode's last, incomplete step is left out
        if short := (ids[length < MIN_LEN] - (0, 1)).tolist():
            what = f"{path}: {short} are shorter than a window, {MIN_LEN} frames at skip {skip}"
            raise DataError(f"{what}. Record longer episodes, or lower --skip.")
        if not len(ids) or (ids[1:, 0] < ids[:-1, 1]).any():
            raise ValueError(f"{len(ids)} episodes; there must be one, and none may overlap")
        names = {e.name for e in os.scandir(folder)}
        if gone := [i for e in ids for i in range(*e) if f"episode_{i:07d}.npz" not in names]:
            what = f"{folder}/episode_{gone[0]:07d}.npz is missing, and {len(gone) - 1} more"
            raise DataError(f"{what}. Copy or record them again, or take them out of {path.name}.")
    steps = [np.arange(i, i + n * skip) for i, n in zip(ids[:, 0], length, strict=True)]
    frame_ids = np.concatenate(steps).reshape(-1, skip)  # packed row r is of frames frame_ids[r]
    with naming(folder / "recording.json", "Correct it") as path:
        about = CALVIN | (json.loads(path.read_text()) if path.exists() else {})
        already = about.get("skip", 1)  # steps that the recording's own frames last
        numbers = np.array([about["hz"], *about["action_scale"], already])
        if numbers.shape != (4,) or numbers.dtype.kind not in "if" or not (numbers > 0).all():
            what = f"hz, action_scale, skip are {numbers.tolist()}"
            raise ValueError(f"{what}, not 1 + 2 + 1 positive numbers")
        if not isinstance(already, int):
            raise ValueError(f"skip is {already}, not a whole number")
        meta = {k: about[k] for k in CALVIN}
        if (frame := about.get("frame", "base")) != "base":  # of relative actions; absent: base
            meta["frame"] = frame
    scene = meta["source"] != "robot"  # a real scene has no scene_obs: zeros stand for it
    sizes = {k: x.shape for k, x in read_frame(folder, int(ids[0, 0]), scene, {}).items()}
    spans, emb = np.zeros((0, 2), int), np.zeros((0, EMBEDDING), np.float32)
    lang = {"sentences": [], "tasks": []}
    encoder = None if lang_folder == "none" else lang_folder.removeprefix("lang_")
    if encoder:
        same_text_encoder(about.get("text_encoder", encoder), encoder, folder)
        spans, emb, lang = read_language(folder / lang_folder, encoder)
        e = np.searchsorted(ids[:, 0], spans[:, 0], "right") - 1  # the episode of each span
        rows = np.searchsorted(frame_ids[:, 0], spans)  # the kept frames with ids in [start, end)
        if (bad := (e < 0) | (spans[:, 1] > ids[e, 1]) | (rows[:, 0] >= rows[:, 1])).any():
            what = f"{bad.sum()} spans are empty or in no episode, the first {spans[bad][0]}"
            raise DataError(f"{folder / lang_folder}/auto_lang_ann.npy: {what}. Annotate it again.")
        spans = rows
    meta |= {"text_encoder": encoder, "hz": meta["hz"] / skip, "skip": skip * already, "format": 1}
    ends = np.cumsum(length)
    small = {"episodes": np.stack([ends - length, ends], 1), "spans": spans, "span_emb": emb}
    return {"meta": meta, "small": small, "lang": lang, "ids": frame_ids, "frame": (scene, sizes)}


def read_block(job: tuple) -> dict[str, np.ndarray]:
    """n packed frames, checked and shrunk, from frame_ids (n, skip); runs in a worker process."""
    folder, frame, frame_ids = job
    block = {k: np.zeros((len(frame_ids), *s), DTYPES[k]) for k, s in SHAPES.items()}
    for r, ids in enumerate(frame_ids.tolist()):
        steps = [read_frame(folder, i, *frame) for i in ids]
        a = np.stack([s["actions"] for s in steps])
        # One step at 1/skip of the rate: the mean arm action, held for `skip` steps; last gripper.
        for k, x in (steps[0] | {"actions": np.append(a[:, :6].mean(0), a[-1, 6])}).items():
            block[k][r] = resize_area(x) if k in CAMERAS else x
    return block


def ahead(pool, function, jobs, most: int):
    """pool.imap(function, jobs) with at most `most` jobs given out and not yet taken back: where
    the disk is slower than the workers, their blocks wait in the workers, not in memory."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.apply_async(function, (job,)))
        if len(waiting) == most:
            yield waiting.popleft().get()
    while waiting:
        yield waiting.popleft().get()


def create_array(path: Path, shape: tuple, dtype) -> np.memmap:
    """A .npy whose room is reserved at once: a full disk is an error here, not a crash later."""
    with naming(path, "Make room on the disk"):
        x = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, x.offset + x.nbytes)
    return x


def pack(src, dst, skip: int = 1, lang_folder=f"lang_{TEXT_ENCODER}", procs: int = 1) -> None:
    """Recording `src` -> packed folder `dst`, which is `dst`.part until it is whole. Killed at any
    moment, the same call goes on where it was. Raises DataError, see the functions above."""
    from tqdm import tqdm

    src, dst, part = Path(src).resolve(), Path(dst), Path(f"{dst}.part")
    splits = {s: plan_split(src / s, skip, lang_folder) for s in ("training", "validation")}
    meta, total = splits["training"]["meta"], sum(len(p["ids"]) for p in splits.values())
    if meta != splits["validation"]["meta"]:
        raise DataError(f"{src}: recording.json differs between training/ and validation/.")
    key, old = json.dumps([str(src), meta, total]), part / "packing.json"
    if dst.exists() or (old.exists() and old.read_text() != key):
        raise DataError(f"{dst} exists, or {part} of another recording or options. Remove it.")
    with naming(part, "Make room, or give another folder"):
        for name in splits:
            (part / name).mkdir(parents=True, exist_ok=True)
        old.write_text(key)
    size = total * sum(int(np.prod(s)) * DTYPES[k]().itemsize for k, s in SHAPES.items()) / 1e9
    free, had = shutil.disk_usage(part).free / 1e9, sum(f.stat().st_size for f in part.glob("*/*"))
    print(f"{total} frames take {size:.2f} GB; {free:.2f} are free, {had / 1e9:.2f} already taken")
    if free + had / 1e9 < size:
        raise DataError(f"{part}: {size - had / 1e9 - free:.2f} GB too few are free. Make room.")
    with multiprocessing.Pool(procs) as pool, tqdm(total=total, unit="frame") as bar:
        for name, p in splits.items():
            out, ids, to = part / name, p["ids"], {}
            dots = out / "dots"  # one for every block that is written
            done = dots.stat().st_size if dots.exists() else 0
            for k, s in SHAPES.items():
                args = out / f"{k}.npy", (len(ids), *s), DTYPES[k]
                to[k] = np.load(args[0], mmap_mode="r+") if done else create_array(*args)
            bar.update(min(done * BLOCK, len(ids)))
            rows = range(0, len(ids), BLOCK)[done:]
            jobs = ((src / name, p["frame"], ids[r : r + BLOCK]) for r in rows)
            for r, block in zip(rows, ahead(pool, read_block, jobs, 2 * procs), strict=True):
                for k, x in block.items():
                    to[k][r : r + BLOCK] = x
                with naming(dots, MAKE_ROOM):
                    with open(dots, "a") as f:
                        f.write(".")
                bar.update(len(x))
            with naming(out, MAKE_ROOM):
                for k, x in p["small"].items():
                    np.save(out / f"{k}.npy", x)
                (out / "lang.json").write_text(json.dumps(p["lang"]))
    with naming(part, MAKE_ROOM):
        (part / "meta.json").write_text(json.dumps(meta))
        os.rename(part, dst)
    print(f"{dst}: {total} frames, {size:.2f} GB")


class PlayData:
    """A packed split. Memory-mapped: rgb_static, rgb_gripper (N, 64, 64, 3) uint8; actions (N, 7),
    robot_obs (N, 15), scene_obs (N, 24) float32. episodes (E, 2), spans (M, 2): rows [start, end);
    span_emb (M, 384); sentences, tasks [M]; is_start (N,): first row of an episode; meta: a dict.
    """

    def __init__(self, root, split: str):
        self.path, self.split = Path(root) / split, split
        with naming(root, f"It is not packed, or not yet: python data.py pack SRC {root}"):
            self.meta = json.loads((Path(root) / "meta.json").read_text())
            lang = json.loads((self.path / "lang.json").read_text())
            for k in (*SHAPES, "episodes", "spans", "span_emb"):
                with naming(self.path / f"{k}.npy", f"Copy it anew, or pack {root} again") as path:
                    setattr(self, k, np.load(path, mmap_mode="r"))
        self.sentences, self.tasks = lang["sentences"], lang["tasks"]
        self.longest = int(np.diff(self.episodes).max())  # frames of the longest episode
        self.kept = {}  # arrays that lie on a device, see keep_on
        self.is_start = np.zeros(len(self), bool)
        self.is_start[self.episodes[:, 0]] = True

    def __len__(self) -> int:
        return len(self.actions)

    def stretches(self, L: int) -> np.ndarray:
        """First rows (n,) of stretches of L frames that lie in one episode and share no frame."""
        return np.concatenate([np.arange(a, b - L + 1, L) for a, b in self.episodes])

    def keep_on(self, device: str, free: int, quiet: bool = False) -> bool:
        """Copies what `frames` reads to a device that has `free` bytes, if half of them suffice:
        from then on batches are made there, no frame is read or sent. Returns whether it did."""
        from tqdm import tqdm

        arrays = {k: getattr(self, k) for k in (*CAMERAS, "robot_obs", "actions", "is_start")}
        if sum(x.nbytes for x in arrays.values()) > free / 2:
            return False
        for name, x in arrays.items():
            kept = torch.empty(x.shape, dtype=getattr(torch, x.dtype.name), device=device)
            blocks = range(0, len(x), BLOCK)
            for i in tqdm(blocks, desc=f"{name} to {device}", unit="block", disable=quiet):
                kept[i : i + BLOCK] = torch.from_numpy(x[i : i + BLOCK].copy())
            self.kept[name] = kept
        return True

    def rows(self, name: str, index: np.ndarray) -> torch.Tensor:
        """Rows of one array, from where it is kept."""
        if name not in self.kept:
            return torch.from_numpy(getattr(self, name)[index])
        return self.kept[name][torch.from_numpy(index).to(self.kept[name].device)]

    def frames(self, index: np.ndarray, fresh: bool = False) -> dict[str, torch.Tensor]:
        """Rows index (L, B) as a batch: rgb_* (L, B, 64, 64, 3) uint8, robot_obs (L, B, 15),
        a_prev (L, B, 7) and reset (L, B), which is True where an episode starts, and where the
        batch does if it is a fresh one, which forgets what came before."""
        batch = {k: self.rows(k, index) for k in (*CAMERAS, "robot_obs")}
        batch["reset"] = self.rows("is_start", index)
        batch["a_prev"] = self.rows("actions", index - 1)
        batch["reset"][0] |= fresh
        batch["a_prev"][batch["reset"]] = batch["a_prev"].new_tensor(NO_ACTION)
        return batch


class Sequences:
    """Batches for the world model; batch(step) is a pure function of (seed, step).

    carry [D10]: B equidistant rows step through the data, L frames at a time, from an offset drawn
    for each epoch; a row goes on where it was a step before, so the RSSM's state can be carried on.
    Without carry: the paper's starts (App. A), drawn in the episodes and clipped to their ends;
    episodes shorter than L are left out.
    """

    def __init__(
        self, data: PlayData, B: int, L: int, seed: int, carry: bool = True, part: slice = ALL
    ):
        """part: which of a batch's B sequences this process reads."""
        self.data, self.B, self.L, self.seed, self.carry, self.part = data, B, L, seed, carry, part
        long = data.episodes[np.diff(data.episodes)[:, 0] >= L]  # the others cannot hold a sequence
        self.pool = np.concatenate([np.arange(0), *(np.arange(*bounds) for bounds in long)])
        if (least := len(data) if carry else len(self.pool)) < L or B < 1:
            what = f"{data.path}: {B} sequences of {L} in {least} frames"
            raise DataError(f"{what}: record more or lower L.")
        self.chunk = -(-len(data) // B)  # frames from one row's start to the next
        self.steps_per_epoch = -(-self.chunk // L)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """PlayData.frames of (L, B) rows; reset is also True where a row leaves its predecessor."""
        N, ends = len(self.data), self.data.episodes[:, 1]
        epoch, i = divmod(step, self.steps_per_epoch)
        if self.carry:
            offset = np.random.default_rng([self.seed, epoch]).integers(N)
            first = offset + i * self.L + np.arange(self.B) * self.chunk
        else:
            first = np.random.default_rng([self.seed, step]).choice(self.pool, self.B)
            first = np.minimum(first, ends[np.searchsorted(ends, first, "right")] - self.L)
        # After the last row of the data comes the first, an episode's start.
        index = (first[self.part] + np.arange(self.L)[:, None]) % N
        return self.data.frames(index, fresh=i == 0 or not self.carry)


class Windows:
    """Windows of min_len to max_len frames for the agent, padded to T [D14]; batch(step) is pure.

    play: any start in an episode; goal: the window's last frame. lang: any annotated span, then any
    start in it; it ends in it; goal: its sentence, or one of any span of its task, each as often
    as the others [D30]. A span shorter than min_len is a window, whole [D23].
    """

    def __init__(
        self, data, B, T=MAX_LEN, min_len=MIN_LEN, max_len=MAX_LEN, kind="play", seed=0, part=ALL,
        rephrase=False,
    ):  # fmt: skip
        """part: which of a batch's B windows this process reads, a slice."""
        self.data, self.B, self.T, self.kind, self.seed, self.part = data, B, T, kind, seed, part
        bounds = {"play": data.episodes, "lang": data.spans}[kind]
        if not 1 <= min_len <= max_len <= T:
            raise DataError(f"no windows of {min_len} to {max_len} frames fit in {T}.")
        if not len(bounds):
            what = f"{data.path} has no language, which the agent needs"
            raise DataError(f"{what}: annotate the recording, pack without --lang-folder none.")
        places = np.maximum(np.diff(bounds)[:, 0] - min_len + 1, 1)  # admissible starts in each
        self.span = np.repeat(np.arange(len(bounds)), places)
        place = np.arange(len(self.span)) - np.repeat(np.cumsum(places) - places, places)
        self.align = place >= places[self.span] - 8  # the last 8 places of a span [D11]
        self.cdf = np.cumsum(1 / places[self.span] if kind == "lang" else place >= 0)
        self.start = bounds[self.span, 0] + place
        self.most = np.minimum(max_len, bounds[self.span, 1] - self.start)  # the longest window
        self.least = np.minimum(min_len, self.most)
        self.rephrase = rephrase
        if rephrase:  # [D30]: spans in the order of their tasks; of each from `first` on so many
            _, self.task, self.many = np.unique(data.tasks, return_inverse=True, return_counts=True)
            self.by_task = np.argsort(self.task, stable=True)
            self.first = np.cumsum(self.many) - self.many

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """index (T, B) rows of data, length (B,), a (T, B, 7); lang: emb (B, 384), span, align."""
        rng = np.random.default_rng([self.seed, step, self.kind == "lang"])
        w = np.searchsorted(self.cdf, rng.random(self.B) * self.cdf[-1], "right")
        length = rng.integers(self.least[w], self.most[w] + 1)[self.part]
        w = w[self.part]
        t = np.arange(self.T)[:, None]
        index = self.start[w] + np.minimum(t, length - 1)  # the end is held [D14]
        a = self.data.actions[index]  # (T, B, 7); the held end repeats its gripper
        a[t >= length, :6] = 0
        batch = {"index": index, "length": length, "a": a}
        if self.kind == "lang":
            span, align = self.span[w], self.align[w]
            batch |= {"span": span, "align": align, "emb": self.data.span_emb[span]}
            if self.rephrase:
                task, u = self.task[span], rng.random(self.B)[self.part]
                alike = self.by_task[self.first[task] + (u * self.many[task]).astype(int)]
                batch["emb"] = self.data.span_emb[alike]
        return {k: torch.from_numpy(x) for k, x in batch.items()}


class Latents:
    """The frozen world model's latents of a split's frames: h (N, H) float16; z (N, C) uint8, the
    class of each categorical; z_reset (N, C): z of that frame after a reset [D8]. They are kept
    beside the data, in a folder named after `key`, which stands for the world model's weights.
    """

    def __init__(self, path: Path, arrays: list[np.memmap]):
        self.path, (self.h, self.z, self.z_reset) = path, arrays

    @staticmethod
    def exists(data: PlayData, key: str) -> bool:
        return (data.path / f"latents-{key}").exists()

    @classmethod
    def create(cls, data: PlayData, key: str, H: int, C: int) -> "Latents":
        """Arrays to write to; they count only after commit()."""
        part = data.path / f"latents-{key}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        spec = (("h", H, np.float16), ("z", C, np.uint8), ("z_reset", C, np.uint8))
        return cls(part, [create_array(part / f"{k}.npy", (len(data), n), t) for k, n, t in spec])

    def commit(self) -> "Latents":
        os.rename(self.path, done := self.path.with_suffix(""))
        return Latents(done, [self.h, self.z, self.z_reset])

    @classmethod
    def open(cls, data: PlayData, key: str) -> "Latents":
        with naming(path := data.path / f"latents-{key}", "Remove that folder, it is made again"):
            files = [path / f"{k}.npy" for k in ("h", "z", "z_reset")]
            return cls(path, [np.load(f, mmap_mode="r") for f in files])


def to_device(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {k: x.to(device, non_blocking=True) for k, x in batch.items()}


@torch.random.fork_rng()  # so that a cache made anew is the same, and training goes on as before
@torch.no_grad()
def cache_latents(
    world, data: PlayData, key: str, device: str = "cpu", autocast=nullcontext
) -> Latents:
    """(h, z) of every frame of a split, made once per world model and kept beside the data.

    The set is cut into stretches that are filtered side by side; each begins `warm` frames early,
    so that its first kept latent has a history too. Also z after a reset, per frame [D8].
    """
    from tqdm import tqdm

    c = world.config
    if Latents.exists(data, key):
        return Latents.open(data, key)
    out = Latents.create(data, key, c.deterministic, c.categoricals)
    rows, warm, L = min(64, -(-len(data) // 256)), 64, 64
    length = -(-len(data) // rows)  # frames per stretch, rounded up
    starts = np.arange(rows) * length
    state = world.initial(rows)
    torch.manual_seed(0)
    for t in tqdm(range(-warm, length, L), desc=f"latents of {data.split}", unit="block"):
        frames = (starts + t + np.arange(min(L, length - t))[:, None]) % len(data)  # (L, rows)
        batch = to_device(data.frames(frames), device)
        if t == -warm:
            batch["reset"][0] = True
        with autocast():
            images = {
                k: batch[f"rgb_{k}"].float().mul_(1 / 127.5).sub_(1).movedim(-1, -3)
                for k in ("static", "gripper")
            }
            e = world.encode(images, batch["robot_obs"])
            h, z, _ = world.observe(e, batch["a_prev"], batch["reset"], state)
            state = (h[-1], z[-1])
            nothing = torch.tensor(NO_ACTION, device=device).expand(*e.shape[:2], 7)
            z_reset = world.observe(
                e.flatten(0, 1)[None], nothing.flatten(0, 1)[None],
                torch.ones_like(batch["reset"]).flatten()[None], world.initial(h[..., 0].numel()),
            )[1].view_as(z)  # fmt: skip
        if t >= 0:
            keep = (np.arange(len(frames)) + t)[:, None] < np.minimum(len(data) - starts, length)
            to_class = lambda z: z[..., : c.discrete].unflatten(-1, (c.categoricals, -1)).argmax(-1)
            for name, x in (("h", h), ("z", to_class(z)), ("z_reset", to_class(z_reset))):
                getattr(out, name)[frames[keep]] = x.cpu().numpy()[keep]
    return out.commit()


def stored_z(world, classes: torch.Tensor, robot_obs: torch.Tensor) -> torch.Tensor:
    """Cached classes (..., C) uint8 and robot_obs (..., 15) of the same frames -> z (..., Z)."""
    one_hot = torch.nn.functional.one_hot(classes.long(), world.config.classes)
    one_hot = one_hot.flatten(-2).float()
    return torch.cat([one_hot, world.pose(robot_obs)], -1)


class WindowBatches:
    """Batches of Agent.losses: cached latents of play windows first, then of language windows."""

    def __init__(self, data, latents, c, world, seed: int, device: str, part=None):
        """part: of n windows, the slice that this process reads."""
        self.latents, self.world, self.device = latents, world, device
        self.reset_start, self.data = c.reset_start, data
        lengths = (c.sequence_length, c.min_window, c.max_window)
        n = c.batch_size // 2  # half and half [D6]
        self.play, self.language = (
            Windows(data, n, *lengths, kind, seed, part(n) if part else ALL, c.rephrase)
            for kind, n in (("play", c.batch_size - n), ("lang", n))
        )
        with torch.no_grad():  # after a reset h is one constant vector [D8]
            nothing = torch.tensor([NO_ACTION], device=device)
            a_part = world.recurrent_in.inputs[1](nothing)
            self.h_reset = world.recurrent(*world.initial(1), a_part)[0]

    def read(self, step: int) -> dict[str, torch.Tensor]:
        """What the disk knows of a step's batch: no random numbers of torch's, no device."""
        play, language = self.play.batch(step), self.language.batch(step)
        batch = {k: torch.cat([play[k], language[k]], -1) for k in ("index", "length")}
        batch["a"] = torch.cat([play["a"], language["a"]], 1)
        index = batch.pop("index").numpy()  # (T, B)
        arrays = {"z": self.latents.z[index], "z_reset": self.latents.z_reset[index[0]]}
        arrays |= {"h": self.latents.h[index[0]], "robot_obs": self.data.robot_obs[index]}
        batch |= {k: language[k] for k in ("emb", "align")}
        return batch | {k: torch.from_numpy(x) for k, x in arrays.items()}

    def states(self, read: dict, reset_start: float | None = None) -> dict[str, torch.Tensor]:
        """`read`, on the device -> Agent.losses' batch; reset_start overrides [D8]'s chance."""
        batch = dict(read)
        h, robot_obs = batch.pop("h").float(), batch.pop("robot_obs")
        z = stored_z(self.world, batch.pop("z"), robot_obs)
        z_0 = stored_z(self.world, batch.pop("z_reset"), robot_obs[0])
        chance = self.reset_start if reset_start is None else reset_start
        forget = torch.rand(len(h), 1, device=h.device) < chance
        h, z[0] = torch.where(forget, self.h_reset, h), torch.where(forget, z_0, z[0])
        batch["s_E"] = self.expert(h, z, batch["a"], batch["length"])
        return batch | {"gripper": robot_obs[0, :, 14]}

    def batch(self, step: int, reset_start: float | None = None) -> dict[str, torch.Tensor]:
        """Table IV's batch for a step."""
        return self.states(to_device(self.read(step), self.device), reset_start)

    @torch.no_grad()
    def expert(
        self, h: torch.Tensor, z: torch.Tensor, a: torch.Tensor, length: torch.Tensor
    ) -> torch.Tensor:
        """s^E (T, B, k) from h (B, H) of the first state, z (T, B, Z) and a (T, B, 7): h anew from
        there on, so that after a reset it has no more of a past than the agent's [D8]; the end is
        held [D14]."""
        a_part, hs = self.world.recurrent_in.inputs[1](a), [h]
        for t in range(1, len(a)):
            h = self.world.recurrent(hs[-1], z[t - 1], a_part[t - 1])
            hs.append(torch.where((t < length)[:, None], h, hs[-1]))
        return torch.cat([torch.stack(hs), z], -1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Play data.")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("pack", help="a recording -> arrays of 64 x 64 images")
    p.add_argument("src", help="recording in CALVIN's format: a folder with training/, validation/")
    p.add_argument("dst", help="the new folder")
    p.add_argument("--skip", type=int, default=1, help="keep every N-th frame")
    p.add_argument("--lang-folder", default=f"lang_{TEXT_ENCODER}", help="or: none")
    p.add_argument("--procs", type=int, default=os.cpu_count())
    p = sub.add_parser("embed", help="the sentences in assets/ -> assets/embeddings.npz")
    p.add_argument("--encoder", default=TEXT_ENCODER, help="name on the hub, or a local folder")
    p = sub.add_parser("annotate", help="spans.csv -> the language of a recording")
    p.add_argument("folder", help="recording: a folder with training/, validation/")
    p.add_argument("spans", help="CSV file with the columns start,end,sentence,task")
    p.add_argument("--encoder", default=TEXT_ENCODER, help="name on the hub, or a local folder")
    args = vars(parser.parse_args(argv))
    for name in ("skip", "procs"):
        if args.get(name, 1) < 1:
            parser.error(f"--{name} {args[name]}: at least 1")
    try:
        {"pack": pack, "embed": embed, "annotate": annotate}[args.pop("command")](**args)
    except DataError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
