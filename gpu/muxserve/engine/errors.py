"""What goes wrong with a job, on whatever device. The engine lives on.

LookupError
└── UnallocatedBlockError   tables and job disagree
ValueError
└── JobError                a job names what its model does not have
"""

from __future__ import annotations


class UnallocatedBlockError(LookupError):
    """A job reached a position whose span has no block: the tables and the job disagree."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer}: a sequence of the batch reaches into a span without a block")


class JobError(ValueError):
    """A job that names a slot, position or token that its model does not have."""
