"""A GGUF file as a Hugging Face directory that any peer reads, written by transformers.

    PYTHON convert.py GGUF DIRECTORY

A script of its own, since the interpreter that has transformers and gguf may not be the one that runs the
benchmark. Weights are stored as bfloat16, which is what every contender computes with. No tokenizer: prompts
are token ids, and nobody turns their answers into text.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import gguf as gguf_format
import torch
from transformers import AutoModelForCausalLM


def convert(gguf: Path, directory: Path) -> None:
    """Write configuration and weights of `gguf` to `directory`, which is created."""
    # transformers reads the file's header three times, and each takes seconds.
    readers: Any = gguf_format
    readers.GGUFReader = functools.cache(readers.GGUFReader)
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF remembers that it was quantised; a fresh one of the same shape does not.
    config = type(read.config).from_dict(read.config.to_dict() | {"quantization_config": None})
    del config.quantization_config
    from_config: Any = AutoModelForCausalLM.from_config
    plain = from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
