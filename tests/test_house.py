"""The house: every file stands alone where it says so, every deviation is written down."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALONE = {
    "world_model": [],
    "plan": [],
    "agent": ["plan"],
    "data": [],
    "sim": ["calvin"],
    "teleop": ["sim", "calvin", "data"],
    "baselines": ["plan"],
    "deploy": ["robot", "agent", "plan", "data"],
    "robot": [],
    "calvin": [],
}
HEAVY = "pybullet sentence_transformers calvin_env franky cv2 pyrealsense2 imageio"


def alone(module: str, folder: Path, *command: str) -> str:
    """What a command says in a folder that has this file and those it needs beside it."""
    for name in (module, *ALONE[module]):
        shutil.copy(ROOT / f"{name}.py", folder)
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ALONE)
def test_file_imports_alone_in_an_empty_folder_and_nothing_heavy_with_it(module, tmp_path):
    code = f"import sys, {module}; print(*set(sys.modules).intersection({HEAVY.split()}))"
    assert alone(module, tmp_path, "-c", code).split() == []


@pytest.mark.parametrize("module", ["world_model", "plan", "agent"])
def test_the_example_in_a_components_header_runs(module, tmp_path):
    said = alone(module, tmp_path, "-m", "doctest", "-v", f"{module}.py")
    assert re.search(r"[1-9]\d* tests in", said), said


def test_every_deviation_tag_has_a_row_in_docs():
    code = "".join(p.read_text() for p in ROOT.glob("*.py"))
    tags = set(re.findall(r"[BD]\d+", " ".join(re.findall(r"\[[BD]\d[\d, BD]*\]", code))))
    rows = set(re.findall(r"^\| ([BD]\d+) \|", (ROOT / "docs/deviations.md").read_text(), re.M))
    assert tags and tags <= rows, sorted(tags - rows)


@pytest.mark.parametrize("number", range(1, 9))
def test_each_equation_is_found_once_in_the_code_and_has_a_test(number):
    code = "".join((ROOT / f"{name}.py").read_text() for name in ("world_model", "plan", "agent"))
    assert code.count(f"Eq. {number}: ") == 1
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert f"def test_eq{number}_" in tests
