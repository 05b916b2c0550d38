"""Each token once and in order, whatever schedulers send in whatever order."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxserve.common.errors import Internal, Overloaded
from muxserve.gateway.requests import LiveRequest, RequestTable
from muxserve.v1 import common_pb2, scheduler_pb2

Event = scheduler_pb2.RequestEvent
UNFINISHED, LENGTH = common_pb2.FINISH_REASON_UNSPECIFIED, common_pb2.FINISH_REASON_LENGTH


def tokens(
    attempt: int,
    index: int,
    token_ids: list[int],
    finish: common_pb2.FinishReason.ValueType = UNFINISHED,
) -> scheduler_pb2.RequestEvent:
    event = Event.Tokens(index=index, token_ids=token_ids, finish_reason=finish)
    return Event(request_id="r", attempt=attempt, tokens=event)


@pytest.fixture
def table() -> RequestTable:
    return RequestTable(limit=2)


def opened(table: RequestTable, request_id: str = "r") -> LiveRequest:
    return table.open(scheduler_pb2.QueuedRequest(request_id=request_id, model="m"))


Step = tuple[str, int, int]
"""What happens, and two numbers that say where."""


def told(text: list[int], steps: list[Step]) -> list[scheduler_pb2.RequestEvent]:
    """What schedulers say about `text`: attempts that die and are resumed, replays, stale attempts."""
    events, have, attempt = [], 0, 1
    for kind, first, second in steps:
        if kind == "go on":
            end = min(have + first, len(text))
            events.append(tokens(attempt, have, text[have:end]))
            have = end
        elif kind == "replay":
            start = min(first, have)
            end = min(start + second, len(text))
            events.append(tokens(attempt, start, text[start:end]))
            have = max(have, end)
        elif kind == "die":
            attempt += 1
            events.append(Event(request_id="r", attempt=attempt, resume_query=Event.ResumeQuery()))
        elif attempt > 1:
            finish = LENGTH if second % 2 else UNFINISHED
            events.append(tokens(1 + first % (attempt - 1), second, [11, 12], finish))
    return [*events, tokens(attempt, have, text[have:], LENGTH)]


@given(
    text=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    steps=st.lists(
        st.tuples(st.sampled_from(("go on", "replay", "die", "stale")), st.integers(0, 9), st.integers(0, 9)),
        max_size=20,
    ),
    looks=st.lists(st.booleans(), max_size=20),
)
@settings(max_examples=400, deadline=None)
def test_a_client_gets_each_token_once_and_in_order(
    text: list[int], steps: list[Step], looks: list[bool]
) -> None:

    async def run() -> list[int]:
        table, got = RequestTable(limit=1), []
        live = opened(table)
        for number, event in enumerate(told(text, steps)):
            answer = table.handle(event, "s")
            if event.HasField("resume_query"):
                assert answer is not None and list(answer.resume.emitted_tokens) == live.token_ids
                assert text[: len(live.token_ids)] == live.token_ids
            else:
                assert answer is None
            news = live.taken < len(live.token_ids) and not live.over
            if news and number < len(looks) and looks[number]:
                got += (await live.take()).token_ids
        batch = await live.take()
        assert batch.finish_reason == LENGTH
        return got + batch.token_ids

    assert asyncio.run(run()) == text


@pytest.mark.parametrize(
    ("index", "token_ids", "finish"),
    [(3, [1], UNFINISHED), (9, [], LENGTH), (0, [1], LENGTH), (1, [], LENGTH)],
)
async def test_tokens_that_do_not_continue_are_a_protocol_error(
    table: RequestTable, index: int, token_ids: list[int], finish: common_pb2.FinishReason.ValueType
) -> None:
    live = opened(table)
    table.handle(tokens(1, 0, [1, 2]), "s")
    answer = table.handle(tokens(1, index, token_ids, finish), "s")
    assert answer is not None and answer.cancel.request_id == "r"
    with pytest.raises(Internal):
        await live.take()


async def test_events_after_the_end_change_nothing(table: RequestTable) -> None:
    live = opened(table)
    table.handle(tokens(1, 0, [1, 2], LENGTH), "s")
    assert table.handle(tokens(1, 2, [3]), "s") is None
    assert table.handle(tokens(1, 7, [3]), "s") is None
    resumed = table.handle(Event(request_id="r", attempt=2, resume_query=Event.ResumeQuery()), "t")
    assert resumed is not None and resumed.resume.gone
    batch = await live.take()
    assert batch.token_ids == [1, 2]


def test_the_scheduler_of_the_newest_attempt_is_the_one_to_cancel(table: RequestTable) -> None:
    live = opened(table)
    assert live.scheduler_id == ""
    table.handle(Event(request_id="r", attempt=1, started=Event.Started()), "first")
    table.handle(Event(request_id="r", attempt=2, resume_query=Event.ResumeQuery()), "second")
    table.handle(tokens(1, 0, [1]), "first")
    assert (live.attempt, live.scheduler_id, live.token_ids) == (2, "second", [])


def test_a_full_table_takes_no_more_until_one_is_closed(table: RequestTable) -> None:
    first = opened(table, "a")
    opened(table, "b")
    with pytest.raises(Overloaded):
        opened(table, "c")
    assert table.close(first) and not table.close(first)
    opened(table, "c")
    assert len(table) == 2


def new(*rows: tuple[int, int, list[int]]) -> scheduler_pb2.NewTokens:
    """(number, index, token ids) of each request."""
    return scheduler_pb2.NewTokens(
        numbers=[number for number, _, _ in rows],
        indexes=[index for _, index, _ in rows],
        counts=[len(token_ids) for _, _, token_ids in rows],
        token_ids=[token for _, _, token_ids in rows for token in token_ids],
    )


def start(table: RequestTable, request_id: str, number: int, scheduler: str = "s", attempt: int = 1) -> None:
    event = Event(request_id=request_id, attempt=attempt, number=number, started=Event.Started())
    assert table.handle(event, scheduler) is None


async def test_new_tokens_reach_the_requests_that_their_numbers_stand_for(table: RequestTable) -> None:
    first, second = opened(table, "first"), opened(table, "second")
    start(table, "first", 5)
    start(table, "second", 9)
    assert table.receive(new((5, 0, [1, 2]), (9, 0, [3])), "s") == []
    assert table.receive(new((9, 1, [4]), (5, 1, [2, 6])), "s") == [], "what is here already is dropped"
    assert (await first.take()).token_ids == [1, 2, 6]
    assert (await second.take()).token_ids == [3, 4]


async def test_new_tokens_with_a_gap_fail_their_request_alone(table: RequestTable) -> None:
    first, second = opened(table, "first"), opened(table, "second")
    start(table, "first", 5)
    start(table, "second", 9)
    (answer,) = table.receive(new((5, 1, [1]), (9, 0, [3])), "s")
    assert answer.cancel.request_id == "first"
    with pytest.raises(Internal):
        await first.take()
    assert (await second.take()).token_ids == [3]


async def test_new_tokens_of_an_older_attempt_are_dropped(table: RequestTable) -> None:
    live = opened(table)
    start(table, "r", 5, "old")
    table.receive(new((5, 0, [1])), "old")
    query = Event(request_id="r", attempt=2, number=5, resume_query=Event.ResumeQuery())
    answer = table.handle(query, "young")
    assert answer is not None and list(answer.resume.emitted_tokens) == [1]
    assert table.receive(new((5, 1, [7])), "old") == [], "nor is it cancelled: the request lives"
    assert table.receive(new((5, 1, [2])), "young") == []
    assert (await live.take()).token_ids == [1, 2]


def test_a_number_that_stands_for_nobody_is_cancelled(table: RequestTable) -> None:
    live = opened(table)
    start(table, "r", 5)
    table.close(live)
    (answer,) = table.receive(new((5, 0, [1])), "s")
    assert answer.cancel.number == 5
    opened(table)
    start(table, "r", 6)
    table.begin("s")
    (answer,) = table.receive(new((6, 0, [1])), "s")
    assert answer.cancel.number == 6, "numbers mean nothing in a new stream until they are told again"
