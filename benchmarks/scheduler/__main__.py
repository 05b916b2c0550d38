"""What a decision costs: `python -m benchmarks.scheduler` prints JSON, microseconds per decision.

A unit with 16 models and 1,000 sequences that decode, 32 prompts that wait, a prefill job and a decode job
that run. Every decision sees a snapshot that is new to it, so nothing is remembered from the one before but
what policies remember.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from muxserve.scheduler.policy import POLICIES, create
from muxserve.scheduler.policy.interface import (
    JobEnded,
    ModelSnapshot,
    PolicyOptions,
    Pool,
    Running,
    RunningJob,
    Snapshot,
    Waiting,
)

TOTAL = 4_000_000


def snapshot(models: int, running: int, waiting: int, decodes: int, turn: int) -> Snapshot:
    """A busy unit; `decodes` models have a lease."""
    made = []
    for index in range(models):
        name = f"model-{index:02}"
        in_job = index < decodes
        sequences = tuple(
            Running(n, float(n), 300 + turn % 200, 900, 40, in_job, True, prompt=160)
            for n in range(index, running, models)
        )
        queue = tuple(
            Waiting(running + n, 1000.0 + n, 160, limit=460, tenant=f"tenant-{n % 4}", deadline=1e9)
            for n in range(index, waiting, models)
        )
        held = 90 * sum(r.groups for r in sequences)
        made.append(ModelSnapshot(name, 21, 90, 64, TOTAL // models, queue, sequences, held))
    jobs = [RunningJob(1, "prefill", "model-00")]
    jobs += [RunningJob(2 + n, "decode", f"model-{n:02}") for n in range(decodes)]
    used = sum(m.held for m in made)
    return Snapshot(tuple(made), Pool(TOTAL, TOTAL - used), tuple(jobs), lanes=1, joins=True)


def measure(policy: str, models: int, running: int, waiting: int, decodes: int, count: int) -> list[float]:
    """Microseconds of each of `count` decisions."""
    made = create(policy, PolicyOptions())
    for index in range(models):
        name = f"model-{index:02}"
        made.observe(JobEnded("prefill", name, 160, 0.1))
        made.observe(JobEnded("decode", name, 500, 0.2, 8, 20_000))
    times = []
    for turn in range(count):
        seen = snapshot(models, running, waiting, decodes, turn)
        start = time.perf_counter()
        made.decide(seen, turn * 0.02)
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times[count // 10 :])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler", description=__doc__)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--running", type=int, default=1000)
    parser.add_argument("--waiting", type=int, default=32)
    parser.add_argument("--count", type=int, default=300)
    arguments = parser.parse_args()
    results = {}
    for policy in sorted(POLICIES):
        for label, decodes in (("a lease to give", 1), ("nothing to give", 2)):
            times = measure(
                policy, arguments.models, arguments.running, arguments.waiting, decodes, arguments.count
            )
            results[f"{policy}, {label}"] = {
                "mean": round(statistics.fmean(times), 1),
                "p50": round(times[len(times) // 2], 1),
                "p99": round(times[int(0.99 * len(times))], 1),
            }
    sys.stdout.write(json.dumps({**vars(arguments), "microseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
