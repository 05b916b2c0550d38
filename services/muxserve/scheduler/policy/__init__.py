"""Policies: pure objects that decide what a unit does next. Selected by name."""

from __future__ import annotations

from muxserve.scheduler.policy.adbs import Adbs
from muxserve.scheduler.policy.fcfs import Fcfs
from muxserve.scheduler.policy.interface import Policy, PolicyOptions

POLICIES = {policy.name: policy for policy in (Adbs, Fcfs)}


def create(name: str, options: PolicyOptions) -> Policy:
    """A policy for one unit. KeyError: no such name."""
    return POLICIES[name](options)
