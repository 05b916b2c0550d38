"""Options that several groups of commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_ADDRESS = "127.0.0.1:8600"
DEFAULT_ADMIN = "127.0.0.1:8601"

Admin = Annotated[str, typer.Option(envvar="MUXSERVE_ADMIN", help="host:port of the placement service.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
