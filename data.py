"""Play data: read, check, pack, sample. LUMOS Sec. III, App. A, App. B, App. D.

    symbol   code       shape              meaning
    x_t      rgb_*      (L, B, 64, 64, 3)  camera images, uint8 until the encoder    App. A
    a_{t-1}  a_prev     (L, B, 7)          the action that led to x_t                App. D
    a_t      a          (T, B, 7)          the action that leads to x_{t+1}          App. D
    l        emb        (B, 384)           embedding of an annotated span's sentence App. B
    s^E_t    s_E        (T, B, k)          latents of a window's frames              Eq. 3
    s_g      s_E[-1]    (B, k)             hindsight goal: the window's last latent  Sec. III

    frame      0          1      2    |   3          4     |: an episode ends
    actions    a_0 -----> a_1 -> a_2      a_3 -----> a_4   actions[t] is commanded AT frame t
    a_prev     NO_ACTION  a_0    a_1      NO_ACTION  a_3   actions[t-1], NO_ACTION after a reset
    reset      True       False  False    True       False

    python data.py pack SRC DST --skip 2     CALVIN's format, one npz per frame -> flat arrays
    python data.py annotate SRC spans.csv    gives a recording its language

CALVIN's episodes include their last frame, its spans (start, start + 64) are 64 frames: without the
last. Once packed, both are [start, end). Copy this file alone. Needs: numpy, torch; tqdm and tyro
for the commands, sentence-transformers for new sentences.
"""

import csv
import hashlib
import json
import math
import os
import pickle
import shutil
import socket
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
SIZE = 64  # pixels, App. C
LARGEST = 2**26  # bytes of a recorded frame, all cameras and depths
ABSURD = 1e6  # no number of play is as large
BLOCK = 256  # rows that are packed between two notes of how far it got
MIN_LEN, MAX_LEN = 20, 32  # Table IV: shortest and longest window
CAMERAS = ("rgb_static", "rgb_gripper")
TEXT_ENCODER, EMBEDDING = "paraphrase-MiniLM-L3-v2", 384  # App. B
LANGUAGE = f"lang_{TEXT_ENCODER}"  # CALVIN's name for the folder of its annotations
SUMS = "sums.json"  # beside files that we wrote: their checksums
# A row of each packed array: of a frame; then of an episode or an annotated span.
SHAPES = dict.fromkeys(CAMERAS, (SIZE, SIZE, 3))
SHAPES |= {"actions": (7,), "robot_obs": (15,), "scene_obs": (24,)}
OTHERS = {"episodes": (2,), "spans": (2,), "span_emb": (EMBEDDING,), "disturbed": ()}
DTYPES = dict.fromkeys(SHAPES, np.float32) | dict.fromkeys(CAMERAS, np.uint8)
DTYPES |= {"span_emb": np.float32, "episodes": np.int64, "spans": np.int64, "disturbed": np.bool_}
ALL = slice(None)
NO_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # before the first step: the gripper is open
# What recording.json says of our recordings. CALVIN's have no such file, and are like this:
CALVIN = {"source": "calvin", "renderer": "egl", "hz": 30, "action_scale": [0.02, 0.05]}
MAKE_ROOM = "Make room, or correct the permissions, and repeat the command"


# ---------------------------------------------------------------------------- files
class DataError(RuntimeError):
    """Data that cannot be used. The message names the file, what is wrong and the remedy."""


@contextmanager
def naming(path, remedy: str):
    """Turns whatever goes wrong inside into a DataError that names the file and the remedy."""
    try:
        yield path
    except DataError:
        raise
    except Exception as e:
        raise DataError(f"{path}: {e} ({type(e).__name__}). {remedy}.") from e


@contextmanager
def command(name: str, *errors):
    """A command line: what the user can mend is told in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, DataError, *errors) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as stop:
        print(f"\nCtrl-C: {str(stop) or 'what is done is kept'}; the same command goes on.")
        sys.exit(130)


def write(path: Path, fill, keep: Path | None = None) -> None:
    """fill(file) writes beside, then it is renamed: the file is old or new, never half of one. The
    disk has its content before its name changes, so this holds for a power cut, too. keep: what
    the old file is renamed to."""
    part = path.with_name(f"part_{path.name}")
    try:
        with naming(f"could not write {path}", MAKE_ROOM):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                fill(file)
            sync(part)
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(part, path)
            sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_array(path: Path, array) -> None:
    """array: also an object, as CALVIN keeps its annotations; it is pickled."""
    write(path, lambda file: np.save(file, array))


def read_json(path, remedy: str, kinds: dict | None = None) -> dict:
    """The object in a JSON file, whose keys `kinds` are of those types; else DataError."""
    with naming(path, remedy):
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, expected an object")
        for key, kind in (kinds or {}).items():
            if not isinstance(content.get(key), kind):
                raise TypeError(f"{key} is {content.get(key)!r}, expected {kind}")
    return content


def checksum(row: dict) -> int:
    """Of a line of a log or the like, as JSON."""
    return zlib.crc32(json.dumps(row).encode())


def write_sums(folder: Path, names) -> None:
    """Notes what these files of a folder hold: one flipped bit is seen, see check_sums."""
    old = read_json(folder / SUMS, "Remove it") if (folder / SUMS).exists() else {}
    new = {name: zlib.crc32(np.memmap(folder / name, mode="r")) for name in names}
    write_json(folder / SUMS, old | new)


def check_sums(folder: Path, remedy: str) -> None:
    """DataError where a file is not what was written. CALVIN's have no sums: they pass."""
    path = folder / SUMS
    for name, crc in (read_json(path, remedy) if path.exists() else {}).items():
        with naming(folder / name, remedy):
            if zlib.crc32(np.memmap(folder / name, mode="r")) != crc:
                raise ValueError("it is damaged: its checksum is wrong")


