"""Why a checkpoint cannot be served."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is broken, incomplete, or of a kind that the engine does not serve.

    field: what is at fault: `path`, a file's key (`config.json:hidden_size`, `llama.block_count`) or a
        tensor's name. reason: a sentence for the person who gave the path.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
