"""The executor process: `python -m muxserve.engine.executor --fd N --kind prefill|decode --parent PID`.

One process per kind runs the jobs of every model of the unit. It owns nothing: the arena, weights and tables
are mapped from descriptors that the worker sends, so its death loses at most the job that runs.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections import deque

import structlog

from muxserve.common.parent import die_with_parent
from muxserve.common.process import configure_logs
from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.messages import (
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
)
from muxserve.engine.runner import Runner

log = structlog.get_logger(__name__)


class Executor:
    """Takes commands in order. While a decode job runs it looks for newer ones between steps: its EndLease
    and Shutdown end it, the others wait for its end."""

    def __init__(self, link: Link[Command], runner: Runner) -> None:
        self._link = link
        self._runner = runner
        self._waiting: deque[tuple[Command, list[int]]] = deque()

    def run(self) -> None:
        """Serve until Shutdown. Raises LinkClosed when the worker is gone."""
        while True:
            command, descriptors = self._waiting.popleft() if self._waiting else self._link.receive()
            match command:
                case AttachArena():
                    self._attach(command, descriptors)
                case AddModel():
                    self._add(command, descriptors)
                case RemoveModel():
                    self._runner.remove(command.model)
                    self._link.send(ModelRemoved(command.model))
                case PrefillJob() | DecodeJob():
                    self._run_job(command)
                case EndLease():
                    pass  # of a job that has ended by itself
                case Shutdown():
                    return

    def _attach(self, command: AttachArena, descriptors: list[int]) -> None:
        self._runner.attach(command, descriptors[0])
        self._link.send(Ready(os.getpid(), self._runner.device, self._runner.partition))

    def _add(self, command: AddModel, descriptors: list[int]) -> None:
        started = time.perf_counter()
        try:
            self._runner.add(command, weights_fd=descriptors[0], tables_fd=descriptors[1])
        except Exception as error:  # a model that cannot be mapped must not take the others along
            log.exception("model not added", model=command.model)
            self._link.send(ModelAdded(command.model, error=_describe(error)))
        else:
            log.info("model added", model=command.model, seconds=round(time.perf_counter() - started, 3))
            self._link.send(ModelAdded(command.model))

    def _run_job(self, job: PrefillJob | DecodeJob) -> None:
        started = time.perf_counter()
        steps, error = 0, ""
        try:
            if isinstance(job, PrefillJob):
                if (step := self._runner.prefill(job)) is not None:
                    self._link.send(step)
                steps = 1
            else:
                for step in self._runner.decode(job):
                    self._link.send(step)
                    steps += 1
                    if self._asked_to_end(job.job):
                        break
        except LinkClosed:
            raise
        except Exception as failure:  # this job's own; the executor and its neighbours live on
            log.exception("job failed", job=job.job, model=job.model)
            error = _describe(failure)
        self._link.send(JobDone(job.job, steps, time.perf_counter() - started, error))

    def _asked_to_end(self, job: int) -> bool:
        """Look for commands; true if the lease of `job` is to end now."""
        end = False
        while (received := self._link.try_receive()) is not None:
            match received[0]:
                case EndLease():
                    end |= received[0].job == job
                case Shutdown():
                    end = True
                    self._waiting.append(received)
                case _:
                    self._waiting.append(received)
        return end


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True, help="connected SOCK_SEQPACKET socket")
    parser.add_argument("--kind", choices=["prefill", "decode"], required=True)
    parser.add_argument("--cores", type=int, required=True, help="most threads that a job may use")
    parser.add_argument("--parent", type=int, required=True, help="process id of the worker")
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    die_with_parent(options.parent)
    configure_logs(f"executor-{options.kind}", options.log_level)
    link: Link[Command] = Link(socket.socket(fileno=options.fd), Command)
    try:
        Executor(link, Runner(options.cores)).run()
    except LinkClosed:
        log.warning("the worker is gone")
    # Interpreter shutdown would wait for threads and free memory piece by piece; the kernel just does it.
    os._exit(0)


if __name__ == "__main__":
    main()
