"""Stop strings across the borders of pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxserve.gateway.stops import StopMatcher


def in_pieces(text: str, stops: list[str], cuts: list[int]) -> tuple[str, str | None, list[str]]:
    """(text shown, stop string found, pieces shown) when `text` comes cut at `cuts`."""
    matcher, shown, borders = StopMatcher(stops), [], sorted({0, *cuts, len(text)})
    for start, end in itertools.pairwise(borders):
        scan = matcher.push(text[start:end])
        shown.append(scan.text)
        if scan.stop is not None:
            return "".join(shown), scan.stop, shown
    shown.append(matcher.flush())
    return "".join(shown), None, shown


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Straight from the definition: the first end of a stop string; the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), max_size=5),
    cuts=st.lists(st.integers(0, 40), max_size=40),
)
@settings(max_examples=1000, deadline=None)
def test_the_result_does_not_depend_on_the_borders(text: str, stops: list[str], cuts: list[int]) -> None:
    cuts = [min(cut, len(text)) for cut in cuts]
    shown, stop, _ = in_pieces(text, stops, cuts)
    assert (shown, stop) == expected(text, stops)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
@settings(max_examples=500, deadline=None)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher, shown = StopMatcher(stops), ""
    for end, character in enumerate(text, 1):
        scan = matcher.push(character)
        if scan.stop is not None:
            return
        shown += scan.text
        held = text[len(shown) : end]
        longest = max(
            (text[start:end] for start in range(end) if any(s.startswith(text[start:end]) for s in stops)),
            key=len,
            default="",
        )
        assert held == longest


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stop"),
    [
        ("hello\n\nworld", ["\n\n"], "hello", "\n\n"),
        ("hello\nworld", ["\n\n"], "hello\nworld", None),
        ("abcd", ["bc", "abcd"], "a", "bc"),
        ("xabc", ["abc", "c"], "x", "abc"),
        ("stop", [], "stop", None),
        ("日本😀語", ["😀"], "日本", "😀"),
    ],
)
def test_examples(text: str, stops: list[str], shown: str, stop: str | None) -> None:
    assert in_pieces(text, stops, list(range(len(text))))[:2] == (shown, stop)
