"""`muxserve chat`: one answer, or a conversation."""

from __future__ import annotations

import sys

import typer

from muxserve.cli.calls import describe, exit_code
from muxserve.cli.generate import write
from muxserve.client import Arguments, Client, Message, MuxServeError


def run(address: str, model: str, message: str | None, system: str | None, arguments: Arguments) -> int:
    """Answer `message`, or talk until the input ends; the exit code."""
    opening = [Message("system", system)] if system else []

    def command() -> None:
        with Client(address) as client:
            if message is None:
                _converse(client, model, opening, arguments)
            else:
                _answer(client, model, [*opening, Message("user", message)], arguments)

    return exit_code(command)


def _converse(client: Client, model: str, opening: list[Message], arguments: Arguments) -> None:
    client.model(model)
    turns = list(opening)
    if sys.stdin.isatty():
        # Imported for what it does to input(): editing and history.
        import readline  # noqa: F401

        typer.echo(f"Talking to {model}. /new starts over, /exit or Ctrl-D ends.", err=True)
    while (text := _read()) not in (None, "/exit"):
        if text == "/new":
            turns = list(opening)
        elif text:
            turns.append(Message("user", text))
            if answer := _try_answer(client, model, turns, arguments):
                turns.append(answer)
            else:
                turns.pop()


def _read() -> str | None:
    """A line of the user's, None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            typer.echo("", err=True)
        return None


def _try_answer(client: Client, model: str, turns: list[Message], arguments: Arguments) -> Message | None:
    """The answer; None if there is none, and the conversation can go on without it."""
    try:
        return _answer(client, model, turns, arguments)
    except MuxServeError as error:
        typer.echo(f"error: {describe(error)}", err=True)
    except KeyboardInterrupt:
        typer.echo("", err=True)
    return None


def _answer(client: Client, model: str, turns: list[Message], arguments: Arguments) -> Message:
    with client.chat_stream(model, turns, **arguments) as stream:
        return Message("assistant", write(stream))
