"""The summary: what was found, section by section, and last whether it is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.verdicts import verdicts

Found = dict[str, Any]


def summary(results: Found) -> str:
    """A few lines a section, then the verdicts."""
    sections: dict[str, Found] = results["sections"]
    lines = [f"benchmarks.gpu: {results.get('seconds', 0):.0f} s on {results['device']}"]
    if results["tiny"]:
        lines.append("TINY SHAPES: no figure here means anything")
    if results.get("cut_off") or results.get("error"):
        lines.append(f"CUT OFF {results.get('error', '')}")
    for name, section in sections.items():
        lines += ["", f"{name} ({section.get('seconds', 0):.0f} s)", *_body(name, section)]
    if not results["tiny"]:
        lines += ["", "asked for", *verdicts({n: each.get("found", {}) for n, each in sections.items()})]
    return "\n".join(lines)


def _body(name: str, section: Found) -> Iterator[str]:
    if "skipped" in section:
        yield f"  skipped: no {', '.join(section['skipped'])}"
    found = section.get("found", {})
    try:
        for line in LINES.get(name, _plain)(found) if found else ():
            yield f"  {line}"
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
        f"copy {tera(ceilings['copy_bytes_per_s'])}B/s, read {tera(ceilings['read_bytes_per_s'])}B/s,"
        f" bf16 products {tera(ceilings['matmul_flop_per_s'])}FLOP/s,"
        f" launch {1e6 * ceilings['launch_s']:.1f} µs, graph node {1e6 * ceilings['graph_node_s']:.1f} µs"
    )


def _kernels(found: Found) -> Iterator[str]:
    worst: dict[str, float] = {}
    for case in found["cases"]:
        for kernel, error in case["errors"].items():
            value, bound = error["error"], error["bound"]
            part = math.inf if value is None else 0.0 if not value else value / bound if bound else math.inf
            worst[kernel] = max(part, worst.get(kernel, 0.0))
    yield f"{len(found['cases'])} cases; largest error as a part of its bound:"
    yield ", ".join(f"{kernel} {part:.2f}" for kernel, part in worst.items())
    yield from (f"WRONG: {failure}" for failure in found["failed"])
    if found.get("not_run"):
        yield f"not run: {', '.join(found['not_run'])}"


def _ipc(found: Found) -> Iterator[str]:
    yield (
        f"written by one process, read by another: {found['right']}; attach {milli(found['attach_s'])};"
        f" owner's death noticed after {milli(found['death_noticed_s'])};"
        f" not freed: {found['unfreed_bytes']} bytes, after a death {found['unfreed_after_death_bytes']}"
    )


def _attention(found: Found) -> Iterator[str]:
    for one in found["decode"]:
        yield (
            f"{one['title']:28} {tera(one['bytes_per_s'])}B/s, {part(one['of_copy'])} of copy,"
            f" {part(one['vs_contiguous'])} of contiguous; {_layouts(one)}"
        )
    for one in found["prefill"]:
        yield (
            f"{one['title']:28} {tera(one['flop_per_s'])}FLOP/s, {part(one['of_matmul'])} of products,"
            f" {part(one['vs_contiguous'])} of contiguous; {_layouts(one)}"
        )
    yield from (f"NOT COMPILED: {one}" for one in found["not_compiled"])
    if found["left_out"]:
        yield f"left out, for lack of time: {'; '.join(found['left_out'])}"


def _layouts(one: Found) -> str:
    return "µs: " + ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in one["seconds"].items())


def _models(found: Found) -> Iterator[str]:
    for name, shape in found["shapes"].items():
        for way, measured in (("", shape), (", eager", shape.get("eager", {}))):
            for one in measured.get("decode", []):
                yield f"{name}{way}, decode {one['batch']} x {one['context']:,}: {_step(one)}"
                yield from _profile(one)
            for one in measured.get("prefill", []):
                yield (
                    f"{name}{way}, prefill {one['prompts']} x {one['length']:,}: {milli(one['job_s'])},"
                    f" {one['tokens_per_s']:,.0f} tokens/s, {part(one['of_products'])} of products"
                    f" ({part(one['of_products_and_attention'])} with attention's)"
                )
                yield from _profile(one)
        yield f"{name}, products alone: " + ", ".join(
            f"{what} {milli(seconds)}" for what, seconds in shape.get("products", {}).items()
        )
    if found["left_out"]:
        yield f"left out, for lack of time: {'; '.join(found['left_out'])}"


def _step(one: Found) -> str:
    if "does_not_fit" in one:
        return "does not fit"
    return (
        f"{milli(one['step_s'])} a step ({milli(one['median_step_s'])} within a job),"
        f" {one['tokens_per_s']:,.0f} tokens/s, {part(one['of_bandwidth'])} of the bandwidth limit"
    )


def _profile(one: Found) -> Iterator[str]:
    profile = one.get("profile") or {}
    for kernel in profile.get("kernels", [])[:6]:
        yield f"    {kernel['us'] / profile['total_us']:5.1%} {kernel['count']:5} {kernel['name'][:70]}"


def _multiplexing(found: Found) -> Iterator[str]:
    for point in found["points"]:
        how = {
            "turns": f"turns of {point.get('steps')} steps",
            "shares": f"{point['prefill_share']:.0%} prefill",
        }
        kinds = [
            f"{kind} {point[kind]['tokens_per_s']:,.0f} tokens/s, {milli(point[kind]['latency_s'])}"
            for kind in ("decode", "prefill")
            if kind in point
        ]
        yield f"{how.get(point['way'], point['way']):18} {'; '.join(kinds)}; work {number(point.get('work'))}"
    for key in ("best_share", "gain_over_turns", "gain_over_streams_at_their_latency"):
        yield f"{key}: {number(found.get(key))}"
    yield from (f"{key}: {value}" for key, value in found.items() if key.startswith("no_"))


def _memory(found: Found) -> Iterator[str]:
    for index, one in enumerate(found["models"]):
        extra, running = one["beyond_weights"] / 2**20, one["by_running"] / 2**20
        yield f"model {index}: {extra:,.0f} MiB beyond its weights, {running:,.0f} MiB of it by running"


def _parity(found: Found) -> Iterator[str]:
    yield f"beside the {found['reference']}:"
    for one in found["cases"]:
        yield f"{one['family']} {one['dtype']} {one['head_dim']}: {one['equal']} of {one['tokens']} tokens"
    yield from (f"WRONG: {failure}" for failure in found["failed"])


def _peer(found: Found) -> Iterator[str]:
    yield f"transformers {found['transformers']}, {found['shape']}"
    for one in found["workloads"]:
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in one.get("tokens_per_s", {}).items())
        yield f"{one['name']}: tokens/s {rates}; ours over theirs {number(one.get('ours_over_theirs'))}"
        yield from (f"ERROR {name}: {error[-300:]}" for name, error in one.get("errors", {}).items())
    if "their_error" in found:
        yield f"ERROR theirs: {found['their_error'][-300:]}"


def _service(found: Found) -> Iterator[str]:
    for way, one in found["policies"].items():
        if "ended" not in one:
            yield f"{way}: {one.get('error', 'cut off')[-600:]}"
            continue
        yield (
            f"{way}: {one['ended']} of {found['requests']} requests, {one['tokens_per_s']:,.0f} tokens/s,"
            f" {part(one['kept_slo'])} within the SLO, first token {milli(one['first_s'].get('p50'))},"
            f" 99% within {milli(one['first_s'].get('p99'))}, ready after {one['ready_s']:.0f} s"
        )


def _tune(found: Found) -> Iterator[str]:
    yield from found["entries"]
    if found["left_out"]:
        yield f"left out: {', '.join(found['left_out'])}"


LINES: dict[str, Callable[[Found], Iterator[str]]] = {
    "environment": _environment,
    "kernels": _kernels,
    "ipc": _ipc,
    "attention": _attention,
    "models": _models,
    "multiplexing": _multiplexing,
    "memory": _memory,
    "parity": _parity,
    "peer": _peer,
    "service": _service,
    "tune": _tune,
}


def tera(value: float | None) -> str:
    """With its unit's prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value is not None and value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{number(value)} "


def part(value: float | None) -> str:
    """In percent."""
    return "?" if value is None or math.isnan(value) else f"{value:.0%}"


def milli(seconds: float | None) -> str:
    """In milliseconds."""
    return "? ms" if seconds is None or math.isnan(seconds) else f"{1000 * seconds:.3g} ms"


def number(value: float | None) -> str:
    """Three digits of it."""
    return "?" if value is None or math.isnan(value) else f"{value:.3g}"
