"""`Arena`: the allocation of a device that holds KV blocks. Here in shared memory; `cuda.arena` on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.memory import Memfd, available_memory
from muxserve.engine.messages import AttachArena

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64
"""`block_bytes` is a multiple of it, so a block starts on a cache line and at an element of any dtype."""


class ArenaError(ValueError):
    """An arena that cannot be. field: the setting or resource at fault (`arena`, `block_bytes`, `device`)."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Arena(Protocol):
    """Blocks `0 … blocks - 1` of `block_bytes` each, one after another.

    One process creates an arena and owns it; others attach to what `descriptor()` says, with `fd` where there
    is one. The owner closes last. Nothing is known about the bytes of a block before it is written.
    """

    @property
    def block_bytes(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    @property
    def fd(self) -> int:
        """To be passed along with `descriptor()`; -1 = none."""

    def descriptor(self) -> AttachArena:
        """What another process needs to attach."""

    def tensor(self) -> Tensor:
        """uint8 `[blocks * block_bytes]` on the arena's device: a view, not to be used after `close`."""

    def close(self) -> None:
        """Let go of the arena; a second call does nothing."""


class SharedArena:
    """An arena in anonymous shared memory: the CPU's. All of it is taken at once: a machine that has not
    enough says so at the start, memory stays as it is from then on, and no step waits for pages."""

    def __init__(self, memory: Memfd, block_bytes: int, blocks: int) -> None:
        self._memory = memory
        self.block_bytes = block_bytes
        self.blocks = blocks

    @classmethod
    def create(cls, size: int, block_bytes: int) -> SharedArena:
        """An arena of the whole blocks that fit `size` bytes. Raises ArenaError, also if the machine or this
        process's control group has not that much memory left."""
        blocks = whole_blocks(size, block_bytes)
        require_memory(size, available_memory())
        try:
            memory = Memfd.create("muxserve-arena", blocks * block_bytes, reserved=True)
        except OSError as error:
            raise ArenaError("arena", f"{mebibytes(size)} of shared memory: {error.strerror}") from error
        return cls(memory, block_bytes, blocks)

    @classmethod
    def attach(cls, fd: int, descriptor: AttachArena) -> SharedArena:
        """Map another process's arena; the caller may close `fd` at once. Raises ArenaError."""
        try:
            memory = Memfd.attach(fd, descriptor.blocks * descriptor.block_bytes, reserved=True)
        except ValueError as error:
            raise ArenaError("arena", str(error)) from error
        return cls(memory, descriptor.block_bytes, descriptor.blocks)

    @property
    def fd(self) -> int:
        return self._memory.fd

    @property
    def data(self) -> NDArray[np.uint8]:
        """`[blocks * block_bytes]`, a writable view."""
        return self._memory.data

    def descriptor(self) -> AttachArena:
        return AttachArena(block_bytes=self.block_bytes, blocks=self.blocks)

    def tensor(self) -> Tensor:
        import torch  # executors only

        return torch.from_numpy(self._memory.data)

    def close(self) -> None:
        self._memory.close()


def whole_blocks(size: int, block_bytes: int) -> int:
    """Blocks that fit `size` bytes. Raises ArenaError if there is none, or more than an int32 numbers."""
    if block_bytes <= 0 or block_bytes % ALIGNMENT:
        raise ArenaError("block_bytes", f"{block_bytes} is not a positive multiple of {ALIGNMENT}")
    blocks = size // block_bytes
    if blocks < 1:
        raise ArenaError("arena", f"{size} bytes hold no block of {block_bytes} bytes")
    if blocks > np.iinfo(np.int32).max:
        raise ArenaError(
            "arena", f"{blocks} blocks are more than an int32 can number; make block_bytes larger"
        )
    return blocks


def require_memory(size: int, available: int) -> None:
    """Raises ArenaError if fewer than `size` bytes are available."""
    if size > available:
        raise ArenaError("arena", f"{mebibytes(size)} are asked for, {mebibytes(available)} are available")


def mebibytes(size: int) -> str:
    """For messages."""
    return f"{size / 2**20:,.0f} MiB"
