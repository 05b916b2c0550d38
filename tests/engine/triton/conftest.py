"""Kernels run compiled where there is a GPU, and interpreted where there is none, by the same tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu() -> Iterator[None]:
    """numpy, which the interpreter computes with, warns of what is an infinity or a NaN on a GPU."""
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
