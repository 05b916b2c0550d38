"""What engines that run one job at a time have in common: a model's turn is its prompts, else its batch."""

from __future__ import annotations

from collections.abc import Callable

from muxserve.scheduler.policy.interface import ModelSnapshot, Waiting
from muxserve.scheduler.policy.plan import Plan

Admit = Callable[[ModelSnapshot, Waiting, int], bool]
"""Whether a prompt of the model may begin with so many blocks."""


def has_work(model: ModelSnapshot) -> bool:
    """Whether the model has anything to do."""
    return bool(model.waiting or model.running)


def oldest(model: ModelSnapshot) -> float:
    """When the oldest of the model's requests arrived."""
    return min([w.arrival for w in model.waiting] + [r.arrival for r in model.running])


def prompt_waits(plan: Plan, model: ModelSnapshot, admit: Admit) -> bool:
    """Whether a prompt of the model could be computed now."""
    return any(
        w.open or (plan.slots[model.model] and admit(model, w, model.missing(w))) for w in model.waiting
    )


def take_turn(plan: Plan, model: ModelSnapshot, budget: int, steps: int, admit: Admit) -> bool:
    """Start a job of the model where nothing runs: its next prompts, or else a lease of all that it decodes.
    Returns whether there was one to start."""
    if chunks := plan.chunks(model, plan.queue(model), budget, admit):
        plan.prefill(model, chunks, share=1.0)
        return True
    return plan.decode(model, plan.idle(model), steps, share=1.0)
