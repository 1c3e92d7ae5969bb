"""Makes the flat modules importable from tests/, and every test start from the same numbers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
