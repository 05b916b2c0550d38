"""`muxserve models`."""

from __future__ import annotations

import dataclasses
import json

import typer

from muxserve.cli.calls import exit_code
from muxserve.client import Client

COLUMNS = ("model", "state", "family", "dtype", "context", "chat")


def run(address: str, *, as_json: bool) -> int:
    """Print the served models; the exit code."""

    def command() -> None:
        with Client(address) as client:
            models = client.models()
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(model) for model in models], indent=2))
            return
        from muxserve.cli.tables import print_table

        rows = [
            (
                model.name,
                f"{model.state}: {model.reason}" if model.reason else str(model.state),
                model.architecture,
                model.dtype,
                model.context_length or "",
                "yes" if model.chat else "no",
            )
            for model in models
        ]
        print_table("models", COLUMNS, rows)

    return exit_code(command)
