"""The ranks of a mesh as torch.distributed sees them: NCCL on GPUs, gloo on CPU. One rank is one process.

They find each other through a memfd that their parent has made and passed to all: no port, no file, and
nothing that outlives them. What they say after that stays on this machine (`ENVIRONMENT`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muxserve.engine.parallel.errors import MeshBroken

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""What the parent adds to the environment of each rank. Without it, gloo and NCCL would listen on whatever
interface the machine's name resolves to. Data does not go this way between GPUs that reach each other."""

# torch 2.13 renames it and warns of the old name; 2.11 has the old one alone.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Collectives:
    """What the ranks do together, for one lane: its operations are ordered among themselves alone.

    All ranks must call the same operations with the same shapes in the same order. A rank that is alone in an
    operation longer than the timeout of `join`, or whose peer has gone, gets MeshBroken: from the call itself
    on CPU. On a GPU calls return before they are done: torch's watchdog ends the process then.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, ranks: int) -> None:
        self._group = group
        self.rank = rank
        self.ranks = ranks

    def reduce(self, x: Tensor) -> None:
        """Add up `x` over all ranks, in place, the same bits on each. Raises MeshBroken."""
        with _telling("all-reduce"):
            dist.all_reduce(x, group=self._group)

    def gather(self, part: Tensor, width: int, columns: int) -> Tensor:
        """Put the ranks' parts side by side: `[N, columns]`, new and contiguous, the same on each.

        part: `[N, width]`; the last rank's may have fewer columns. Raises MeshBroken.
        """
        rows = len(part)
        if part.shape[1] < width:
            part = torch.nn.functional.pad(part, (0, width - part.shape[1]))
        parts = part.new_empty(self.ranks, rows, width)
        with _telling("all-gather"):
            _all_gather(parts.view(-1, width), part.contiguous(), group=self._group)
        return parts.transpose(0, 1).reshape(rows, -1)[:, :columns].contiguous()


def join(
    rank: int, ranks: int, meeting: int, device: torch.device, *, lanes: int = 2, timeout: float = 30.0
) -> tuple[Collectives, ...]:
    """Meet the other ranks, and return each lane's collectives. Once in a process.

    meeting: descriptor of the memfd, empty at first, which stays open until `leave`. timeout: seconds that a
    rank waits for the others, here and in each operation. Raises MeshBroken if they do not all come.
    """
    wait = timedelta(seconds=timeout)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    with _telling("meeting the other ranks"):
        store = dist.FileStore(f"/proc/self/fd/{meeting}", ranks)  # type: ignore[attr-defined]
        store.set_timeout(wait)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=wait,
            device_id=device if gpu else None,
        )
        groups = [dist.new_group(timeout=wait) for _ in range(lanes)]
    return tuple(Collectives(group, rank, ranks) for group in groups)


def leave() -> None:
    """Undo `join`. Not after MeshBroken: it might wait for who has gone; such a process just ends."""
    dist.destroy_process_group()


@contextmanager
def _telling(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # torch has no type for these. Whatever it is, this rank is out of step with the others from now on.
        raise MeshBroken(doing, str(error).splitlines()[0]) from error
