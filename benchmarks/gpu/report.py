"""The summary: what was asked for, what was found, and whether that is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

Found = dict[str, Any]


def summary(results: Found) -> str:
    """A few lines a section; what failed, and why, last but for the verdicts."""
    sections: dict[str, Found] = results["sections"]
    lines = [f"benchmarks.gpu: {results.get('seconds', 0):.0f} s on {results['device']}"]
    if results["tiny"]:
        lines.append("TINY SHAPES: no figure here means anything")
    for name, section in sections.items():
        lines += ["", f"{name} ({section.get('seconds', 0):.0f} s)", *_body(name, section)]
    lines += ["", "verdicts", *verdicts(results)]
    return "\n".join(lines)


def _body(name: str, section: Found) -> Iterator[str]:
    if "skipped" in section:
        yield f"  skipped: {', '.join(section['skipped'])} missing"
    found = section.get("found", {})
    try:
        yield from (f"  {line}" for line in LINES.get(name, _plain)(found))
    except (KeyError, TypeError, ValueError, IndexError) as error:  # it was cut off on its way
        yield f"  incomplete: {type(error).__name__} {error}"
    if "error" in section:
        yield "  FAILED"
        yield from (f"    {line}" for line in section["error"].strip().split("\n")[-6:])


def _plain(found: Found) -> Iterator[str]:
    for key, value in found.items():
        if isinstance(value, str | int | float):
            yield f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}"


def _environment(found: Found) -> Iterator[str]:
    device, driver = found.get("device", {}), found.get("gpu", {}).get("driver_version", "?")
    yield f"{device.get('name', 'no GPU')}, driver {driver}, CUDA {device.get('cuda')}"
    ceilings = found["ceilings"]
    yield (
        f"copy {_tera(ceilings['copy_bytes_per_s'])}B/s, read {_tera(ceilings['read_bytes_per_s'])}B/s,"
        f" bf16 products {_tera(ceilings['matmul_flop_per_s'])}FLOP/s,"
        f" launch {1e6 * ceilings['launch_s']:.1f} µs, graph node {1e6 * ceilings['graph_node_s']:.1f} µs"
    )


def _kernels(found: Found) -> Iterator[str]:
    worst: dict[str, float] = {}
    for case in found["cases"]:
        for kernel, error in case["errors"].items():
            part = math.inf if error["error"] is None else _ratio(error["error"], error["bound"])
            worst[kernel] = max(part, worst.get(kernel, 0.0))
    yield f"{len(found['cases'])} cases; largest error as a part of its bound:"
    yield ", ".join(f"{kernel} {part:.2f}" for kernel, part in worst.items())
    for failure in found["failed"]:
        yield f"WRONG: {failure}"
    if found["not_run"]:
        yield f"not run: {', '.join(found['not_run'])}"


def _ratio(a: float, b: float) -> float:
    return (0.0 if a == 0 else math.inf) if b == 0 else a / b


def _ipc(found: Found) -> Iterator[str]:
    yield (
        f"shared and read back: {found['right']}; attach {1e3 * found['attach_s']:.1f} ms;"
        f" owner's death noticed after {1e3 * found['death_noticed_s']:.1f} ms;"
        f" not freed {found['unfreed_bytes']} and {found['unfreed_after_death_bytes']} bytes"
    )


def _attention(found: Found) -> Iterator[str]:
    for one in found["decode"]:
        yield (
            f"{one['title']:32} {_tera(one['bytes_per_s'])}B/s, {_part(one['of_copy'])} of copy,"
            f" {_part(one['vs_contiguous'])} of contiguous; {_layouts(one)}"
        )
    for one in found["prefill"]:
        yield (
            f"{one['title']:32} {_tera(one['flop_per_s'])}FLOP/s, {_part(one['of_matmul'])} of products,"
            f" {_part(one['vs_contiguous'])} of contiguous; {_layouts(one)}"
        )
    for one in found["not_compiled"]:
        yield f"NOT COMPILED: {one}"
    if found["left_out"]:
        yield f"left out, for lack of time: {'; '.join(found['left_out'])}"


def _layouts(one: Found) -> str:
    return ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in one["seconds"].items()) + " µs"


def _tera(value: float | None) -> str:
    """With its unit's prefix."""
    if value is None:
        return "? "
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _part(value: float | None) -> str:
    return "?" if value is None or math.isnan(value) else f"{value:.0%}"


LINES: dict[str, Callable[[Found], Iterator[str]]] = {
    "environment": _environment,
    "kernels": _kernels,
    "ipc": _ipc,
    "attention": _attention,
}


def verdicts(results: Found) -> Iterator[str]:
    """What the issue asks for, one a line; "?" where it was not measured."""
    sections = {name: each.get("found", {}) for name, each in results["sections"].items()}
    for name, least, value in _wanted(sections):
        if value is None or math.isnan(value):
            yield f"  ?     {name} (at least {least})"
        else:
            yield f"  {'yes' if value >= least else 'NO':5} {name}: {value:.3g} (at least {least})"


def _wanted(sections: dict[str, Found]) -> Iterator[tuple[str, float, float | None]]:
    decode = sections.get("attention", {}).get("decode", [])
    ratios = [one["vs_contiguous"] for one in decode if one["kv_bytes"] * one["layers"] > 0]
    yield "decode attention on blocks over contiguous, the median shape", 0.9, _median(ratios)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
