"""`DeviceWeights`: a model's weights in one allocation on a device, freed with their last user."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from muxserve.engine.checkpoint.canonical import manifest_bytes
from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError
from muxserve.engine.messages import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


class DeviceWeights:
    """Canonical tensors at the offsets of their manifest, in a DeviceMemory, whose rules hold.

    The owner creates it, has it filled once (`muxserve.engine.cuda.filling`, here or in a process that
    attaches for that), and gives `handle` and manifest to the executors. Several models may use one
    checkpoint: each but the first calls `retain`, each calls `release` when no executor maps the weights for
    it any more, and the last release frees the memory.
    """

    def __init__(self, memory: DeviceMemory, manifest: tuple[TensorEntry, ...]) -> None:
        self.memory = memory
        self.manifest = manifest
        self._users = 1

    @classmethod
    def create(
        cls, manifest: Iterable[TensorEntry], device: int = 0, runtime: CudaRuntime | None = None
    ) -> DeviceWeights:
        """Memory for these tensors, with one user. Raises DeviceError, nothing allocated."""
        entries = tuple(manifest)
        return cls(DeviceMemory.create(manifest_bytes(entries), "weights", device, runtime), entries)

    @classmethod
    def attach(
        cls,
        handle: bytes,
        manifest: Iterable[TensorEntry],
        device: int = 0,
        runtime: CudaRuntime | None = None,
    ) -> DeviceWeights:
        """Map another process's weights, with one user. Raises DeviceError."""
        entries = tuple(manifest)
        size = manifest_bytes(entries)
        return cls(DeviceMemory.attach(handle, size, "weights", device, runtime), entries)

    @property
    def handle(self) -> bytes:
        """What another process needs to attach, beside the manifest."""
        return self.memory.handle

    @property
    def users(self) -> int:
        """0: it is freed."""
        return self._users

    def retain(self) -> None:
        """One more user. Raises DeviceError if the last one has gone."""
        if not self._users:
            raise DeviceError("weights", "they are freed")
        self._users += 1

    def release(self) -> None:
        """One user less; the last one's frees, or unmaps, the memory. Raises DeviceError."""
        if not self._users:
            raise DeviceError("weights", "they are released more often than used")
        self._users -= 1
        if not self._users:
            self.memory.close()

    def tensors(self) -> dict[str, Tensor]:
        """By name, views in their own dtypes and shapes: not to be written to, nor used after the end."""
        return tensors_over(self.memory.tensor(), self.manifest)


def tensors_over(memory: Tensor, manifest: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """The tensors that a manifest lays out in uint8 `[bytes]`, on whatever device: no copy. Raises
    DeviceError for an entry that does not lie inside."""
    import torch  # executors only

    views = {}
    for entry in manifest:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        end = entry.offset + math.prod(entry.shape) * dtype.itemsize
        if entry.offset < 0 or end > len(memory):
            raise DeviceError("weights", f"{entry.name} ends at byte {end} of {len(memory)}")
        views[entry.name] = memory[entry.offset : end].view(dtype).view(entry.shape)
    return views
