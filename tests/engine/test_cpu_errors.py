"""What a job gets wrong is told by type, and the engine lives on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.errors import JobError, UnallocatedBlockError
from muxserve.engine.messages import DecodeJob, DecodeRow, PrefillChunk, PrefillJob, Shares, Step
from tests.engine.cpu import GREEDY, CpuEngine
from tests.engine.model_factory import make_model

CONTEXT, SPAN = 32, 8
PROMPT = [5, 9, 200, 31, 7]


@dataclass
class Told:
    """An engine with one good sequence in slot 0, and what that says."""

    engine: CpuEngine
    steps: list[Step]

    def job(self, *rows: DecodeRow, steps: int = 4) -> DecodeJob:
        """On two threads."""
        return DecodeJob(7, "m", rows, steps)

    def says_the_same(self) -> bool:
        """The good sequence, again from its prompt."""
        return run_good(self.engine) == self.steps


def run_good(engine: CpuEngine) -> list[Step]:
    engine.tables.tokens[0, : len(PROMPT)] = PROMPT
    first = engine.prefill([PrefillChunk(0, 0, len(PROMPT), CONTEXT, GREEDY)])
    assert first is not None
    return [first, *engine.decode([DecodeRow(0, len(PROMPT) + 1, CONTEXT, GREEDY)], 4)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    torch.set_num_threads(1)
    path = make_model("llama", tmp_path_factory.mktemp("llama"), layers=2)
    # 4,096 bytes: 8 tokens of head size 64 in float32.
    with CpuEngine(open_checkpoint(path, "float32"), slots=3, context=CONTEXT, threads=2) as engine:
        assert engine.layout.tokens_per_block == SPAN
        yield Told(engine, run_good(engine))


GOOD = DecodeRow(0, 6, CONTEXT, GREEDY)


@pytest.mark.parametrize(
    "bad",
    [
        DecodeRow(3, 6, CONTEXT, GREEDY),
        DecodeRow(-1, 6, CONTEXT, GREEDY),
        DecodeRow(1 << 40, 6, CONTEXT, GREEDY),
        DecodeRow(1, 0, CONTEXT, GREEDY),
        DecodeRow(1, -5, CONTEXT, GREEDY),
        DecodeRow(1, CONTEXT + 1, CONTEXT, GREEDY),
        DecodeRow(1, 1 << 62, CONTEXT, GREEDY),
    ],
)
def test_a_row_outside_of_the_tables_is_refused_before_anything_is_done(told: Told, bad: DecodeRow) -> None:
    told.engine.tables.tokens[1] = 4
    before = told.engine.tables.tokens.copy()
    steps = told.engine.runner.run(told.job(GOOD, bad))
    with pytest.raises(JobError, match='"m" has no such slot or position'):
        next(steps)
    assert (told.engine.tables.tokens == before).all()
    assert told.says_the_same()


@pytest.mark.parametrize(
    "bad",
    [
        PrefillChunk(3, 0, 4, CONTEXT),
        PrefillChunk(1, 4, 4, CONTEXT),
        PrefillChunk(1, 5, 4, CONTEXT),
        PrefillChunk(1, -1, 4, CONTEXT),
        PrefillChunk(1, 0, CONTEXT + 1, CONTEXT),
    ],
)
def test_a_chunk_outside_of_the_tables_is_refused(told: Told, bad: PrefillChunk) -> None:
    with pytest.raises(JobError):
        told.engine.prefill([bad])
    assert told.says_the_same()


@pytest.mark.parametrize("token", [-1, 384, 2**31 - 1, -(2**31)])
def test_a_token_that_the_model_does_not_have_is_refused(told: Told, token: int) -> None:
    vocabulary = 384
    told.engine.tables.tokens[1, :6] = [1, 2, 3, 4, token, 5]
    with pytest.raises(JobError, match=f"not one of the {vocabulary} of"):
        told.engine.prefill([PrefillChunk(1, 0, 6, CONTEXT, GREEDY)])
    with pytest.raises(JobError, match=f"not one of the {vocabulary} of"):
        list(told.engine.runner.run(told.job(GOOD, DecodeRow(1, 5, CONTEXT, GREEDY))))
    assert told.says_the_same()


@pytest.mark.parametrize("absent", [-1, 1 << 30])
def test_a_span_without_a_block_ends_the_job_after_the_steps_before_it(told: Told, absent: int) -> None:
    """Slot 1 may go on to the end of its first span."""
    tables = told.engine.tables
    kept = tables.blocks[:, 1, :, 1].copy()
    tables.tokens[1, : len(PROMPT)] = PROMPT
    told.engine.prefill([PrefillChunk(1, 0, len(PROMPT), CONTEXT, GREEDY)])
    tables.blocks[1, 1, :, 1] = absent
    steps = told.engine.runner.run(told.job(DecodeRow(1, len(PROMPT) + 1, CONTEXT, GREEDY), steps=9))
    seen: list[Step] = []
    with pytest.raises(UnallocatedBlockError, match="layer 1"):
        seen.extend(steps)
    assert [step.positions for step in seen] == [(position,) for position in range(len(PROMPT) + 1, SPAN + 1)]
    assert [step.tokens for step in seen] == [step.tokens for step in told.steps[1 : 1 + len(seen)]]
    with pytest.raises(UnallocatedBlockError):
        told.engine.prefill([PrefillChunk(1, 0, SPAN + 1, CONTEXT, GREEDY)])
    tables.blocks[:, 1, :, 1] = kept
    assert told.says_the_same()


def test_a_sequence_that_fills_its_table_ends_for_its_length(told: Told) -> None:
    tables = told.engine.tables
    tables.tokens[1] = 6
    told.engine.prefill([PrefillChunk(1, 0, CONTEXT - 2, CONTEXT, GREEDY)])
    steps = list(told.engine.runner.run(told.job(DecodeRow(1, CONTEXT - 1, CONTEXT, GREEDY), steps=9)))
    assert [(step.positions, step.finished) for step in steps] == [((CONTEXT - 1,), (2,))]


def test_a_model_that_is_not_there_is_a_key_error(told: Told) -> None:
    with pytest.raises(KeyError):
        told.engine.runner.start(DecodeJob(1, "other", (GOOD,), 1))
    with pytest.raises(KeyError):
        told.engine.runner.start(PrefillJob(1, "other", ()))
    assert told.says_the_same()


@pytest.mark.parametrize("shares", [Shares(), Shares(1, 0.001), Shares(0.001, 1), Shares(-3, 9)])
def test_any_shares_are_taken_for_threads_that_there_are(told: Told, shares: Shares) -> None:
    tables = told.engine.tables
    tables.tokens[0, : len(PROMPT)] = PROMPT
    chunk = PrefillChunk(0, 0, len(PROMPT), CONTEXT, GREEDY)
    first = list(told.engine.runner.run(PrefillJob(0, "m", (chunk,), shares)))
    rest = list(told.engine.runner.run(DecodeJob(0, "m", (GOOD,), 4, shares)))
    assert [*first, *rest] == told.steps


def test_jobs_of_nothing_end_with_nothing(told: Told) -> None:
    assert list(told.engine.runner.run(told.job())) == []
    assert list(told.engine.runner.run(told.job(GOOD, steps=0))) == []
    assert list(told.engine.runner.run(PrefillJob(0, "m", ()))) == []
    assert told.says_the_same()
