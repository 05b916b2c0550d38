"""The tokenizer of a GGUF file as a Hugging Face directory: `python tokenizer.py GGUF DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer


def convert(gguf: Path, directory: Path) -> None:
    """Write the tokenizer of `gguf` to `directory`, which is created."""
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
