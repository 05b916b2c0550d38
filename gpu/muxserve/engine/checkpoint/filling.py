"""A checkpoint's tensors into weight memory."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from muxserve.engine.checkpoint.base import NUMPY_DTYPES, Checkpoint, Piece
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.messages import WeightLayout


def fill(checkpoint: Checkpoint, fd: int, threads: int, layout: WeightLayout = "canonical") -> None:
    """Write every tensor to its place in the memory behind `fd`, all zero before. Raises CheckpointError."""
    size = os.fstat(fd).st_size
    needed = checkpoint.weight_bytes(layout)
    if size < needed:
        raise CheckpointError("fd", f"has {size} bytes for weights of {needed}")
    mapping = mmap.mmap(fd, size)

    def one(piece: Piece) -> None:
        entry = piece.entry
        out = np.ndarray(entry.shape, NUMPY_DTYPES[entry.dtype], mapping, entry.offset)
        checkpoint.write(piece, out, layout)

    # numpy lets go of the interpreter lock in its loops, so a few threads do help.
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, checkpoint.pieces(layout)):
            pass
