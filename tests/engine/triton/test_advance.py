"""What a decode step leaves for the next, and for the host."""

from __future__ import annotations

import torch

from muxserve.engine.kernels.triton.advance import ABSENT, BAD_SHIFT, FINISHED_SHIFT, advance
from muxserve.engine.kernels.triton.sample import DeviceSampled
from muxserve.engine.messages import LENGTH, STOP


def sampled(device: torch.device) -> DeviceSampled:
    """Rows that go on, stop, are full, have failed, and are not there."""
    return DeviceSampled(
        torch.tensor([7, 8, 200_000, 3, 9], device=device),
        torch.tensor([0, STOP, LENGTH, 0, 0], dtype=torch.int8, device=device),
        torch.tensor([0, 0, 0, 1, 0], dtype=torch.int8, device=device),
    )


OUTCOME = [7, 8 | STOP << FINISHED_SHIFT, 200_000 | LENGTH << FINISHED_SHIFT, 3 | 1 << BAD_SHIFT]


def test_rows_that_go_on_are_ready_and_others_are_gone(device: torch.device) -> None:
    outcome = torch.zeros(5, dtype=torch.int64, device=device)
    lengths = torch.tensor([4, 5, 6, 7, 0], device=device)
    positions, tokens = lengths - 1, torch.full_like(lengths, 1)
    history = torch.zeros(5, 8, dtype=torch.int32, device=device)
    advance(sampled(device), outcome, lengths, positions, tokens, history)
    assert outcome.tolist() == [*OUTCOME, ABSENT]
    assert lengths.tolist() == [5, 0, 0, 0, 0]
    assert positions.tolist() == [4, -1, -1, -1, -1]
    assert tokens.tolist() == [7, 1, 1, 1, 1]
    assert history.nonzero().tolist() == [[0, 4]]
    assert history[0, 4] == 7
    advance(sampled(device), outcome, lengths, positions, tokens, history)
    assert outcome.tolist() == [7, ABSENT, ABSENT, ABSENT, ABSENT]


def test_history_ends_where_it_does(device: torch.device) -> None:
    outcome = torch.zeros(5, dtype=torch.int64, device=device)
    lengths = torch.tensor([8, 0, 0, 0, 0], device=device)
    history = torch.zeros(5, 8, dtype=torch.int32, device=device)
    advance(sampled(device), outcome, lengths, lengths.clone(), lengths.clone(), history)
    assert lengths[0] == 9
    assert not history.any()


def test_a_prefill_moves_nothing(device: torch.device) -> None:
    outcome = torch.zeros(5, dtype=torch.int64, device=device)
    advance(sampled(device), outcome)
    assert outcome.tolist() == [*OUTCOME, 9]
