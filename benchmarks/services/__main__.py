"""`python -m benchmarks.services`: what serving costs beyond the engine.

Real gateway, scheduler, Valkey, worker and client processes over executors that are simulated: a decode step
takes --step ms whatever its batch, asleep. Printed: CPU per token of each process, tokens/s, gaps between
pieces, and what a lone request's first token costs beyond its prefill. Raw numbers go to --out. (What is left
of the engine's own speed when both compete for the cores: `python -m benchmarks.engine --services`.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.services.engine import Pace
from benchmarks.services.processes import Services, services, smollm2

LIMIT = 120.0
"""Seconds that a client may take."""


def load(running: Services, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Run a client; its report, and the CPU seconds of every process meanwhile."""
    command = [sys.executable, "-m", "benchmarks.services.client", "--address", running.gateway]
    command += ["--streams", str(streams), "--tokens", str(tokens), "--rounds", str(rounds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None and client.stdout is not None
        client.stdout.readline()
        before = running.cpu()
        answer, _ = client.communicate("go\n", timeout=LIMIT)
    after = running.cpu()
    if client.returncode:
        raise SystemExit(f"the client failed with code {client.returncode}")
    report: dict[str, Any] = json.loads(answer)
    report["cpu"] = {name: after[name] - before[name] for name in before} | {"client": report["cpu_s"]}
    return report


def describe(report: dict[str, Any], pace: Pace) -> dict[str, Any]:
    """The numbers that matter."""
    requests = report["requests"]
    tokens = sum(count for r in requests for _, count in r["arrivals"])
    pieces = sum(len(r["arrivals"]) for r in requests)
    gaps = sorted(
        later[0] - earlier[0]
        for r in requests
        for earlier, later in zip(r["arrivals"], r["arrivals"][1:], strict=False)
    )
    leases = sorted(report["lease_gaps"])
    first = [r["arrivals"][0][0] for r in requests]
    decode = [
        (sum(c for _, c in r["arrivals"][1:]), r["arrivals"][-1][0] - r["arrivals"][0][0]) for r in requests
    ]
    cost = {name: 1e6 * seconds / tokens for name, seconds in report["cpu"].items()}
    ours = {name: us for name, us in cost.items() if not name.startswith("executor")}
    return {
        "tokens": tokens,
        "tokens_per_piece": tokens / pieces,
        "tokens_per_s": tokens / report["seconds"],
        "cpu_us_per_token": cost,
        "cpu_us_per_token_services": sum(ours.values()),
        "gap_ms": {
            "p50": 1e3 * gaps[len(gaps) // 2],
            "p99": 1e3 * gaps[int(0.99 * len(gaps))],
            "max": 1e3 * gaps[-1],
        },
        "lease_gap_ms": {"p50": 1e3 * leases[len(leases) // 2], "p90": 1e3 * leases[int(0.9 * len(leases))]},
        "ttft_over_prefill_ms": 1e3 * (statistics.median(first) - pace.prefill),
        "step_overhead_ms": 1e3 * (statistics.median(s / n for n, s in decode if n) - pace.step),
    }


def show(name: str, numbers: dict[str, Any]) -> None:
    """One line per figure."""
    cpu = ", ".join(f"{each} {us:.1f}" for each, us in numbers["cpu_us_per_token"].items())
    gaps = numbers["gap_ms"]
    print(
        f"{name}: {numbers['tokens_per_s']:.0f} tokens/s, {numbers['tokens_per_piece']:.2f} a piece; "
        f"gaps p50 {gaps['p50']:.1f} p99 {gaps['p99']:.1f} max {gaps['max']:.1f} ms; first token "
        f"{numbers['ttft_over_prefill_ms']:.1f} ms over prefill; {numbers['step_overhead_ms']:.2f} ms "
        f"over a step; {numbers['lease_gap_ms']['p50']:.2f} ms between leases (p50)\n"
        f"    CPU {numbers['cpu_us_per_token_services']:.1f} us/token: {cpu}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--step", type=float, default=24.0, help="ms of a decode step")
    parser.add_argument("--lone-step", type=float, default=6.0, help="ms of a decode step of a lone stream")
    parser.add_argument("--prefill", type=float, default=30.0, help="ms of a prefill job")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="per request")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="whose tokenizer and shape are used")
    parser.add_argument("--set", action="append", default=[], metavar="SERVICE.KEY=VALUE")
    parser.add_argument("--log-level", default="warning")
    parser.add_argument("--keep", type=Path, help="directory for logs (default: one that is removed)")
    parser.add_argument("--profile", default="", help="kind of service to run under cProfile; needs --keep")
    parser.add_argument("--only", choices=["lone", "many"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings: dict[str, dict[str, object]] = {}
    for each in options.set:
        name, value = each.split("=", 1)
        service, key = name.split(".", 1)
        settings.setdefault(service, {})[key] = value
    checkpoint = options.checkpoint or smollm2()
    result: dict[str, Any] = {
        "environment": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_before": os.getloadavg()[0],
        }
    }
    for name, streams, tokens, rounds, step in (
        ("lone", 1, 48, 10, options.lone_step),
        ("many", options.streams, options.tokens, options.rounds, options.step),
    ):
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            directory = options.keep or Path(scratch)
            gaps = directory / "gaps.json"
            pace = Pace(step / 1e3, options.prefill / 1e3, str(gaps))
            with services(
                pace, checkpoint, directory, settings, options.log_level, options.profile
            ) as running:
                report = load(running, streams, tokens, rounds)
            report["lease_gaps"] = json.loads(gaps.read_text())
        numbers = describe(report, pace)
        show(name, numbers)
        result[name] = {"pace": asdict(pace), **numbers, "report": report}
    if options.out:
        options.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
