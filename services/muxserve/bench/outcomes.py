"""What became of each request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a request ended."""

    OK = "ok"
    REFUSED = "refused"
    """The server would not take it (RESOURCE_EXHAUSTED, UNAVAILABLE; HTTP 429, 503)."""
    LATE = "late"
    """Its deadline passed."""
    FAILED = "failed"
    """Anything else that is an error."""
    UNFINISHED = "unfinished"
    """The run ended before it did."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request and its answer. Moments are seconds after the run's begin."""

    at: float
    """Intended arrival: every latency counts from here."""
    sent: float
    """When the generator really sent it."""
    model: str
    tenant: str
    priority: int
    prompt_tokens: int
    """As the server counted them, else as they were asked."""
    asked_tokens: int
    """To be generated."""
    tokens: int
    """That arrived."""
    first: float | None
    """Arrival of the first token. None: there was none."""
    end: float
    """Arrival of the last token, or of the error."""
    status: Status
    error: str = ""
    retry_after: float | None = None
    """Seconds that a refusal names."""

    @property
    def latency(self) -> float:
        """Seconds from intended arrival to the end."""
        return self.end - self.at

    @property
    def ttft(self) -> float | None:
        """Seconds from intended arrival to the first token."""
        return None if self.first is None else self.first - self.at

    @property
    def tpot(self) -> float | None:
        """Mean seconds between tokens after the first. None: there was no second one."""
        if self.first is None or self.tokens < 2 or self.status is not Status.OK:
            return None
        return (self.end - self.first) / (self.tokens - 1)
