"""`Results` as tables: for the terminal, and as Markdown for `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.engine.lineup import OURS
from benchmarks.engine.plan import Cell
from benchmarks.engine.results import Results
from benchmarks.engine.rounds import best, chosen, rate
from benchmarks.engine.services import SERVICES

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: a title, a head and rows of as many texts."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a GitHub table under a heading."""
        lines = [self.head, ("---", *["---:"] * (len(self.head) - 1)), *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left")
        for number, column in enumerate(self.head):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def grids(results: Results) -> list[Grid]:
    """All tables."""
    made = [_machine(results), _speed(results)]
    if results.through is not None:
        made.append(_services(results))
    return [*made, _processes(results), _summary(results)]


def show(results: Results, console: Console) -> None:
    """Print all tables."""
    for grid in grids(results):
        console.print(grid.rich())


def markdown(results: Results) -> str:
    """All tables."""
    return "\n".join(grid.markdown() for grid in grids(results))


def _machine(results: Results) -> Grid:
    told = results.environment
    rows = [
        ("processor", f"{told['cpu']}, {len(told['cores'])} cores, {' '.join(told['flags'])}"),
        ("date", told["date"]),
        ("commit", told["commit"][:12] + " and changes" * bool(told["changed_files"])),
        ("load average, before and after", f"{told['load_before'][0]:.2f}, {told['load_after'][0]:.2f}"),
    ]
    for threads in sorted({one["threads"] for one in results.ceilings}):
        copy, read, products = (
            max(one[key] for one in results.ceilings if one["threads"] == threads) / 1e9
            for key in ("copy_bytes_per_s", "read_bytes_per_s", "matmul_flop_per_s")
        )
        what = f"copy {copy:.1f} GB/s (read and written), read {read:.1f} GB/s"
        whose = f"ceilings, {threads} thread{'s' * (threads > 1)}"
        rows.append((whose, f"{what}, bf16 products {products:.0f} GFLOP/s"))
    return Grid("Machine", ("", "what it is"), tuple(rows))


def _speed(results: Results) -> Grid:
    names = [OURS, *results.families]
    peers = list(dict.fromkeys(results.families.values()))
    head = ("tokens/s", *names, "of ceiling", *(f"ours over {peer}" for peer in peers))
    rows = []
    for cell in results.cells:
        ours = rate(results.done, OURS, cell)
        rows.append(
            (
                cell.name,
                *(_rate(results, name, cell) for name in names),
                f"{ours / results.ceiling(cell):.0%}",
                *(_over(ours, best(results.done, results.variants(peer), cell)) for peer in peers),
            )
        )
    return Grid("Engine alone", head, tuple(rows))


def _rate(results: Results, name: str, cell: Cell) -> str:
    found = chosen(results.done, name, cell)
    if not found:
        return ""
    mark = "" if found[0].calm else " ~"
    return f"{rate(results.done, name, cell):,.0f}{mark}"


def _over(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else ""


def _services(results: Results) -> Grid:
    through = results.through
    assert through is not None
    rows = [
        (
            f"decode tokens/s, {cell.batch} stream{'s' * (cell.batch > 1)}",
            f"{rate(through.done, OURS, cell):,.0f}",
            f"{rate(through.done, SERVICES, cell):,.0f}",
            f"{rate(through.done, SERVICES, cell) / rate(through.done, OURS, cell):.2f}",
        )
        for cell in through.streams
    ]
    ours, theirs = (1000 * through.first_s(name) for name in (OURS, SERVICES))
    first = f"first token of a lone request, {through.lone.context} tokens"
    rows.append((first, f"{ours:.1f} ms", f"{theirs:.1f} ms", f"{theirs - ours:+.1f} ms"))
    rows.append(("ready after", f"{_start(results, OURS):.1f} s", f"{through.ready_s:.1f} s", ""))
    return Grid("Through all services", ("", "engine alone", "services", "compared"), tuple(rows))


def _start(results: Results, name: str) -> float:
    return float(results.contenders[name]["ready_s"])


def _processes(results: Results) -> Grid:
    rows: list[tuple[str, ...]] = []
    for name, about in results.contenders.items():
        rows += _memory_rows(f"{name}, ready after {about['ready_s']:.1f} s", about["memory"])
    if results.through is not None:
        rows += _memory_rows("services", results.through.memory)
    head = ("process", "proportional", "resident", "of that shared")
    return Grid("Memory, MiB", head, tuple(rows))


def _memory_rows(whose: str, memory: dict[str, dict[str, int]]) -> Iterable[tuple[str, ...]]:
    for name, sizes in memory.items():
        if sizes:
            numbers = (f"{sizes[key] / MIB:,.0f}" for key in ("pss", "rss", "shared"))
            yield (f"{whose}: {name.rsplit(' (', 1)[0]}", *numbers)


def _summary(results: Results) -> Grid:
    rows: list[tuple[str, str]] = []
    for name, value in results.ratios().items():
        each = value.items() if isinstance(value, dict) else [("", value)]
        rows.append((name, ", ".join(f"{key}: {one}" if key else f"{one}" for key, one in each)))
    for cell in results.cells:
        outside = results.outside(cell)
        if outside is not None:
            rows.append((f"outside products and attention, {cell.name}", f"{outside:.1%}"))
    return Grid("Ratios (ours over theirs; ~ above: other programs were running)", ("", "value"), tuple(rows))
