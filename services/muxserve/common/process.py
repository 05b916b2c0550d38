"""How a service process runs: uvloop, logs, signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

import structlog
import uvloop


def run(main: Callable[[asyncio.Event], Awaitable[None]], name: str, log_level: str = "info") -> None:
    """Run `main(stop)` until it returns. SIGINT and SIGTERM set `stop`; `main` then has to come to an end."""
    configure_logs(name, log_level)

    # Modules stay; to look through them again and again would stop everything for 50 to 90 ms each time.
    gc.collect()
    gc.freeze()

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    uvloop.run(body())


def configure_logs(name: str, level: str = "info") -> None:
    """Structured logs on stderr: for people on a terminal, one JSON object a line elsewhere."""
    terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if terminal else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(service=name)
