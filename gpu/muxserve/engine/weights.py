"""A model's weights in one memfd: filled by the loader, mapped by executors, gone with the last of them."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.messages import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.generic]

_STORED: dict[str, np.dtype[np.generic]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


def weights_memfd(size: int) -> int:
    """A file descriptor of `size` bytes of anonymous shared memory; the caller closes it. Raises OSError."""
    fd = os.memfd_create("muxserve-weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_memory(fd: int, size: int) -> NDArray[np.uint8]:
    """uint8 `[size]` over the shared mapping of `fd`, writable; `fd` may be closed at once."""
    return np.frombuffer(mmap.mmap(fd, size), np.uint8)


def map_weights(fd: int, manifest: Iterable[TensorEntry]) -> dict[str, Array]:
    """Read-only arrays over the shared mapping of `fd`, by name: no copy. bfloat16 comes as uint16.

    The mapping lives as long as the arrays; `fd` may be closed at once.
    """
    # Populated: the first request should not pay for a page fault in every few rows of every matrix.
    mapping = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    return {
        entry.name: np.ndarray(entry.shape, _STORED[entry.dtype], mapping, entry.offset) for entry in manifest
    }


def map_tensors(fd: int, manifest: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """`map_weights` as torch tensors in their own dtypes; a write to one is a fault."""
    import torch  # what runs without torch stays free of it

    entries = tuple(manifest)
    arrays = map_weights(fd, entries)
    with warnings.catch_warnings():
        # torch warns that it cannot keep us from writing to a read-only array. We do not.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {
            entry.name: torch.from_numpy(arrays[entry.name]).view(getattr(torch, entry.dtype))
            for entry in entries
        }