@contextmanager
def locked(folder: Path, wait: bool = False):
    """One command at a time writes to a folder; another is refused, or waits until that ends."""
    from filelock import FileLock, Timeout

    with naming(folder, "Make room, or give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        holder = folder / ".lock_holder"
        try:
            lock = FileLock(folder / ".lock", blocking=wait).acquire()
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise DataError(f"{folder} is in use by {who}. Wait for it, or end it.") from None
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    with lock:
        yield


class Ignored(dict):
    """Stands for whatever else is in a ListConfig: types, parents, flags. It calls nothing."""

    def __init__(self, *_):
        super().__init__()


class ListConfig(list):
    """omegaconf's, which CALVIN's annotator leaves in its files: the list of its nodes' values."""

    def __setstate__(self, state: dict):
        self.extend(node._val for node in state["_content"])


class SafeUnpickler(pickle.Unpickler):
    """Numpy arrays and plain containers only: a stranger's pickle could otherwise run any code."""

    ALLOWED = ("numpy.ndarray", "numpy.dtype", "_codecs.encode", "numpy._core.numeric._frombuffer")
    ALLOWED += ("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar")
    TYPES = "builtins.list builtins.dict builtins.int builtins.str typing.Any"
    TYPES = (*TYPES.split(), "collections.defaultdict")

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core.", "numpy._core.")  # numpy 1's name
        if module.startswith("omegaconf.") or f"{module}.{name}" in self.TYPES:
            return ListConfig if name == "ListConfig" else Ignored
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def load_pickled_npy(path: Path):
    """The Python object in a .npy file, as CALVIN keeps its annotations, without running code."""
    with open(path, "rb") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        return SafeUnpickler(f).load().item()


def resize_area(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """uint8 (..., H, W, 3) -> (..., size, size, 3): area averaging, cv2.INTER_AREA's within 1."""
    *lead, H, W, C = images.shape
    if images.dtype != np.uint8 or C != 3 or min(H, W) < size:
        want = f"uint8 (..., H, W, 3), {size} pixels or more"
        raise ValueError(f"images are {images.dtype} {images.shape}, expected {want}")
    if H == W == size:
        return images
    weights = []
    for n in (H, W):  # (size, n): pixel i averages [i n/size, (i+1) n/size)
        edge, pixel = np.arange(size + 1)[:, None] * n / size, np.arange(n)
        overlap = np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel)
        weights.append((np.maximum(overlap, 0) * size / n).astype(np.float32))
    x = weights[0] @ images.reshape(*lead, H, W * C).astype(np.float32)
    return np.rint(weights[1] @ x.reshape(*lead, size, W, C)).astype(np.uint8)


# ---------------------------------------------------------------------------- language
def same_text_encoder(have: str | None, want: str | None, where) -> None:
    """The encoder's name travels with data and checkpoints; vectors of two encoders never mix."""
    if Path(have or "").name != Path(want or "").name:
        raise DataError(f"{where}: text encoder is {have!r}, expected {want!r}. Use one for both.")


def encoder_of(folder: str) -> str:
    """The text encoder whose name a language folder bears; CALVIN's own folder is of ours."""
    return TEXT_ENCODER if folder == "lang_annotations" else folder.removeprefix("lang_")


def _key(sentence: str) -> str:
    return " ".join(sentence.lower().split())  # the encoder is uncased: case and blanks don't count


@lru_cache
def embedding_table() -> dict[str, np.ndarray]:
    """The committed sentences, embedded by TEXT_ENCODER: {sentence: (384,)}."""
    if not (ASSETS / "embeddings.npz").exists():  # data.py was copied out alone
        return {}
    with np.load(ASSETS / "embeddings.npz", allow_pickle=False) as z:
        return dict(zip(map(_key, z["sentences"].tolist()), z["embeddings"], strict=True))


def encode(sentences: list[str], encoder: str = TEXT_ENCODER) -> np.ndarray:
    """Sentences -> (S, 384) float32: from the committed table, else by sentence-transformers.
    encoder: a model of the hub, or a local folder whose last part is the model's name."""
    known = dict(embedding_table()) if Path(encoder).name == TEXT_ENCODER else {}
    new = [s for s in dict.fromkeys(sentences) if _key(s) not in known]
    if new:
        remedy = f"pip install sentence-transformers; without a hub, a folder .../{TEXT_ENCODER}"
        with naming(f"sentence {new[0]!r}, not among the committed ones, by {encoder}", remedy):
            from sentence_transformers import SentenceTransformer

            made = SentenceTransformer(encoder, device="cpu").encode(new)
        known |= {_key(s): e for s, e in zip(new, made, strict=True)}
    rows = [known[_key(s)] for s in sentences]
    return np.array(rows, np.float32) if rows else np.zeros((0, EMBEDDING), np.float32)


def read_language(folder: Path, encoder: str, ids: np.ndarray, kept: np.ndarray) -> tuple:
    """Annotations: spans of packed rows [start, end) (M, 2), embeddings (M, 384), {"sentences",
    "tasks"}: [M]. ids, kept: as read_episodes returns them."""
    path, there = folder / "auto_lang_ann.npy", sorted(p.name for p in folder.parent.glob("lang*"))
    with naming(path, f"Annotate again; or --lang-folder: one of {there}, or none (no language)"):
        d = load_pickled_npy(path)
        lang = {"sentences": list(d["language"]["ann"]), "tasks": list(d["language"]["task"])}
        if not all(isinstance(x, str) for x in lang["sentences"] + lang["tasks"]):
            raise TypeError("a sentence or a task is no text")
        frames = np.array(d["info"]["indx"]).reshape(len(lang["tasks"]), 2)
        frames = frames.astype(np.int64, casting="same_kind" if len(frames) else "unsafe")
        emb = np.array(d["language"]["emb"], np.float32).reshape(len(frames), EMBEDDING)
        known = embedding_table() if encoder == TEXT_ENCODER else {}
        rows = zip(lang["sentences"], emb, strict=True)
        good = [np.abs(e - known.get(_key(s), e)).max() < 0.01 for s, e in rows]
        if not good or not all(good):  # also where not finite
            raise ValueError(f"{len(good)} annotations, of which {encoder} embedded {sum(good)}")
        e = np.searchsorted(ids[:, 0], frames[:, 0], "right") - 1  # the episode of each span
        spans = np.searchsorted(kept[:, 0], frames)  # the kept frames with ids in [start, end)
        bad = (e < 0) | (frames[:, 1] > ids[e, 1]) | (spans[:, 0] >= spans[:, 1])
        if bad.any():
            raise ValueError(f"{bad.sum()} spans are empty or in no episode: {frames[bad][0]}")
    return spans, emb, lang


def read_held_out(folder: Path) -> dict[str, np.ndarray]:
    """One validation sentence per task: tasks (K,), sentences (K,), embeddings (K, 384)."""
    with naming(folder / "embeddings.npy", "Annotate again, or --lang-folder none") as path:
        d = load_pickled_npy(path)
        emb = np.array([x["emb"] for x in d.values()], np.float32).reshape(len(d), EMBEDDING)
        sentences = [x["ann"][0] for x in d.values()]
        if not all(isinstance(x, str) for x in (*d, *sentences)) or not np.isfinite(emb).all():
            raise ValueError("a task or a sentence is no text, or an embedding is not finite")
        return {"tasks": [*d], "sentences": sentences, "embeddings": emb}


def annotate(folder: Path, spans: Path, encoder: str = TEXT_ENCODER) -> None:
    """Gives a recording its language.

    A span is frames [start, end) of one episode, `end` is not one of them; an unknown task may be
    left empty, the sentence then stands for it. The first sentence of a task in validation/ becomes
    the one that the policy is asked with.

    Args:
        folder: recording, a folder with training/ and validation/
        spans: CSV file with the columns start,end,sentence,task
        encoder: name on the hub, or a local folder
    """
    folder, lang = Path(folder), f"lang_{Path(encoder).name}"
    found, asked, every = {"validation": [], "training": []}, {}, []
    with naming(spans, "Columns: start,end,sentence,task; `end` is the first frame after the span"):
        table = {s: folder / s / "ep_start_end_ids.npy" for s in found}
        episodes = {s: np.load(x, allow_pickle=False).reshape(-1, 2) for s, x in table.items()}
        for row in csv.DictReader(Path(spans).read_text().splitlines()):
            start, end, sentence = int(row["start"]), int(row["end"]), row["sentence"].strip()
            span = (start, end, sentence, (row.get("task") or "").strip() or sentence)
            splits = [s for s in found if any(a <= start < end <= b + 1 for a, b in episodes[s])]
            if not sentence or not splits:
                raise ValueError(f"a span is empty, mute or in no episode: {span}")
            for split in splits:
                found[split].append(span)
        lacking = [split for split, rows in found.items() if not rows]
        if lacking:
            raise ValueError(f"no span is in an episode of {lacking}, which needs one")
    for *_, sentence, task in found["validation"] + found["training"]:
        asked.setdefault(task, sentence)  # a task's first sentence is that of run time
        every.append(sentence)
    emb = dict(zip(every, encode(every, encoder)[:, None], strict=True))  # sentence: (1, 384)
    told = {task: {"emb": emb[s][None], "ann": [s]} for task, s in asked.items()}
    write_array(folder / "validation" / lang / "embeddings.npy", told)
    for split, rows in found.items():
        *_, ann, task = zip(*rows, strict=True)
        language = {"ann": [*ann], "task": [*task], "emb": np.stack([emb[s] for s in ann])}
        info = {"episodes": [], "indx": [row[:2] for row in rows]}
        place = folder / split / lang
        write_array(place / "auto_lang_ann.npy", {"language": language, "info": info})
        if (folder / split / SUMS).exists():
            write_sums(folder / split, [f"{lang}/{path.name}" for path in place.glob("*.npy")])
    print({split: len(rows) for split, rows in found.items()}, "spans,", len(asked), "tasks")


# ---------------------------------------------------------------------------- packing
def read_frame(folder: Path, i: int, shapes: dict[str, tuple | None]) -> dict:
    """Frame i, checked: arrays of these names and shapes; an image of None may have any size."""
    path, frame = folder / f"episode_{i:07d}.npz", {}
    with naming(path, "Copy or record it again"), np.load(path, allow_pickle=False) as z:
        if sum(member.file_size for member in z.zip.infolist()) > LARGEST:
            raise ValueError(f"it would inflate to more than {LARGEST} bytes")
        for k, want in shapes.items():
            name = "rel_actions" if k == "actions" else k
            x = frame[k] = z[name]
            if k in CAMERAS:
                kind, ok = "uint8", x.dtype == np.uint8
                want = want or (*(max(n, SIZE) for n in x.shape[:2]), 3)  # it is never enlarged
            else:
                kind, ok = "finite floats", x.dtype.kind == "f" and (np.abs(x) <= ABSURD).all()
            if not ok or x.shape != want:
                raise ValueError(f"{name} is {x.dtype} {x.shape}, expected {kind} {want}")
        a = frame["actions"]
        if np.abs(a).max() > 1.001 or abs(a[6]) < 0.999:
            raise ValueError(f"rel_actions {a} not in [-1, 1], or their gripper not -1 or +1")
    return frame


def read_episodes(folder: Path, skip: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Episodes as frame ids [start, end) (E, 2) and as packed rows [start, end) (E, 2), the `skip`
    frames of each row (N, skip), and a digest of the sizes and times of all frames' files."""
    remedy = "It holds an episode's first and last frame per row: correct it, or record again"
    with naming(folder / "ep_start_end_ids.npy", remedy) as path:
        ids = np.load(path, allow_pickle=False).astype(np.int64, casting="same_kind").reshape(-1, 2)
        ids = ids[np.argsort(ids[:, 0])] + (0, 1)
        if not len(ids) or (ids[1:, 0] < ids[:-1, 1]).any():
            raise ValueError(f"{len(ids)} episodes; there must be one, and none may overlap")
        rows = (ids[:, 1] - ids[:, 0]) // skip  # an episode's last, incomplete step is left out
        if (rows < MIN_LEN).any():
            short = f"{(ids[rows < MIN_LEN] - (0, 1)).tolist()} are shorter than a window"
            raise ValueError(f"{short}, {MIN_LEN} frames at skip {skip}; or lower --skip")
    digest = hashlib.sha256()
    for file in (folder / f"episode_{i:07d}.npz" for bounds in ids for i in range(*bounds)):
        with naming(file, f"Copy or record it again, or take it out of {path.name}"):
            stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    kept = [np.arange(i, i + n * skip) for i, n in zip(ids[:, 0], rows, strict=True)]
    kept, ends = np.concatenate(kept).reshape(-1, skip), np.cumsum(rows)
    return ids, np.stack([ends - rows, ends], 1), kept, digest.hexdigest()


def check_meta(meta: dict) -> None:
    """ValueError, TypeError: names that are no text; numbers that are none, or absurd."""
    for k in ("source", "renderer", "text_encoder", "frame"):
        if not isinstance(meta.get(k), str | None):
            raise TypeError(f"{k} is {meta[k]!r}, expected a text")
    numbers = np.array([meta["hz"], *meta["action_scale"], meta["skip"]])
    ok = numbers.shape == (4,) and numbers.dtype.kind in "if" and (numbers > 0).all()
    ok = ok and type(meta["skip"]) is int and type(meta["hz"]) is not bool
    if not ok or (numbers > 10_000).any():
        what = f"hz, action_scale, skip are {numbers.tolist()}"
        raise ValueError(f"{what}, not 1 + 2 + 1 positive numbers, the last one whole")


def read_about(folder: Path, skip: int, lang_folder: str) -> dict:
    """The meta of a packed recording of which every skip-th frame is kept."""
    path, base = folder / "recording.json", {"skip": 1, "frame": "base", "text_encoder": None}
    about = base | CALVIN | (read_json(path, "Correct it") if path.exists() else {})
    with naming(path, "Correct it"):
        check_meta(about)
    # The frames of a recording may last several steps already.
    meta = {k: about[k] for k in CALVIN} | {"hz": about["hz"] / skip, "skip": about["skip"] * skip}
    if about["frame"] != "base":  # of relative actions
        meta["frame"] = about["frame"]
    encoder = None if lang_folder == "none" else encoder_of(lang_folder)
    if encoder and about["text_encoder"]:
        same_text_encoder(about["text_encoder"], encoder, path)
    return meta | {"text_encoder": encoder, "format": 1}


def pack_split(src: Path, dst: Path, skip: int, meta: dict, lang_folder: str, procs: int) -> int:
    """One split of a recording -> its arrays. Returns how many rows they have."""
    from tqdm import tqdm

    check_sums(src, "Copy it anew, or record or annotate it again")
    ids, episodes, kept, digest = read_episodes(src, skip)
    N, disturbed = len(kept), np.zeros(len(kept), bool)
    spans, emb = np.zeros((0, 2), np.int64), np.zeros((0, EMBEDDING), np.float32)
    lang = {"sentences": [], "tasks": []}
    if lang_folder != "none":
        spans, emb, lang = read_language(src / lang_folder, meta["text_encoder"], ids, kept)
    if (src / "disturbed.npy").exists():  # teleop.py disturbed itself; people's play has none
        with naming(src / "disturbed.npy", "Record it again, or remove that file") as path:
            x = np.load(path, allow_pickle=False)
            if x.dtype != bool or x.ndim != 1:
                raise TypeError(f"it is {x.dtype} {x.shape}, expected bool (N,)")
            disturbed = x[kept].any(1)
    shapes = SHAPES | dict.fromkeys(CAMERAS)  # of the first frame's, whatever size they are
    if meta["source"] == "robot":
        del shapes["scene_obs"]  # a real scene has none: zeros stand for it
    shapes = {k: x.shape for k, x in read_frame(src, ids[0, 0], shapes).items()}
    dst.mkdir(exist_ok=True)
    files, progress = {k: dst / f"{k}.npy" for k in SHAPES}, dst / "packing.json"
    state = {"source": str(src), "meta": meta, "digest": digest, "done": 0}  # rows
    if progress.exists():
        before = read_json(progress, f"Remove {dst.parent}", {"done": int})
        if before | {"done": 0} != state or not 0 <= before["done"] <= N:
            raise DataError(f"{dst.parent} is of another recording or options. Remove it.")
        state = before
    else:
        for k, path in files.items():
            create_array(path, (N, *SHAPES[k]), DTYPES[k])
        write_json(progress, state)
    arrays = {k: np.load(path, mmap_mode="r+") for k, path in files.items()}

    def pack_row(row: int) -> None:  # one step at 1/skip of the recording's rate
        frame, actions = read_frame(src, kept[row, 0], shapes), {"actions": shapes["actions"]}
        skipped = [read_frame(src, i, actions) for i in kept[row, 1:]]
        # What is seen first, the mean arm action, held for `skip` steps, and the last gripper.
        a = np.stack([step["actions"] for step in (frame, *skipped)])
        for k, x in (frame | {"actions": np.append(a[:, :6].mean(0), a[-1, 6])}).items():
            arrays[k][row] = resize_area(x) if k in CAMERAS else x

    pool = ThreadPoolExecutor(procs)  # the work is in numpy, which lets others run
    with pool, tqdm(total=N, initial=state["done"], desc=src.name, unit=" frames") as bar:
        for first in range(state["done"], N, BLOCK):
            rows = range(first, min(first + BLOCK, N))
            for _ in pool.map(pack_row, rows):
                bar.update()
            for x in arrays.values():
                x.flush()
            write_json(progress, state | {"done": rows.stop})
    small = {"episodes": episodes, "spans": spans, "span_emb": emb, "disturbed": disturbed}
    for k, x in small.items():
        write_array(dst / f"{k}.npy", x)
    write_json(dst / "lang.json", lang)
    return N


def create_array(path: Path, shape: tuple, dtype) -> np.memmap:
    """A .npy whose room is reserved at once: a full disk is an error here, not a crash later."""
    with naming(path, "Make room on the disk"):
        x = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, x.offset + x.nbytes)
    return x


def pack(
    src: Path, dst: Path, skip: int = 1, lang_folder: str = LANGUAGE, procs: int = os.cpu_count()
) -> None:
    """A recording in CALVIN's format -> arrays of 64 x 64 images. Killed at any moment, the same
    call goes on where it was.

    Args:
        src: recording, a folder with training/ and validation/
        dst: the new folder, which is DST.part until it is whole
        skip: keep every n-th frame
        lang_folder: of the annotations to take, or none
        procs: frames that are read at a time
    """
    src, dst, part = Path(src).resolve(), Path(dst), Path(f"{dst}.part")
    if skip < 1 or procs < 1:
        raise DataError(f"--skip {skip}, --procs {procs}: at least 1. Give other numbers.")
    if dst.exists():
        raise DataError(f"{dst} exists. Remove it, or give another folder.")
    splits = ("validation", "training")
    with locked(part), naming(part, MAKE_ROOM):
        meta, other = (read_about(src / s, skip, lang_folder) for s in splits)
        if meta != other:
            raise DataError(f"{src}: recording.json differs between training/ and validation/.")
        n = sum(pack_split(src / s, part / s, skip, meta, lang_folder, procs) for s in splits)
        write_json(part / "meta.json", meta)
        names = [f"{k}.npy" for k in SHAPES | OTHERS if k not in CAMERAS]  # a bit is but a pixel
        for split in splits:
            write_sums(part / split, [*names, "lang.json", "../meta.json"])
            (part / split / "packing.json").unlink()
        os.rename(part, dst)  # with its lock, or another command would begin in it
        for name in (".lock", ".lock_holder"):
            (dst / name).unlink()
        sync(dst.parent)
    print(f"{dst}: {n} frames")


# ---------------------------------------------------------------------------- packed play
class PlayData:
    """A packed split. Memory-mapped: rgb_static, rgb_gripper (N, 64, 64, 3) uint8; actions (N, 7),
    robot_obs (N, 15), scene_obs (N, 24) float32. episodes (E, 2), spans (M, 2): rows [start, end);
    span_emb (M, 384); sentences, tasks [M]; is_start (N,): first row of an episode; disturbed (N,):
    rows in which the operator disturbed itself; meta: a dict.
    """

    def __init__(self, root, split: str):
        self.path = Path(root) / split
        again = f"Not packed yet, or damaged: .venv/bin/python data.py pack SRC {root}"
        with naming(Path(root) / "meta.json", again) as path:
            self.meta = read_json(path, again, {"source": str, "renderer": str})
            check_meta(self.meta)
        lang = read_json(self.path / "lang.json", again, {"sentences": list, "tasks": list})
        self.sentences, self.tasks = lang["sentences"], lang["tasks"]
        check_sums(self.path, again)
        for k, shape in (SHAPES | OTHERS).items():
            with naming(self.path / f"{k}.npy", again) as path:
                x = np.load(path, mmap_mode="r")
                if x.shape[1:] != shape or x.dtype != DTYPES[k]:
                    want = f"{DTYPES[k].__name__} (..., {', '.join(map(str, shape))})"
                    raise ValueError(f"it is {x.dtype} {x.shape}, expected {want}")
            setattr(self, k, x)
        with naming(self.path, again):
            self.check()
        self.kept = {}  # arrays that lie on a device, see keep_on
        self.longest = int(np.diff(self.episodes).max())  # frames of the longest episode
        self.is_start = np.zeros(len(self), bool)
        self.is_start[self.episodes[:, 0]] = True

    def check(self) -> None:
        """ValueError unless the arrays belong together."""
        N, (starts, ends) = len(self), self.episodes.T
        rows = {k: len(getattr(self, k)) for k in (*SHAPES, "disturbed")}
        if set(rows.values()) != {N}:
            raise ValueError(f"frames of its arrays: {rows}")
        texts = [len(x) for x in (self.spans, self.span_emb, self.sentences, self.tasks)]
        if len(set(texts)) > 1:
            raise ValueError(f"spans, span_emb, sentences and tasks are {texts}")
        if not N or not np.array_equal([*starts, N], [0, *ends]) or (starts >= ends).any():
            raise ValueError(f"episodes do not cover its {N} frames one after the other")
        if (self.spans < 0).any() or (self.spans > N).any() or (np.diff(self.spans) <= 0).any():
            raise ValueError(f"spans are empty, or outside of its {N} frames")
        if not all(isinstance(x, str) for x in self.sentences + self.tasks):
            raise TypeError("lang.json: a sentence or a task is no text")
        for k in ("actions", "robot_obs", "scene_obs", "span_emb"):
            limit = 1.001 if k == "actions" else ABSURD
            if not (np.abs(getattr(self, k)) <= limit).all():
                raise ValueError(f"{k} has numbers that are not finite, or beyond {limit}")

    def __len__(self) -> int:
        return len(self.actions)

    def undisturbed(self, least: int) -> np.ndarray:
        """Rows [start, end) (n, 2) of stretches of at least so many undisturbed frames."""
        rows = np.flatnonzero(~self.disturbed)
        cuts = np.flatnonzero((np.diff(rows) > 1) | self.is_start[rows[1:]]) + 1
        bounds = [(x[0], x[-1] + 1) for x in np.split(rows, cuts) if len(x) >= least]
        return np.array(bounds, np.int64).reshape(-1, 2)

    def stretches(self, L: int) -> np.ndarray:
        """First rows (n,) of stretches of L frames that lie in one episode and share no frame."""
        return np.concatenate([np.arange(a, b - L + 1, L) for a, b in self.episodes])

    def keep_on(self, device: str, free: int) -> bool:
        """Copies what `frames` reads to a device that has `free` bytes, if half of them suffice:
        from then on batches are made there, no frame is read or sent. Returns whether it did."""
        arrays = {k: getattr(self, k) for k in (*CAMERAS, "robot_obs", "actions", "is_start")}
        if sum(x.nbytes for x in arrays.values()) > free / 2:
            return False
        self.kept = {k: torch.tensor(np.asarray(x), device=device) for k, x in arrays.items()}
        return True

    def rows(self, name: str, index: np.ndarray) -> Tensor:
        """Rows of one array, from where it is kept."""
        if name not in self.kept:
            return torch.from_numpy(getattr(self, name)[index])
        return self.kept[name][torch.from_numpy(index).to(self.kept[name].device)]

    def frames(self, index: np.ndarray, fresh: bool = False) -> dict[str, Tensor]:
        """Rows index (L, B) -> rgb_* (L, B, 64, 64, 3) uint8, robot_obs (L, B, 15), a_prev
        (L, B, 7), reset (L, B): True where an episode starts, and where a `fresh` batch does."""
        batch = {k: self.rows(k, index) for k in (*CAMERAS, "robot_obs")}
        batch |= {"reset": self.rows("is_start", index), "a_prev": self.rows("actions", index - 1)}
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

    def __init__(self, data: PlayData, B, L, seed, carry=True, shard=ALL):
        """shard: which of a batch's B sequences this process reads, a slice."""
        self.data, self.B, self.L, self.seed = data, B, L, seed
        self.carry, self.shard = carry, shard
        long = data.episodes[np.diff(data.episodes)[:, 0] >= L]  # the others cannot hold a sequence
        self.pool = np.concatenate([np.arange(0), *(np.arange(*bounds) for bounds in long)])
        least = len(data) if carry else len(self.pool)
        if least < L or B < 1:
            what = f"{data.path}: {B} sequences of {L} in {least} frames"
            raise DataError(f"{what}. Record more, or lower --sequence_length.")
        self.chunk = math.ceil(len(data) / B)  # frames from one row's start to the next
        self.steps_per_epoch = math.ceil(self.chunk / L)

    def batch(self, step: int) -> dict[str, Tensor]:
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
        index = (first[self.shard] + np.arange(self.L)[:, None]) % N
        return self.data.frames(index, fresh=i == 0 or not self.carry)


class Windows:
    """Windows of min_len to max_len frames for the agent, padded to T [D14]; batch(step) is pure.

    play: any start in an episode, away from bursts of disturbance; goal: the window's last frame.
    lang: any annotated span, then any start in it; it ends in it; goal: its sentence, or one of any
    span of its task, each as often as the others [D11]. A span shorter than min_len is a window,
    whole [D23].
    """

    def __init__(
        self, data, B, T=MAX_LEN, min_len=MIN_LEN, max_len=MAX_LEN, kind="play", seed=0, shard=ALL,
        rephrase=False,
    ):  # fmt: skip
        """shard: which of a batch's B windows this process reads, a slice."""
        self.data, self.B, self.T, self.kind, self.seed, self.shard = data, B, T, kind, seed, shard
        if not 1 <= min_len <= max_len <= T:
            raise DataError(f"no windows of {min_len} to {max_len} frames fit in {T}.")
        bounds, need = data.undisturbed(min_len), f"{min_len} undisturbed frames: record more"
        if kind == "lang":
            bounds, need = data.spans, "language: annotate it, and pack without --lang-folder none"
        if not len(bounds):
            raise DataError(f"{data.path} has no {need}.")
        places = np.maximum(np.diff(bounds)[:, 0] - min_len + 1, 1)  # admissible starts in each
        self.span = np.repeat(np.arange(len(bounds)), places)
        place = np.concatenate([np.arange(n) for n in places])  # of each start in its span
        self.align = place >= places[self.span] - 8  # the last 8 places of a span [D11]
        weight = 1 / places[self.span] if kind == "lang" else np.ones(len(place))
        self.cdf = np.cumsum(weight)  # every span is as likely, or every start of play
        self.start = bounds[self.span, 0] + place
        self.most = np.minimum(max_len, bounds[self.span, 1] - self.start)  # the longest window
        self.least = np.minimum(min_len, self.most)
        self.rephrase = rephrase
        if rephrase:  # [D11]: spans in the order of their tasks; of each from `first` on so many
            _, self.task, self.many = np.unique(data.tasks, return_inverse=True, return_counts=True)
            self.by_task = np.argsort(self.task, stable=True)
            self.first = np.cumsum(self.many) - self.many

    def batch(self, step: int) -> dict[str, Tensor]:
        """index (T, B) rows of data, length (B,), a (T, B, 7); lang: emb (B, 384), span, align."""
        rng = np.random.default_rng([self.seed, step, self.kind == "lang"])
        w = np.searchsorted(self.cdf, rng.random(self.B) * self.cdf[-1], "right")
        length = rng.integers(self.least[w], self.most[w] + 1)[self.shard]
        w, t = w[self.shard], np.arange(self.T)[:, None]
        index = self.start[w] + np.minimum(t, length - 1)  # the end is held [D14]
        a = self.data.actions[index]  # (T, B, 7); the held end repeats its gripper
        a[t >= length, :6] = 0
        batch = {"index": index, "length": length, "a": a}
        if self.kind == "lang":
            span = alike = self.span[w]
            if self.rephrase:
                task, u = self.task[span], rng.random(self.B)[self.shard]
                alike = self.by_task[self.first[task] + (u * self.many[task]).astype(int)]
            emb = self.data.span_emb[alike]
            batch |= {"span": span, "align": self.align[w], "emb": emb}
        return {k: torch.from_numpy(x) for k, x in batch.items()}


def play_and_language(data: PlayData, c, seed: int, shard=slice) -> tuple[Windows, Windows]:
    """Half and half of a batch [D6]. c: AgentConfig or BaselineConfig. shard(n): which of the n
    windows of either kind this process reads, a slice; slice(n) is all."""
    lengths, n = (c.sequence_length, c.min_window, c.max_window), c.batch_size // 2
    play = Windows(data, c.batch_size - n, *lengths, "play", seed, shard(c.batch_size - n))
    return play, Windows(data, n, *lengths, "lang", seed, shard(n), c.rephrase)


def with_images(windows: Windows, step: int) -> dict[str, Tensor]:
    """A batch with what the cameras saw, rgb_static, rgb_gripper (T, B, 64, 64, 3) uint8."""
    batch = windows.batch(step)
    images = {k: windows.data.rows(k, batch["index"].numpy()) for k in CAMERAS}
    return {k: batch[k] for k in ("a", "emb", "align") if k in batch} | images


# ---------------------------------------------------------------------------- latents
def to_device(batch: dict[str, Tensor], device) -> dict[str, Tensor]:
    return {k: x.to(device, non_blocking=True) for k, x in batch.items()}


class Latents(NamedTuple):
    """The frozen world model's latents of a split's frames, memory-mapped."""

    h: np.ndarray  # (N, H) float16
    z: np.ndarray  # (N, C) uint8, the class of each categorical
    z_reset: np.ndarray  # (N, C) uint8, z of that frame after a reset [D8]


def cache_latents(world, data: PlayData, key: str, precision=None) -> Latents:
    """Latents of every frame of a split, made once per world model and kept beside the data, in a
    folder named after `key`, which stands for the world model's weights and precision."""
    folder, part = data.path / f"latents-{key}", data.path / f"latents-{key}.part"
    if not folder.exists():
        with locked(data.path, wait=True), naming(part, MAKE_ROOM):
            if not folder.exists():  # nobody else has just made it
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                make_latents(world, data, part, precision or nullcontext())
                write_sums(part, [f"{k}.npy" for k in Latents._fields])
                os.rename(part, folder)
    remedy = f"Remove {folder}, it is made again"
    check_sums(folder, remedy)
    with naming(folder, remedy):
        arrays = [np.load(folder / f"{k}.npy", mmap_mode="r") for k in Latents._fields]
        if {len(x) for x in arrays} != {len(data)}:
            raise ValueError(f"it has not {len(data)} rows")
        if not np.isfinite(arrays[0].sum(dtype=np.float32)):
            raise ValueError("h is not finite")
    return Latents(*arrays)


def h_after_reset(world) -> Tensor:
    """h (1, H) of a frame without a past: one constant vector [D8]."""
    return world.recurrent(*world.initial(1), torch.tensor([NO_ACTION], device=world.device))


@torch.random.fork_rng()  # so that a cache made anew is the same, and training goes on as before
@torch.no_grad()
def make_latents(world, data: PlayData, folder: Path, precision) -> None:
    """The set is cut into stretches that are filtered side by side; each begins `warm` frames
    early, so that its first kept latent has a history, too."""
    from tqdm import tqdm

    N, c = len(data), world.config
    files = {k: folder / f"{k}.npy" for k in Latents._fields}
    out = {k: create_array(files[k], (N, c.categoricals), np.uint8) for k in ("z", "z_reset")}
    out["h"] = create_array(files["h"], (N, c.deterministic), np.float16)
    stretches, warm, L = min(64, math.ceil(N / 256)), 64, 64
    length = math.ceil(N / stretches)  # frames of each
    starts = np.arange(stretches) * length
    state = world.initial(stretches)
    with precision:
        h_reset = h_after_reset(world)
    torch.manual_seed(0)
    for t in tqdm(range(-warm, length, L), desc=f"latents of {data.path.name}", unit="block"):
        frames = (starts + t + np.arange(min(L, length - t))[:, None]) % N  # (L, stretches)
        batch = to_device(data.frames(frames), world.device)
        with precision:
            e = world.encode(world.see(batch))
            h, z, _ = world.observe(e, batch["a_prev"], batch["reset"], state)
            state = (h[-1], z[-1])
            z_reset, _ = world.represent(h_reset, e)  # each frame as if it was the first one
        if t >= 0:
            kept = (np.arange(len(frames)) + t)[:, None] < np.minimum(N - starts, length)
            made = {"h": h, "z": world.classes_of(z), "z_reset": world.classes_of(z_reset)}
            for k, x in made.items():
                out[k][frames[kept]] = x.cpu().numpy()[kept]
    for x in out.values():
        x.flush()


class WindowBatches:
    """The agent's two batches for a step, half and half [D6]: windows of play, and windows with a
    sentence. Each is a dict: s_E (T, B, k) expert latents, a (T, B, 7), length (B,), gripper (B,),
    its command before the window; those with a sentence also emb (B, 384), align (B,)."""

    def __init__(self, data: PlayData, latents: Latents, world, c, seed: int, shard=slice):
        """c, shard: as in play_and_language."""
        self.data, self.latents, self.world, self.reset_start = data, latents, world, c.reset_start
        self.play, self.language = play_and_language(data, c, seed, shard)
        with torch.no_grad():
            self.h_reset = h_after_reset(world)

    def read(self, step: int) -> tuple[dict, dict]:
        """What the disk knows of a step's windows: no random numbers of torch's, no device."""
        both = self.play.batch(step), self.language.batch(step)
        for windows in both:
            index, latents = windows["index"].numpy(), self.latents  # (T, B)
            arrays = {"z": latents.z[index], "robot_obs": self.data.robot_obs[index]}
            arrays |= {"h": latents.h[index[0]], "z_reset": latents.z_reset[index[0]]}
            windows |= {k: torch.from_numpy(x) for k, x in arrays.items()}
        return both

    @torch.no_grad()
    def states(self, windows: dict, reset_start: float | None = None) -> dict[str, Tensor]:
        """One of `read`'s, on the device -> a batch; reset_start overrides [D8]'s chance. The
        expert's h is computed again from the window's first state: where that is a reset, it knows
        no more of the past than the agent's [D8]. A short window's end is held [D14]."""
        world, robot_obs, a = self.world, windows["robot_obs"], windows["a"]
        z = world.latent_z(windows["z"], robot_obs)
        z_reset = world.latent_z(windows["z_reset"], robot_obs[0])
        chance = self.reset_start if reset_start is None else reset_start
        fresh = torch.rand(len(z_reset), 1, device=z.device) < chance
        z[0] = torch.where(fresh, z_reset, z[0])
        h = [torch.where(fresh, self.h_reset, windows["h"].float())]
        for t in range(1, len(a)):
            after = world.recurrent(h[-1], z[t - 1], a[t - 1])
            h.append(torch.where((t < windows["length"])[:, None], after, h[-1]))
        batch = {k: windows[k] for k in ("a", "length", "emb", "align") if k in windows}
        return batch | {"s_E": torch.cat([torch.stack(h), z], -1), "gripper": robot_obs[0, :, 14]}

    def batch(self, step: int, reset_start: float | None = None) -> tuple[dict, dict]:
        play, language = (to_device(x, self.world.device) for x in self.read(step))
        return self.states(play, reset_start), self.states(language, reset_start)


def main(arguments: list[str] | None = None) -> None:
    import tyro

    commands = {"pack": pack, "annotate": annotate}
    how = {"description": __doc__, "config": (tyro.conf.PositionalRequiredArgs,)}
    with command("data.py"):
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, **how)


if __name__ == "__main__":
    main()
