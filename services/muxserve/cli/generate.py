"""`muxserve generate`: a completion on standard output."""

from __future__ import annotations

import sys

from muxserve.cli.calls import exit_code
from muxserve.client import Arguments, Client, CompletionStream


def run(address: str, model: str, prompt: str, arguments: Arguments) -> int:
    """Print the completion of `prompt` as it appears, then a newline; the exit code."""

    def command() -> None:
        with Client(address) as client, client.stream(model, prompt, **arguments) as stream:
            write(stream)

    return exit_code(command)


def write(stream: CompletionStream) -> str:
    """Write the text of `stream` to standard output as it appears, then a newline; the text."""
    pieces = []
    for chunk in stream:
        pieces.append(chunk.text)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(pieces)
