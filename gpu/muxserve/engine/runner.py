"""`Runner`: what an executor runs jobs with, on cores or on a GPU. `RunningJob`: a job that was started."""

from __future__ import annotations

from typing import Protocol

from muxserve.engine.messages import AddModel, AttachArena, DecodeJob, PrefillJob, Shares, Step


class RunningJob(Protocol):
    """A job from its start until its last step was collected. No call blocks."""

    @property
    def number(self) -> int:
        """Of its message."""

    @property
    def model(self) -> str: ...

    @property
    def ended(self) -> bool:
        """Nothing of it runs any more; there may be steps left to collect."""

    @property
    def nears_end(self) -> bool:
        """Whether what is left of a prefill job takes about its message's `lead`, or less. False where that
        is not known."""

    @property
    def steps(self) -> int:
        """Steps computed so far."""

    @property
    def seconds(self) -> float:
        """How long it took, once it has ended."""

    @property
    def error(self) -> Exception | None:
        """Why it ended early, if it did so for a fault."""

    def stop(self) -> None:
        """End after the step that runs."""

    def use_shares(self, shares: Shares) -> None:
        """Go on with these, from the next step on at the latest."""

    def collect(self) -> list[Step]:
        """Steps that were computed since the last call."""


class Runner(Protocol):
    """Runs jobs of any of its models over memory that the worker owns; `attach` comes first.

    One job of each kind may run at a time: a prefill job beside a decode job, unless the process is for one
    kind. Calls come from one thread. Descriptors that are handed over are the runner's to close, also if a
    call fails.
    """

    @property
    def device(self) -> str:
        """ "cpu", or the GPU's name."""

    @property
    def partition(self) -> str:
        """How compute shares are made: "threads", "none", "green_contexts" or "mps"."""

    def fileno(self) -> int:
        """Readable when a step, or a job, has ended since `acknowledge`."""

    def acknowledge(self) -> None:
        """To be called before collecting: what ends from now on makes `fileno` readable again."""

    def attach(self, command: AttachArena, descriptors: list[int]) -> None:
        """Map the arena. Raises ArenaError."""

    def add(self, command: AddModel, descriptors: list[int]) -> None:
        """Map a model. One of that name that is there is replaced. Raises an Exception if it cannot be run:
        the others stay as they are."""

    def remove(self, model: str) -> None:
        """Let go of the memory of a model that no job uses. Unknown names are ignored."""

    def start(self, message: PrefillJob | DecodeJob) -> RunningJob:
        """Start a job; the one of its kind before it has ended. Raises an Exception if it cannot be started:
        KeyError for an unknown model."""

    def close(self) -> None:
        """Give everything back; no job may be running."""
