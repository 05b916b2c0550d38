"""`python -m muxserve.engine.loader --path P --dtype D --fd N`: fill a weight memfd from a file, and exit.

A process of its own, so that what conversion takes (page cache mappings, scratch memory, seconds of the
interpreter) never weighs on the worker, and a file that turns bad while it is read harms nobody. Exit 0: the
memory holds the manifest's tensors. Exit 2: the last line of stderr is a JSON object of `field` and `reason`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np

from muxserve.engine.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from muxserve.engine.checkpoint.base import NUMPY_DTYPES, Piece
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="muxserve.engine.loader", description=__doc__)
    parser.add_argument("--path", type=Path, required=True, help="model directory or GGUF file")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--layout", default="canonical", choices=get_args(WeightLayout))
    parser.add_argument("--fd", type=int, required=True, help="the memfd, inherited")
    parser.add_argument("--threads", type=int, default=2, help="threads that convert")
    arguments = parser.parse_args(argv)
    try:
        checkpoint = open_checkpoint(arguments.path, arguments.dtype)
        fill(checkpoint, arguments.fd, arguments.threads, arguments.layout)
    except CheckpointError as error:
        return _report(error.field, error.reason)
    except OSError as error:
        return _report("path", f"{arguments.path} cannot be loaded: {error}")
    return 0


def _report(field: str, reason: str) -> int:
    sys.stderr.write(json.dumps({"field": field, "reason": reason}) + "\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
