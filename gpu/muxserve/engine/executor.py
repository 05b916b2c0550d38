"""The executor process: `python -m muxserve.engine.executor --fd N --kind prefill|decode --parent PID`.

One process per kind runs the jobs of every model of the unit. It owns nothing: the arena, weights and tables
are mapped from descriptors that the worker sends, so its death loses at most the job that runs. Jobs run on
threads of the engine's; this one sends their steps to the worker and takes its commands meanwhile.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import time
from collections import deque

import structlog

from muxserve.common.parent import die_with_parent
from muxserve.common.process import configure_logs
from muxserve.engine.cpu.jobs import NativeJob
from muxserve.engine.cpu.runner import CpuRunner
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
    UseThreads,
)

log = structlog.get_logger(__name__)


class Executor:
    """Takes commands in order, but for EndLease, UseThreads and Shutdown, which reach the job that runs at
    once."""

    def __init__(self, link: Link[Command], runner: CpuRunner) -> None:
        self._link = link
        self._runner = runner
        self._waiting: deque[tuple[Command, list[int]]] = deque()
        self._job: NativeJob | None = None
        self._shut_down = False

    def run(self) -> None:
        """Serve until Shutdown. Raises LinkClosed when the worker is gone."""
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        poller.register(self._runner, select.POLLIN)
        while not self._shut_down:
            for ready, _ in poller.poll():
                if ready == self._link.fileno():
                    self._receive()
                else:
                    self._report()
            while self._job is None and self._waiting:
                self._handle(*self._waiting.popleft())

    def _receive(self) -> None:
        while (received := self._link.try_receive()) is not None:
            match received[0]:
                case EndLease(job=number):
                    if (job := self._running(number)) is not None:
                        job.stop()
                case UseThreads(job=number, threads=threads):
                    if (job := self._running(number)) is not None:
                        job.use_threads(threads)
                case Shutdown():
                    self._shut_down = True
                case _:
                    self._waiting.append(received)

    def _running(self, number: int) -> NativeJob | None:
        """The job of that number, if it has not ended by itself."""
        return self._job if self._job is not None and self._job.number == number else None

    def _report(self) -> None:
        self._runner.acknowledge()
        if (job := self._job) is None:
            return
        ended = job.ended  # asked before its steps are collected: none comes after
        for step in job.collect():
            self._link.send(step)
        if not ended:
            return
        self._job = None
        error = ""
        if job.error is not None:
            log.error("job failed", job=job.number, model=job.model, error=str(job.error))
            error = _describe(job.error)
        self._link.send(JobDone(job.number, job.steps, job.seconds, error))

    def _handle(self, command: Command, descriptors: list[int]) -> None:
        match command:
            case AttachArena():
                self._runner.attach(command, descriptors[0])
                self._link.send(Ready(os.getpid(), self._runner.device, self._runner.partition))
            case AddModel():
                self._add(command, descriptors)
            case RemoveModel():
                self._runner.remove(command.model)
                self._link.send(ModelRemoved(command.model))
            case PrefillJob() | DecodeJob():
                self._start(command)

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

    def _start(self, message: PrefillJob | DecodeJob) -> None:
        try:
            self._job = self._runner.start(message)
        except Exception as error:  # this job's own; the executor and its neighbours live on
            log.exception("job refused", job=message.job, model=message.model)
            self._link.send(JobDone(message.job, 0, 0.0, _describe(error)))


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
        Executor(link, CpuRunner(options.cores)).run()
    except LinkClosed:
        log.warning("the worker is gone")
    # Interpreter shutdown would wait for threads and free memory piece by piece; the kernel just does it.
    os._exit(0)


if __name__ == "__main__":
    main()
