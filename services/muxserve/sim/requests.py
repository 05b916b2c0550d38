"""`Request`: a request on its way through the simulation."""

from __future__ import annotations

from dataclasses import dataclass, field

from muxserve.scheduler.policy.interface import Running, Waiting

_NO_WAITING = Waiting(0, 0.0, 0)
_NO_RUNNING = Running(0, 0.0, 0, 0, 0)


@dataclass(slots=True, eq=False)
class Request:
    """Times in seconds of the simulation; -1: not yet."""

    number: int
    model: str
    arrival: float
    prompt: int
    output: int
    emitted: int = 0
    groups: int = 0
    """Block groups that it holds."""
    open: bool = False
    job: object = None
    """The job that it is in."""
    first: float = -1.0
    """When its first token came."""
    finish: float = -1.0
    refused: bool = False
    waiting: Waiting = field(default_factory=lambda: _NO_WAITING)
    """What the policy sees while its tokens are not all computed."""
    running: Running = field(default_factory=lambda: _NO_RUNNING)
    """What it sees from then on."""

    @property
    def known(self) -> int:
        """Tokens of the prompt and those sampled."""
        return self.prompt + self.emitted

    @property
    def limit(self) -> int:
        """Tokens at which it is finished."""
        return self.prompt + self.output

    def begin_running(self) -> None:
        """All tokens known are computed but the last."""
        self.running = Running(
            self.number, self.arrival, self.known, self.limit, self.groups, prompt=self.prompt
        )

    def recompute(self) -> None:
        """Its blocks are gone: it waits for all known tokens to be computed again."""
        self.groups, self.open, self.job = 0, False, None
        self.waiting = Waiting(
            self.number, self.arrival, self.known, limit=self.limit, emitted=self.emitted > 0
        )
