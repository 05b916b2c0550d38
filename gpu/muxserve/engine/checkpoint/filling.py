"""A checkpoint's tensors into weight memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from muxserve.engine.checkpoint.base import Checkpoint, Piece
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.messages import WeightLayout


def fill(checkpoint: Checkpoint, fd: int, threads: int, layout: WeightLayout = "canonical") -> None:
    """Write every tensor to its place in the memory behind `fd`. Raises CheckpointError, OSError."""
    size = os.fstat(fd).st_size
    needed = checkpoint.weight_bytes(layout)
    if size < needed:
        raise CheckpointError("fd", f"has {size} bytes for weights of {needed}")

    def one(piece: Piece) -> None:
        data = checkpoint.read(piece).view(np.uint8).data.cast("B")
        at = piece.offset
        # Written, not mapped: a page fault for each page costs more than to copy it.
        while data:
            written = os.pwrite(fd, data, at)
            data, at = data[written:], at + written

    # numpy lets go of the interpreter lock in its loops, so a few threads do help.
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, checkpoint.pieces(layout)):
            pass
