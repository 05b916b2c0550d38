"""Tokens that wait for each other: none is lost, none overtakes, nobody waits for long or without need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from muxserve.engine.messages import LENGTH, UNFINISHED, Step, TokenLogprobs
from muxserve.worker.orders import DecodeOrder, Ended, Outcome, Tokens
from muxserve.worker.pacing import Pacer, Progress

LONG = 100.0


class Decoder:
    """Runs leases; a token is its position."""

    def __init__(self, longest: float) -> None:
        self.sent: list[Progress | Ended] = []
        self.pacer = Pacer(longest, self.sent.append)
        self.known: dict[int, int] = {}
        self.steps: dict[int, int] = {}

    def order(
        self,
        job: int,
        sequences: tuple[int, ...],
        steps: int,
        lead: int = 0,
        model: str = "m",
        prompts: tuple[int, ...] = (),
    ) -> None:
        order = DecodeOrder(job, model, sequences, steps, 1.0, lead, prompts=frozenset(prompts))
        self.pacer.ordered(order)

    async def step(
        self,
        job: int,
        sequences: tuple[int, ...],
        finishing: tuple[int, ...] = (),
        logprobs: bool = False,
        settled: bool = True,
    ) -> None:
        positions = tuple(self.known.get(number, 5) for number in sequences)
        self.known |= {number: at + 1 for number, at in zip(sequences, positions, strict=True)}
        self.steps[job] = self.steps.get(job, 0) + 1
        finished = tuple(LENGTH if number in finishing else UNFINISHED for number in sequences)
        found = tuple(TokenLogprobs(-1.0) for _ in sequences) if logprobs else ()
        step = Step(job, sequences, positions, positions, finished, found)
        self.pacer.tokens(Tokens(job, sequences, step))
        if settled:
            await asyncio.sleep(0)

    def end(self, job: int, outcome: Outcome = Outcome.OK) -> None:
        self.pacer.ended(Ended(job, outcome, self.steps.get(job, 0), 0.0, (), "", 9))

    def tokens(self) -> list[dict[int, list[int]]]:
        """Messages with tokens so far."""
        found = [
            {n: run.tokens for n, run in each.runs.items()}
            for each in self.sent
            if isinstance(each, Progress)
        ]
        self.sent[:] = [each for each in self.sent if isinstance(each, Ended)]
        return found


async def test_a_lone_sequence_never_waits() -> None:
    decoder = Decoder(LONG)
    decoder.order(1, (7,), 8)
    for _ in range(3):
        await decoder.step(1, (7,))
    assert decoder.tokens() == [{7: [5]}, {7: [6]}, {7: [7]}]


async def test_many_sequences_share_messages_until_the_time_is_up() -> None:
    decoder, many = Decoder(LONG), tuple(range(10))
    decoder.order(1, many, 100)
    await decoder.step(1, many)
    assert len(decoder.tokens()) == 1, "after a pause nobody knows when the next one comes"
    await decoder.step(1, many)
    await decoder.step(1, many)
    assert decoder.tokens() == []
    async with asyncio.timeout(5):
        while not decoder.sent:  # noqa: ASYNC110 - time is what is waited for
            await asyncio.sleep(0.005)
    assert decoder.tokens() == [{number: [6, 7] for number in many}]


async def test_steps_that_come_together_go_together() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 8)
    for last in (False, False, True):
        await decoder.step(1, many, settled=last)
    assert decoder.tokens() == [{number: [5, 6, 7] for number in many}]


async def test_a_limit_of_zero_means_one_message_per_step() -> None:
    decoder, many = Decoder(0.0), tuple(range(10))
    decoder.order(1, many, 100)
    for count in range(1, 5):
        await decoder.step(1, many)
        assert len(decoder.sent) == count


async def test_those_that_finish_go_at_once_with_all_their_tokens() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 100)
    await decoder.step(1, many)
    await decoder.step(1, many)
    decoder.tokens()
    await decoder.step(1, many, finishing=(3, 5))
    assert decoder.tokens() == [{3: [6, 7], 5: [6, 7]}]
    decoder.pacer.flush()
    assert decoder.tokens() == [{number: [6, 7] for number in many if number not in (3, 5)}]


async def test_the_scheduler_hears_in_time_that_a_lease_nears_its_end_and_tokens_wait_on() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 8, lead=4)
    for _ in range(3):
        await decoder.step(1, many)
    assert decoder.tokens() == [{number: [5] for number in many}]
    await decoder.step(1, many)
    [told] = decoder.sent
    assert isinstance(told, Progress)
    assert (told.job, told.steps, told.runs) == (1, 4, {})
    decoder.sent.clear()
    await decoder.step(1, many)
    assert decoder.sent == []
    decoder.pacer.flush()
    assert decoder.tokens() == [{number: [6, 7, 8, 9] for number in many}]


async def test_logprobs_and_tokens_of_prompts_do_not_wait_and_order_is_kept() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 8)
    for _ in range(3):
        await decoder.step(1, many)
    decoder.tokens()
    await decoder.step(1, many, logprobs=True)
    assert [each[0] for each in decoder.tokens()] == [[6, 7], [8]]
    await decoder.step(1, many)
    await decoder.step(2, (900,))
    assert decoder.tokens() == [{900: [5]}], "job 2 is no decode job"


async def test_first_tokens_of_prompts_go_at_once_with_all_that_is_held() -> None:
    decoder, many = await first_of_two_leases(3)
    decoder.order(3, (*many, 900), 8, prompts=(900,))
    for _ in range(3):
        await decoder.step(2, many)
    decoder.end(2)
    assert decoder.tokens() == [], "job 3 follows"
    await decoder.step(3, (*many, 900))
    kinds = [each.job if isinstance(each, Ended) else each.runs[3].tokens for each in decoder.sent]
    assert kinds == [[6, 7], 1, [8, 9, 10], 2, [11]]
    last = decoder.sent[-1]
    assert isinstance(last, Progress) and last.runs[900].tokens == [5]
    decoder.sent.clear()
    await decoder.step(3, (*many, 900))
    assert decoder.sent == [], "its next ones wait like all others"


async def test_a_prompt_that_took_no_part_has_nothing_sent_at_once() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 8)
    decoder.order(2, many, 8, prompts=(900,))
    await decoder.step(1, many)
    decoder.sent.clear()
    await decoder.step(2, many)
    assert decoder.sent == []


async def first_of_two_leases(steps: int) -> tuple[Decoder, tuple[int, ...]]:
    """Two leases of many sequences, so many steps each; the first has ended, what it sent was taken."""
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, steps)
    decoder.order(2, many, steps)
    for _ in range(steps):
        await decoder.step(1, many)
    decoder.tokens()
    decoder.end(1)
    return decoder, many


async def test_the_end_of_a_lease_waits_only_if_another_follows() -> None:
    decoder, many = await first_of_two_leases(2)
    assert decoder.sent == []
    for _ in range(2):
        await decoder.step(2, many)
    decoder.end(2)
    kinds = [each.job if isinstance(each, Ended) else dict(each.runs) for each in decoder.sent]
    assert kinds[0] == 1 or kinds[1] == 1, "no earlier than its tokens"
    assert kinds[-1] == 2


async def test_an_early_end_is_told_at_once() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 8)
    decoder.order(2, many, 8)
    await decoder.step(1, many)
    await decoder.step(1, many)
    decoder.tokens()
    decoder.end(2)
    (last,) = [each for each in decoder.sent if isinstance(each, Ended)]
    assert last.job == 2, "it never ran: its lease was ended while it waited"
    decoder.end(1, outcome=Outcome.EXECUTOR_LOST)
    assert isinstance(decoder.sent[-1], Ended)


async def test_nothing_overtakes_where_two_models_decode_by_turns() -> None:
    decoder, one, other = Decoder(LONG), tuple(range(100)), tuple(range(100, 200))
    decoder.order(1, one, 100, model="m")
    decoder.order(2, other, 100, model="n")
    for job, batch in ((1, one), (2, other)) * 2:
        await decoder.step(job, batch)
    decoder.pacer.flush()
    decoder.tokens()
    await decoder.step(1, one)
    await decoder.step(2, other)
    await decoder.step(1, one, finishing=(3,))
    assert decoder.tokens() == [{3: [7, 8]}]


async def test_what_an_earlier_lease_made_of_a_sequence_goes_before_its_end() -> None:
    decoder, many = await first_of_two_leases(3)
    await decoder.step(2, many, finishing=(3,))
    assert [[*found.get(3, ())] for found in decoder.tokens()] == [[6, 7], [8]]


@dataclass
class Lane:
    """Leases of one model, one after the other; some are ordered before the last one ends."""

    model: str
    first_job: int
    alive: set[int]
    leases: list[tuple[int, int, int]]
    """How many sequences (times 8), steps, and lead."""

    def order(self, decoder: Decoder, which: int) -> None:
        if which < len(self.leases):
            size, steps, lead = self.leases[which]
            batch = tuple(sorted(self.alive))[: 8 * size]
            decoder.order(self.first_job + which, batch, steps, lead, self.model, batch[: lead // 2])

    async def play(self, decoder: Decoder, data: st.DataObject) -> AsyncIterator[None]:
        self.order(decoder, 0)
        for which, (size, steps, _lead) in enumerate(self.leases):
            job, batch = self.first_job + which, tuple(sorted(self.alive))[: 8 * size]
            if early := data.draw(st.booleans()):
                self.order(decoder, which + 1)
            for _ in range(steps):
                if not (going := tuple(n for n in batch if n in self.alive)):
                    break
                gone = data.draw(st.sets(st.sampled_from(going), max_size=1))
                await decoder.step(job, going, tuple(gone), logprobs=data.draw(st.integers(0, 9)) == 0)
                self.alive -= gone
                yield
            decoder.end(job)
            if not early:
                self.order(decoder, which + 1)


LEASES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 4)), max_size=8)


@given(one=LEASES, other=LEASES, data=st.data())
@settings(max_examples=150, deadline=None)
def test_each_token_goes_once_in_order_and_before_its_jobs_end(
    one: list[tuple[int, int, int]], other: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    async def run() -> None:
        decoder = Decoder(LONG)
        lanes = [
            Lane("m", 0, set(range(40)), one).play(decoder, data),
            Lane("n", 100, set(range(50, 90)), other).play(decoder, data),
        ]
        while lanes:
            lane = data.draw(st.sampled_from(lanes))
            if await anext(lane, "over") == "over":
                lanes.remove(lane)
        decoder.pacer.flush()
        ended: set[int] = set()
        got: dict[int, list[int]] = {}
        for each in decoder.sent:
            if isinstance(each, Ended):
                ended.add(each.job)
                continue
            assert each.job not in ended
            for sequence, tokens in each.runs.items():
                assert tokens.tokens and tokens.position == tokens.tokens[0]
                assert tokens.position == 5 + len(got.setdefault(sequence, [])), "overtaken"
                got[sequence] += tokens.tokens
        assert got == {sequence: list(range(5, known)) for sequence, known in decoder.known.items()}

    asyncio.run(run())
