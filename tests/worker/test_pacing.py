"""Tokens that wait for each other: none is lost, none overtakes, nobody waits for long or without need."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from muxserve.engine.messages import LENGTH, UNFINISHED, Step, TokenLogprobs
from muxserve.worker.orders import DecodeOrder, Ended, Outcome, Tokens
from muxserve.worker.pacing import Pacer, Progress

LONG = 100.0


class Decoder:
    """Runs leases of one model; a token is its position."""

    def __init__(self, longest: float) -> None:
        self.sent: list[Progress | Ended] = []
        self.pacer = Pacer(longest, self.sent.append)
        self.known: dict[int, int] = {}
        self.steps: dict[int, int] = {}

    def order(self, job: int, sequences: tuple[int, ...], steps: int, lead: int = 0) -> None:
        self.pacer.ordered(DecodeOrder(job, "m", sequences, steps, 1.0, lead))

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


async def test_the_end_of_a_lease_waits_only_if_another_follows() -> None:
    decoder, many = Decoder(LONG), tuple(range(200))
    decoder.order(1, many, 2)
    decoder.order(2, many, 2)
    for _ in range(2):
        await decoder.step(1, many)
    decoder.tokens()
    decoder.end(1)
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


@given(
    leases=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 4), st.booleans()), max_size=12
    ),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_each_token_goes_once_in_order_and_before_its_jobs_end(
    leases: list[tuple[int, int, int, bool]], data: st.DataObject
) -> None:
    async def run() -> None:
        decoder = Decoder(LONG)
        alive = set(range(40))
        for number, (size, steps, lead, follow) in enumerate(leases):
            batch = tuple(sorted(alive))[: 8 * size]
            decoder.order(number, batch, steps, lead)
            if follow:
                decoder.order(1000 + number, batch, steps)
            for _ in range(steps):
                going = tuple(n for n in batch if n in alive)
                if not going:
                    break
                gone = data.draw(st.sets(st.sampled_from(going), max_size=1))
                await decoder.step(number, going, tuple(gone), logprobs=data.draw(st.integers(0, 9)) == 0)
                alive -= gone
            decoder.end(number)
            if follow:
                decoder.end(1000 + number)
        decoder.pacer.flush()
        ended: set[int] = set()
        got: dict[int, list[int]] = {}
        for each in decoder.sent:
            if isinstance(each, Ended):
                ended.add(each.job)
                continue
            assert each.job not in ended
            for sequence, one in each.runs.items():
                assert one.tokens and one.position == one.tokens[0]
                got.setdefault(sequence, []).extend(one.tokens)
        assert got == {sequence: list(range(5, known)) for sequence, known in decoder.known.items()}

    asyncio.run(run())
