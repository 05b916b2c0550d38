"""`muxserve models`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import typer

from muxserve.cli.calls import exit_code
from muxserve.client import Client, Model

COLUMNS = ("model", "state", "family", "dtype", "context", "chat")


def run(address: str, *, as_json: bool) -> int:
    """Print the served models; the exit code."""

    def command() -> None:
        with Client(address) as client:
            models = client.models()
        if as_json:
            typer.echo(json.dumps([_as_object(model) for model in models], indent=2))
            return
        from muxserve.cli.tables import print_table

        rows = [
            (
                model.name,
                _state(model),
                model.architecture,
                model.dtype,
                model.context_length or "",
                "yes" if model.chat else "no",
            )
            for model in models
        ]
        print_table("models", COLUMNS, rows)

    return exit_code(command)


def _as_object(model: Model) -> dict[str, Any]:
    """JSON has no infinity."""
    wait = None if math.isinf(model.expected_wait) else model.expected_wait
    return {**dataclasses.asdict(model), "expected_wait": wait}


def _state(model: Model) -> str:
    """In a few words."""
    if model.reason:
        return f"{model.state}: {model.reason}"
    if model.expected_wait == math.inf:
        return f"{model.state}: pinned models leave no room"
    return f"{model.state}: {model.expected_wait:.1f} s to wake" if model.expected_wait else str(model.state)
