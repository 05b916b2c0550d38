"""`muxserve quota`: block quotas."""

from __future__ import annotations

import dataclasses
import json

import typer

from muxserve.cli.calls import exit_code
from muxserve.client import AdminClient, Quotas


def show(admin: str, unit: str, *, as_json: bool) -> int:
    """Print the quotas of `unit`; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            quotas = client.quotas(unit)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(quotas), indent=2))
        else:
            _print(quotas)

    return exit_code(command)


def set_quota(admin: str, model: str, blocks: int, unit: str, revision: int | None) -> int:
    """Set a quota and print all of them; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            _print(client.set_quota(model, blocks, unit=unit, expected_revision=revision))

    return exit_code(command)


def _print(quotas: Quotas) -> None:
    from muxserve.cli.tables import print_table

    print_table(
        f"{quotas.unit} (revision {quotas.revision})", ("model", "blocks"), sorted(quotas.blocks.items())
    )
