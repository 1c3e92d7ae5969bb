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


@pytest.mark.parametrize("module", ALONE)
def test_file_imports_alone_in_an_empty_folder(module, tmp_path):
    for name in (module, *ALONE[module]):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["world_model", "plan", "agent"])
def test_the_example_in_a_components_header_runs(module, tmp_path):
    for name in (module, *ALONE[module]):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-m", "doctest", "-v", f"{module}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"[1-9]\d* tests in", done.stdout), done.stdout


@pytest.mark.parametrize("module", ALONE)
def test_components_import_nothing_heavy_and_nothing_of_training(module):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; "
        "print(*(m for m in ('pybullet', 'sentence_transformers', 'train', 'evaluate', "
        "'calvin_env', 'franky', 'cv2', 'pyrealsense2', 'imageio') "
        "if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_deviation_tag_has_a_row_in_docs():
    code = "".join(p.read_text() for p in ROOT.glob("*.py"))
    tags = set(re.findall(r"[BD]\d+", " ".join(re.findall(r"\[[BD]\d[\d, BD]*\]", code))))
    rows = set(re.findall(r"^\| ([BD]\d+) \|", (ROOT / "docs/deviations.md").read_text(), re.M))
    assert tags and tags <= rows, sorted(tags - rows)


@pytest.mark.parametrize("number", range(1, 9))
def test_each_equation_is_found_once_in_the_code_and_has_a_test(number):
    lines = [
        line
        for name in ("world_model", "plan", "agent")
        for line in (ROOT / f"{name}.py").read_text().splitlines()
        if f"Eq. {number}: " in line
    ]
    assert len(lines) == 1, f"Eq. {number} is marked in {lines}"
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert re.search(rf"def test_eq{number}_", tests)
