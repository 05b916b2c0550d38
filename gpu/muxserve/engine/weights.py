"""A model's weights in one memfd: filled by the loader, mapped by executors, gone with the last of them."""

from __future__ import annotations

import math
import mmap
import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from muxserve.engine.messages import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


def weights_memfd(size: int) -> int:
    """A file descriptor of `size` bytes of anonymous shared memory; the caller closes it. Raises OSError."""
    fd = os.memfd_create("muxserve-weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_weights(fd: int, manifest: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Tensors over the shared, read-only mapping of `fd`: no copy, and a write to one is a fault.

    The mapping lives as long as the tensors; `fd` may be closed at once.
    """
    import torch  # only executors come here: the worker, which makes the memfd, stays free of torch

    # Populated: the first request should not pay for a page fault in every few rows of every matrix.
    mapping = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    tensors = {}
    with warnings.catch_warnings():
        # torch warns that it cannot keep us from writing to a read-only buffer. We do not.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for entry in manifest:
            dtype = getattr(torch, entry.dtype)
            count = math.prod(entry.shape)
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.offset)
            tensors[entry.name] = flat.view(entry.shape)
    return tensors
