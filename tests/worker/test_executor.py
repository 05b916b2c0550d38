"""An executor's commands: which wait for which, when jobs of both kinds run in one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from muxserve.engine.executor import Executor
from muxserve.engine.link import Link
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
    Report,
    Shares,
    Shutdown,
    Step,
    UseShares,
)
from muxserve.engine.spec import KVLayout, LayerSpec, ModelSpec

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=2, dtype="float32", block_bytes=64)
SPEC = ModelSpec(
    architecture="none",
    dtype="float32",
    vocab_size=8,
    hidden_size=2,
    intermediate_size=1,
    heads=1,
    kv_heads=1,
    head_dim=2,
    context_length=8,
    layers=(LayerSpec(rope=None),),
    ropes=(),
    rms_eps=1e-6,
)


class Job:
    """Runs until it is stopped, and if its model is called "brief" not at all."""

    def __init__(self, message: PrefillJob | DecodeJob, event: int) -> None:
        self.number, self.model = message.job, message.model
        self.steps, self.seconds, self.error = 0, 0.0, None
        self.ended = self.nears_end = False
        self.shares = [message.shares]
        self._event = event
        if message.model == "brief":
            self.stop()

    def stop(self) -> None:
        self.ended = True
        os.eventfd_write(self._event, 1)

    def use_shares(self, shares: Shares) -> None:
        self.shares.append(shares)

    def collect(self) -> list[Step]:
        return []


class Recorder:
    """A Runner that writes down what it is asked for."""

    device, partition = "none", "none"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.jobs: dict[int, Job] = {}
        self._models: set[str] = set()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._event

    def acknowledge(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def attach(self, command: AttachArena, descriptors: list[int]) -> None:
        self.calls.append("attach")

    def add(self, command: AddModel, descriptors: list[int]) -> None:
        self.calls.append(f"add {command.model}")
        self._models.add(command.model)

    def remove(self, model: str) -> None:
        assert all(job.ended for job in self.jobs.values() if job.model == model)
        self.calls.append(f"remove {model}")
        self._models.remove(model)

    def start(self, message: PrefillJob | DecodeJob) -> Job:
        kind = type(message).__name__
        if message.model not in self._models:
            raise KeyError(message.model)
        self.calls.append(f"{kind} {message.job}")
        job = self.jobs[message.job] = Job(message, self._event)
        return job

    def close(self) -> None:
        os.close(self._event)


class Bench:
    """An executor on a thread, and the worker's end of its link."""

    def __init__(self) -> None:
        ours, theirs = Link.pair()
        self.link: Link[Report] = Link(ours, Report)
        self.runner = Recorder()
        self._theirs: Link[Command] = Link(theirs, Command)
        self._thread = threading.Thread(target=Executor(self._theirs, self.runner).run)
        self._thread.start()
        self.say(AttachArena(block_bytes=64, blocks=1))
        assert isinstance(self.hear(), Ready)
        self.add("m")

    def say(self, *messages: Command) -> None:
        for message in messages:
            self.link.send(message)

    def hear(self) -> Report:
        return self.link.receive()[0]

    def add(self, model: str) -> None:
        self.say(add(model))
        assert self.hear() == ModelAdded(model)

    def end(self) -> None:
        self.say(Shutdown())
        self._thread.join()
        self.runner.close()
        self.link.close()
        self._theirs.close()


def add(model: str) -> AddModel:
    return AddModel(model=model, spec=SPEC, layout=LAYOUT, slots=1, context=8, weights=())


def prefill(job: int, model: str = "m") -> PrefillJob:
    return PrefillJob(job, model, ())


def decode(job: int, model: str = "m") -> DecodeJob:
    return DecodeJob(job, model, (), 1)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.end()


def test_a_job_waits_for_one_of_its_kind_and_holds_up_none_of_the_other(bench: Bench) -> None:
    bench.say(prefill(1), prefill(2), decode(3), decode(4), EndLease(3))
    assert bench.hear() == JobDone(3, 0, 0.0)
    bench.say(EndLease(4))
    assert bench.hear() == JobDone(4, 0, 0.0)
    bench.say(EndLease(1))
    assert bench.hear() == JobDone(1, 0, 0.0)
    bench.say(EndLease(2))
    assert bench.hear() == JobDone(2, 0, 0.0)
    started = [call for call in bench.runner.calls if call[0].isupper()]
    assert started == ["PrefillJob 1", "DecodeJob 3", "DecodeJob 4", "PrefillJob 2"]


def test_a_model_is_added_while_jobs_run_and_before_those_that_name_it(bench: Bench) -> None:
    bench.say(prefill(1), add("brief"), decode(2, "brief"))
    assert [bench.hear() for _ in range(2)] == [ModelAdded("brief"), JobDone(2, 0, 0.0)]
    bench.say(EndLease(1))
    assert bench.hear() == JobDone(1, 0, 0.0)


def test_a_model_goes_when_its_jobs_have_ended_and_what_comes_after_waits(bench: Bench) -> None:
    bench.add("brief")
    bench.say(prefill(1), RemoveModel("m"), decode(2, "brief"), add("m"), EndLease(1))
    said = [bench.hear() for _ in range(4)]
    assert said == [JobDone(1, 0, 0.0), ModelRemoved("m"), ModelAdded("m"), JobDone(2, 0, 0.0)]
    assert bench.runner.calls[-4:] == ["PrefillJob 1", "remove m", "DecodeJob 2", "add m"]


def test_another_model_goes_while_jobs_run(bench: Bench) -> None:
    bench.add("n")
    bench.say(prefill(1), decode(2), RemoveModel("n"))
    assert bench.hear() == ModelRemoved("n")
    bench.say(EndLease(1), EndLease(2))
    assert {bench.hear(), bench.hear()} == {JobDone(1, 0, 0.0), JobDone(2, 0, 0.0)}


def test_each_job_is_told_of_its_own_shares(bench: Bench) -> None:
    alone, both = Shares(prefill=0.5), Shares(0.5, 0.3)
    bench.say(PrefillJob(1, "m", (), alone), DecodeJob(2, "m", (), 1, both), UseShares(1, both))
    bench.say(UseShares(3, alone), EndLease(1), EndLease(2))
    assert {bench.hear(), bench.hear()} == {JobDone(1, 0, 0.0), JobDone(2, 0, 0.0)}
    assert [job.shares for job in bench.runner.jobs.values()] == [[alone, both], [both]]


def test_a_job_that_cannot_be_started_is_over_and_its_kind_free(bench: Bench) -> None:
    bench.say(prefill(1, "unknown"), prefill(2), EndLease(2))
    assert bench.hear() == JobDone(1, 0, 0.0, "KeyError: 'unknown'")
    assert bench.hear() == JobDone(2, 0, 0.0)
