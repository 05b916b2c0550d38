"""Hugging Face directories and GGUF files as a `ModelSpec` and canonical tensors. numpy, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from muxserve.engine.checkpoint.base import Checkpoint
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.checkpoint.filling import fill
from muxserve.engine.checkpoint.gguf_model import open_gguf
from muxserve.engine.checkpoint.huggingface import open_directory
from muxserve.engine.checkpoint.types import RequestedDType

__all__ = ["Checkpoint", "CheckpointError", "RequestedDType", "fill", "open_checkpoint"]


def open_checkpoint(path: Path, dtype: RequestedDType = "auto") -> Checkpoint:
    """Read and check the headers of a model directory or a GGUF file; tensor data stays on disk.

    dtype "auto": the configuration's dtype (float16 is served as bfloat16); GGUF files as bfloat16.
    Raises CheckpointError (field, reason) for anything that would keep the model from being served.
    """
    if dtype not in get_args(RequestedDType):
        raise CheckpointError("dtype", f"{dtype!r} is not one of {', '.join(get_args(RequestedDType))}")
    try:
        if path.is_dir():
            return open_directory(path, dtype)
        if path.is_file():
            return open_gguf(path, dtype)
    except OSError as error:
        raise CheckpointError("path", f"{path} cannot be read: {error.strerror or error}") from error
    except ArithmeticError as error:
        raise CheckpointError("path", f"{path} has numbers out of range in its header: {error}") from error
    reason = "is neither a directory nor a file" if path.exists() else "does not exist"
    raise CheckpointError("path", f"{path} {reason}")
