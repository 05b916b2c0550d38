"""Work done by several processes at once: compiling, and checks whose speed is of no interest."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.gpu.context import Context

T = TypeVar("T")
R = TypeVar("R")

PROCESSES = 8
"""Each has a CUDA context of its own, of half a gigabyte."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """The device answers this process no more, since an item before this one."""


def side_by_side(
    context: Context, function: Callable[[T], R], items: Sequence[T]
) -> Iterator[tuple[T, R | Exception]]:
    """What `function`, of a module and not a method, makes of each item, as they are done; on a GPU by
    processes, which leave what they compile in Triton's cache. What is not done in time is not there."""
    if not context.cuda:
        for item in items:
            outcome = _tried(function, item)
            assert not isinstance(outcome, _Lost)
            yield item, outcome
        return
    waiting = list(items)
    while waiting:
        lost = []
        for item, outcome in _by_processes(context, function, waiting):
            if isinstance(outcome, _Lost):
                lost.append(item)  # by another process: at least one item was done in this one
            else:
                yield item, outcome
        waiting = lost


def _by_processes(
    context: Context, function: Callable[[T], R], items: Sequence[T]
) -> Iterator[tuple[T, R | Exception | _Lost]]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PROCESSES, len(items)), mp_context=spawn) as pool:
        begun = {pool.submit(_tried, function, item): item for item in items}
        try:
            for done in as_completed(begun, timeout=max(1.0, context.left())):
                yield begun[done], done.result()
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


_lost = False


def _tried(function: Callable[[T], R], item: T) -> R | Exception | _Lost:
    global _lost
    if _lost:
        return _Lost()
    try:
        return function(item)
    except Exception as error:  # one item's own; told as a string, for not every error can be pickled
        _lost = not _answers()
        return RuntimeError(f"{type(error).__name__}: {error}"[:2000])


def _answers() -> bool:
    """Whether the device still does: a fault of a kernel is every later call's too."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
