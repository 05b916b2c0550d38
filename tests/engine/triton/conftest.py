"""Kernels run compiled where there is a GPU, and interpreted where there is none: the same tests either way.

How they run is settled when the kernels are first imported, so before any test module is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu() -> Iterator[None]:
    """numpy, which the interpreter computes with, warns of what is an infinity or a NaN on a GPU."""
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
