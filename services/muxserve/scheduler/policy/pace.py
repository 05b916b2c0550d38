"""How fast prefill jobs run, learned from those that ended."""

from __future__ import annotations

from muxserve.scheduler.policy.interface import Event, Finished, PolicyOptions

FIRST = 128
"""Tokens of a model's first prefill jobs, before anything is known."""
LEAST = 32
"""Smaller jobs waste more than they give back."""
MEMORY = 0.5
"""Weight of the newest observation."""
SLOW = 1000.0
"""Tokens per second that are assumed before anything is known."""


class PrefillPace:
    """Tokens that a prefill job of a model may have, so that it takes about `chunk_seconds`."""

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options
        self._speed: dict[str, float] = {}

    def observe(self, event: Event) -> None:
        """Learn from a prefill job. Small ones say little about speed: their overhead dominates."""
        if (
            isinstance(event, Finished)
            or event.kind != "prefill"
            or event.tokens < LEAST
            or event.seconds <= 0
        ):
            return
        speed = event.tokens / event.seconds
        before = self._speed.get(event.model, speed)
        self._speed[event.model] = before + MEMORY * (speed - before)

    def budget(self, model: str, seconds: float | None = None) -> int:
        """Prompt tokens that the next prefill job of `model` may have, to take `seconds` or what the options
        say."""
        speed = self._speed.get(model)
        aim = self._options.chunk_seconds if seconds is None else seconds
        wanted = FIRST if speed is None else int(speed * aim)
        return max(1, min(self._options.chunk_tokens, max(LEAST, wanted)))

    def seconds(self, model: str, tokens: int) -> float:
        """How long a prefill job of so many tokens takes, about."""
        return tokens / self._speed.get(model, SLOW)
