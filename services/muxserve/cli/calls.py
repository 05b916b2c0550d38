"""What commands that call a service have in common: errors as one line, and interruption."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from muxserve.client import InvalidRequest, MuxServeError, Overloaded, Unavailable

FAILED = 1
INTERRUPTED = 130


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`; 0, or the code after saying on standard error what went wrong."""
    try:
        command()
        sys.stdout.flush()
    except MuxServeError as error:
        typer.echo(f"error: {describe(error)}", err=True)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return 0


def describe(error: MuxServeError) -> str:
    """The error in one line, with the field at fault, when to retry, and the request's id."""
    text = " ".join(error.message.split())
    if isinstance(error, InvalidRequest) and error.field and error.field not in text:
        text = f"{error.field}: {text}"
    if isinstance(error, Overloaded | Unavailable) and error.retry_after is not None:
        text += f"; try again in {error.retry_after:g} s"
    return f"{text} (request {error.request_id})" if error.request_id else text
