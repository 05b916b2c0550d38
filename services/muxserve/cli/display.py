"""What `up` shows while a deployment starts: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from muxserve.cli.readiness import ModelProgress, Progress
from muxserve.client import ModelState

SERVICE_LABEL = {True: "up", False: "starting"}


class Display(Protocol):
    """Shows progress between `__enter__` and `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """The state is now `progress`."""


def make_display(console: Console, services: Sequence[str], models: Sequence[str]) -> Display:
    """A display that suits the console."""
    return LiveDisplay(console, services, models) if console.is_terminal else LineDisplay(console)


def describe(model: ModelProgress) -> str:
    """A model's state in a few words."""
    if model.state is ModelState.READY:
        return f"ready on {model.worker}"
    where = f"{model.state} on {model.worker}" if model.worker else str(model.state)
    return where if model.reason in ("", str(model.state)) else f"{where}: {model.reason}"


class LineDisplay:
    """A line per change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """The state is now `progress`."""
        lines = dict.fromkeys(sorted(progress.services), "up")
        lines |= {f"model {name}": describe(model) for name, model in progress.models.items()}
        for subject, state in lines.items():
            if self._shown.get(subject) != state:
                self._console.print(f"{subject}: {state}", markup=False)
        self._shown = lines


class LiveDisplay:
    """A table that changes in place."""

    def __init__(self, console: Console, services: Sequence[str], models: Sequence[str]) -> None:
        self._services = services
        self._models = models
        self._spinner = Spinner("dots")
        self._live = Live(self._table(Progress()), console=console, refresh_per_second=10, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """The state is now `progress`."""
        self._live.update(self._table(progress))

    def _table(self, progress: Progress) -> Table:
        table = Table.grid(padding=(0, 2))
        for service in self._services:
            up = service in progress.services
            table.add_row(self._mark(up), Text(service), Text(SERVICE_LABEL[up], "dim"))
        for name in self._models:
            model = progress.models.get(name, ModelProgress(ModelState.LOADING, "", "waiting", ""))
            style = "red" if model.state is ModelState.FAILED else "dim"
            table.add_row(
                self._mark(model.state.served),
                Text(f"model {name}"),
                Text(describe(model), style),
            )
        return table

    def _mark(self, done: bool) -> Text | Spinner:
        return Text("✓", "green") if done else self._spinner
