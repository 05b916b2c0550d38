"""Policies: pure objects that decide what a unit does next. Selected by name."""

from __future__ import annotations

from muxserve.scheduler.policy.adbs import Adbs
from muxserve.scheduler.policy.fcfs import Fcfs
from muxserve.scheduler.policy.interface import Policy, PolicyOptions
from muxserve.scheduler.policy.mux import Mux
from muxserve.scheduler.policy.round_robin import RoundRobin
from muxserve.scheduler.policy.spatial import Spatial
from muxserve.scheduler.policy.temporal import Temporal

POLICIES = {policy.name: policy for policy in (Adbs, Fcfs, Mux, RoundRobin, Spatial, Temporal)}


def create(name: str, options: PolicyOptions) -> Policy:
    """A policy for one unit. KeyError: no such name."""
    return POLICIES[name](options)
