"""The executor process: `python -m muxserve.engine.executor --fd N --kind prefill|decode|both --parent PID`.

It runs jobs of every model of the unit, of one kind or of both. It owns nothing: the arena, weights and
tables are mapped from what the worker sends, so its death loses at most the jobs that run. Jobs have threads
of the runner's; this one sends their steps to the worker and takes its commands meanwhile.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from muxserve.common.parent import die_with_parent
from muxserve.common.process import configure_logs
from muxserve.engine.cpu.runner import CpuRunner
from muxserve.engine.cuda.owner import Owner, OwnerDied
from muxserve.engine.cuda.runtime import DeviceError
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
    NearsEnd,
    PrefillJob,
    Ready,
    RemoveModel,
    Shutdown,
    UseShares,
)
from muxserve.engine.runner import Runner, RunningJob
from muxserve.engine.shares import cuda_index

log = structlog.get_logger(__name__)

JobMessage = PrefillJob | DecodeJob
Waiting = deque[tuple[Command, list[int]]]


class Executor:
    """Takes commands in order, with two exceptions: a job waits for one of its own kind only, and EndLease,
    UseShares and Shutdown reach the jobs that run at once.

    owner: of the device memory that the runner maps, if it maps some.
    """

    def __init__(self, link: Link[Command], runner: Runner, owner: Owner | None = None) -> None:
        self._link = link
        self._runner = runner
        self._owner = owner
        self._waiting: Waiting = deque()
        self._jobs: dict[type[JobMessage], RunningJob] = {}
        self._told: RunningJob | None = None
        """The last one of which was told that it nears its end."""
        self._shut_down = False

    def run(self) -> None:
        """Serve until Shutdown. Raises LinkClosed or OwnerDied when the worker is gone."""
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        poller.register(self._runner, select.POLLIN)
        if self._owner is not None:
            poller.register(self._owner, select.POLLIN)
        while not self._shut_down:
            for ready, _ in poller.poll():
                if ready == self._link.fileno():
                    self._receive()
                elif ready == self._runner.fileno():
                    self._report()
                else:
                    self._check_owner()

    def _check_owner(self) -> None:
        if self._owner is not None:
            self._owner.check()

    def _receive(self) -> None:
        while (received := self._link.try_receive()) is not None:
            match received[0]:
                case EndLease(job=number):
                    if (job := self._running(number)) is not None:
                        job.stop()
                case UseShares(job=number, shares=shares):
                    if (job := self._running(number)) is not None:
                        job.use_shares(shares)
                case Shutdown():
                    self._shut_down = True
                case _:
                    self._waiting.append(received)
                    self._handle_waiting()

    def _running(self, number: int) -> RunningJob | None:
        """The job of that number, if it has not ended by itself."""
        return next((job for job in self._jobs.values() if job.number == number), None)

    def _report(self) -> None:
        self._runner.acknowledge()
        for kind, job in list(self._jobs.items()):
            ended = job.ended  # asked before its steps are collected: none comes after
            if job.nears_end and not ended and job is not self._told:
                self._told = job
                self._link.send(NearsEnd(job.number))
            for step in job.collect():
                self._link.send(step)
            if ended:
                del self._jobs[kind]
                self._link.send(JobDone(job.number, job.steps, job.seconds, _fault(job)))
        self._handle_waiting()

    def _handle_waiting(self) -> None:
        held: Waiting = deque()
        while self._waiting:
            received = self._waiting.popleft()
            if not self._must_wait(received[0], held):
                self._handle(*received)
                continue
            held.append(received)
            if isinstance(received[0], RemoveModel):
                break  # a model of that name that is added next is another one
        self._waiting.extendleft(reversed(held))

    def _must_wait(self, command: Command, held: Waiting) -> bool:
        """held: what waits and came before it."""
        match command:
            case PrefillJob() | DecodeJob():
                kind = type(command)
                return kind in self._jobs or any(isinstance(each, kind) for each, _ in held)
            case RemoveModel(model=model):
                waiting = [each for each, _ in held if isinstance(each, PrefillJob | DecodeJob)]
                return any(job.model == model for job in (*self._jobs.values(), *waiting))
        return False

    def _handle(self, command: Command, descriptors: list[int]) -> None:
        match command:
            case AttachArena():
                self._runner.attach(command, descriptors)
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
            self._runner.add(command, descriptors)
        except Exception as error:  # a model that cannot be mapped must not take the others along
            log.exception("model not added", model=command.model)
            self._link.send(ModelAdded(command.model, error=_describe(error)))
        else:
            log.info("model added", model=command.model, seconds=round(time.perf_counter() - started, 3))
            self._link.send(ModelAdded(command.model))

    def _start(self, message: JobMessage) -> None:
        self._check_owner()
        try:
            self._jobs[type(message)] = self._runner.start(message)
        except Exception as error:  # this job's own; the executor and its neighbours live on
            log.exception("job refused", job=message.job, model=message.model)
            self._link.send(JobDone(message.job, 0, 0.0, _describe(error)))


def _fault(job: RunningJob) -> str:
    """Of a job that has ended; empty: none."""
    if job.error is None:
        return ""
    log.error("job failed", job=job.number, model=job.model, error=str(job.error))
    return _describe(job.error)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def make_runner(options: argparse.Namespace) -> Runner:
    """For the device that the options name. Raises DeviceError, DriverError, ValueError."""
    if options.device == "cpu":
        return CpuRunner(options.cores)
    from muxserve.engine.cuda.runner import open_runner  # brings torch and Triton

    runner, reason = open_runner(cuda_index(options.device), options.partition)
    log.info("compute shares", partition=runner.partition, reason=reason)
    return runner


def main(
    argv: Sequence[str] | None = None, runner: Callable[[argparse.Namespace], Runner] = make_runner
) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True, help="connected SOCK_SEQPACKET socket")
    parser.add_argument("--kind", choices=["prefill", "decode", "both"], required=True)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--partition", default="auto", help="how shares are made, see `shares.detect`")
    parser.add_argument("--cores", type=int, required=True, help="most threads that a job may use")
    parser.add_argument("--parent", type=int, required=True, help="process id of the worker")
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    configure_logs(f"executor-{options.kind}", options.log_level)
    link: Link[Command] = Link(socket.socket(fileno=options.fd), Command)
    try:
        owner = None if options.device == "cpu" else Owner(options.parent)
        Executor(link, runner(options), owner).run()
    except (LinkClosed, OwnerDied):
        log.warning("the worker is gone")
    except DeviceError as error:
        log.error("cannot start", reason=str(error))
        os._exit(1)
    except Exception:  # a device that is lost, or a bug: the worker starts another executor
        log.exception("cannot go on")
        os._exit(1)
    # Interpreter shutdown would wait for threads and free memory piece by piece; the kernel just does it.
    os._exit(0)


if __name__ == "__main__":
    main()
