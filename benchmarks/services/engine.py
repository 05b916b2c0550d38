"""An executor whose steps take a given time and sample at random: `python -m benchmarks.services.engine`.

It speaks the worker's side of `muxserve.engine.messages` as the real one does: jobs one at a time, EndLease
heard between steps. The environment says how time passes (MUXSERVE_BENCH_ENGINE, JSON of `Pace`), because
the worker starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.messages import (
    LENGTH,
    UNFINISHED,
    AddModel,
    AttachArena,
    Command,
    DecodeJob,
    EndLease,
    JobDone,
    ModelAdded,
    ModelRemoved,
    PrefillJob,
    Ready,
    RemoveModel,
    Shutdown,
    Step,
)

VARIABLE = "MUXSERVE_BENCH_ENGINE"
VOCABULARY = range(1000, 4000)
"""Token ids that are ordinary text in the vocabularies used here."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take."""

    step: float = 0.024
    """Seconds of a decode step."""
    prefill: float = 0.03
    """Seconds of a prefill job."""
    gaps: str = ""
    """File to write the seconds between decode jobs to at the end."""

    def environment(self) -> dict[str, str]:
        """What hands it to executors."""
        return {VARIABLE: json.dumps(asdict(self))}

    @staticmethod
    def of_environment() -> Pace:
        return Pace(**json.loads(os.environ.get(VARIABLE, "{}")))


class Engine:
    """Steps without a model."""

    def __init__(self) -> None:
        self._pace = Pace.of_environment()
        self._random = random.Random(0)

    def prefill(self, job: PrefillJob) -> Iterator[Step]:
        """At most one step."""
        time.sleep(self._pace.prefill)
        ending = [chunk for chunk in job.chunks if chunk.sampling is not None]
        if ending:
            yield self._step(job.job, [(c.slot, c.end, c.limit) for c in ending])

    def decode(self, job: DecodeJob) -> Iterator[Step]:
        """As many steps as the job asks for, fewer if all rows finish."""
        rows = [(row.slot, row.length, row.limit) for row in job.rows]
        for _ in range(job.steps):
            time.sleep(self._pace.step)
            yield self._step(job.job, rows)
            rows = [(slot, length + 1, limit) for slot, length, limit in rows if length + 1 < limit]
            if not rows:
                return

    def _step(self, job: int, rows: list[tuple[int, int, int]]) -> Step:
        return Step(
            job,
            slots=tuple(slot for slot, _, _ in rows),
            positions=tuple(length for _, length, _ in rows),
            tokens=tuple(self._random.choices(VOCABULARY, k=len(rows))),
            finished=tuple(LENGTH if length + 1 >= limit else UNFINISHED for _, length, limit in rows),
        )


class Executor:
    """Serves one link."""

    def __init__(self, link: Link[Command], gaps: Path | None) -> None:
        self._link = link
        self._engine = Engine()
        self._waiting: deque[Command] = deque()
        self._gaps_file = gaps
        self._gaps: list[float] = []
        """Seconds from each decode job's end to the next one's start, where both were one after the other."""
        self._decoded = 0.0

    def run(self) -> None:
        """Until Shutdown. Raises LinkClosed."""
        while True:
            if self._waiting:
                command = self._waiting.popleft()
            else:
                command, descriptors = self._link.receive()
                for descriptor in descriptors:
                    os.close(descriptor)
            match command:
                case AttachArena():
                    self._link.send(Ready(os.getpid(), "cpu", "threads"))
                case AddModel():
                    self._link.send(ModelAdded(command.model))
                case RemoveModel():
                    self._link.send(ModelRemoved(command.model))
                case PrefillJob():
                    self._run(command.job, self._engine.prefill(command))
                case DecodeJob():
                    if self._decoded:
                        self._gaps.append(time.perf_counter() - self._decoded)
                    self._run(command.job, self._engine.decode(command))
                    self._decoded = time.perf_counter()
                case Shutdown():
                    if self._gaps_file and self._gaps:
                        self._gaps_file.write_text(json.dumps(self._gaps))
                    return
                case _:
                    pass  # speaks of a job that has ended, or of threads

    def _run(self, job: int, steps: Iterator[Step]) -> None:
        begun, count = time.perf_counter(), 0
        for step in steps:
            count += 1
            self._link.send(step)
            if self._asked_to_end(job):
                break
        self._link.send(JobDone(job, count, time.perf_counter() - begun))

    def _asked_to_end(self, job: int) -> bool:
        end = False
        while (received := self._link.try_receive()) is not None:
            if isinstance(received[0], EndLease):
                end |= received[0].job == job
            else:
                end |= isinstance(received[0], Shutdown)
                self._waiting.append(received[0])
        return end


def main() -> None:
    """The options are those of `muxserve.engine.executor`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--kind", required=True)
    options, _ = parser.parse_known_args()
    gaps = Pace.of_environment().gaps
    link: Link[Command] = Link(socket.socket(fileno=options.fd), Command)
    with contextlib.suppress(LinkClosed):
        Executor(link, Path(gaps) if gaps and options.kind == "decode" else None).run()


if __name__ == "__main__":
    main()
