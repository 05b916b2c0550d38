"""When a call is tried again."""

from __future__ import annotations

import math
import random

from .errors import MuxServeError, Unavailable
from .options import ClientOptions

_FIRST_DELAY = 0.25
_LONGEST_DELAY = 8.0
_LONGEST_RETRY_AFTER = 60.0


class Attempts:
    """The attempts of one call: at most `1 + max_retries`, within its timeout.

    Pure but for the jitter: the clock is passed in, in seconds, and is the caller's choice.
    """

    def __init__(
        self, options: ClientOptions, timeout: float | None, now: float, *, retry: bool = True
    ) -> None:
        self._end = now + (options.timeout if timeout is None else timeout)
        self._left = options.max_retries if retry else 0
        self._connect_timeout = options.connect_timeout
        self._delay = _FIRST_DELAY

    def remaining(self, now: float) -> float | None:
        """Seconds left for the call. None: no limit."""
        return None if math.isinf(self._end) else max(0.0, self._end - now)

    def connect_timeout(self, now: float) -> float:
        """Seconds that may be spent waiting for a connection."""
        return max(0.0, min(self._connect_timeout, self._end - now))

    def next_delay(self, error: MuxServeError, now: float) -> float | None:
        """Seconds to wait before the next attempt; None: `error` is the call's result.

        The service's own `retry_after` is kept to, unless it is unreasonably long; else the delay doubles
        each time, with up to half of it taken off at random so that clients do not come back in step.
        """
        if self._left == 0 or not isinstance(error, Unavailable):
            return None
        if error.retry_after is not None:
            delay = error.retry_after
        else:
            delay = self._delay * random.uniform(0.5, 1.0)
            self._delay = min(self._delay * 2, _LONGEST_DELAY)
        if delay > _LONGEST_RETRY_AFTER or (now + delay >= self._end and not math.isinf(self._end)):
            return None
        self._left -= 1
        return delay
