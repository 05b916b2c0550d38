"""`muxserve quota`: block quotas."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import datetime

import typer

from muxserve.cli.calls import FAILED, exit_code
from muxserve.client import AdminClient, QuotaRevision, Quotas, QuotaState

POLL = 0.3
"""Seconds between looks at what became of a change."""


def show(admin: str, unit: str, *, as_json: bool) -> int:
    """Print the quotas of `unit`; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            quotas = client.quotas(unit)
        if as_json:
            typer.echo(json.dumps({**dataclasses.asdict(quotas), "state": quotas.state}, indent=2))
        else:
            _print(quotas)

    return exit_code(command)


def set_quota(admin: str, model: str, blocks: int, unit: str, if_revision: int | None, follow: float) -> int:
    """Set a quota and print all of them; the exit code. `follow`: seconds to wait until it is applied; if it
    is not by then, or a newer revision came first, the exit code is not 0."""
    code = 0

    def command() -> None:
        nonlocal code
        with AdminClient(admin) as client:
            quotas = client.set_quota(model, blocks, unit=unit, expected_revision=if_revision)
            if follow:
                state = _follow(client, quotas, time.monotonic() + follow)
                code = 0 if state is QuotaState.APPLIED else FAILED
                quotas = client.quotas(quotas.unit)
            _print(quotas)

    return exit_code(command) or code


def _follow(client: AdminClient, quotas: Quotas, deadline: float) -> QuotaState:
    """Say whatever becomes of `quotas`, until it is applied or stale, or until `deadline`."""
    said = None
    while True:
        found = next((r for r in client.quotas(quotas.unit).history if r.revision == quotas.revision), None)
        state = found.state if found else QuotaState.STALE  # so old that it is no longer kept
        line = f"revision {quotas.revision}: {_outcome(found) if found else state}"
        if line != said:
            typer.echo(line)
            said = line
        if state in (QuotaState.APPLIED, QuotaState.STALE) or time.monotonic() >= deadline:
            return state
        time.sleep(POLL)


def _outcome(revision: QuotaRevision) -> str:
    above = f" (above it: {', '.join(revision.above)})" if revision.above else ""
    return f"{revision.state}{above}"


def _print(quotas: Quotas) -> None:
    from muxserve.cli.tables import print_table

    title = f"{quotas.unit} (revision {quotas.revision}, {quotas.state})"
    if quotas.use:
        rows = [
            (model, quotas.blocks.get(model, ""), use.held, use.borrowed, use.cached)
            for model, use in sorted(quotas.use.items())
        ]
        print_table(title, ("model", "quota", "held", "borrowed", "cached"), rows)
    else:
        print_table(title, ("model", "quota"), sorted(quotas.blocks.items()))
    if quotas.history:
        changes = [
            (
                each.revision,
                datetime.fromtimestamp(each.asked).isoformat(" ", "seconds"),
                each.author,
                _outcome(each),
                ", ".join(f"{model} {blocks}" for model, blocks in sorted(each.blocks.items())),
            )
            for each in quotas.history
        ]
        print_table("changes", ("revision", "asked", "by", "outcome", "quotas"), changes)
