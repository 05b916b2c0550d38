"""Popularity by a power law: goodput, throughput, and everybody beside everybody at the same loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from benchmarks.multiplex.measuring import Cell, Field, Tell
from benchmarks.multiplex.plan import Plan
from benchmarks.multiplex.systems import VLLM
from muxserve.bench.report import as_json
from muxserve.bench.search import Goodput

FLOOD = 12.0
"""Arrivals of the saturated measurement, in requests per unloaded mean latency: far above what two cores can
do, whatever the batch."""

SEARCH_FROM = 0.7
"""Of a system's saturated throughput: where its search begins."""


@dataclass
class Skew:
    """What was measured at one α."""

    alpha: float
    ours: str
    """The system that is compared with the others."""
    saturated: list[Cell] = field(default_factory=list)
    """No deadlines, more arrivals than anybody can serve; one cell of each system a round."""
    goodputs: dict[str, Goodput] = field(default_factory=dict)
    cells: dict[float, list[Cell]] = field(default_factory=dict)
    """By load, in parts of our own saturated throughput."""
    unloaded: dict[str, Any] = field(default_factory=dict)

    def throughput(self, system: str) -> float:
        """Output tokens per second, saturated; on average over the rounds."""
        return mean(cell.token_rate for cell in self.saturated if cell.system == system)

    def ended(self, system: str) -> float:
        """Requests that ended per second, saturated."""
        return mean(cell.report.total.request_rate for cell in self.saturated if cell.system == system)

    def ratios(self) -> dict[str, float | None]:
        """Ours over theirs; None where theirs is 0 or was not measured. Of one whom no rate suited that was
        tried the lowest of those counts: the ratio is at least that."""
        found: dict[str, float | None] = {}
        for name, theirs in self.goodputs.items():
            if name != self.ours:
                rate = theirs.rate or theirs.below or 0.0
                found[f"goodput_vs_{name}"] = _over(self.goodputs[self.ours].rate, rate)
        rivals = {cell.system for cell in self.saturated} - {self.ours, VLLM}
        most_tokens = max(map(self.throughput, rivals), default=0.0)
        found["throughput_vs_best"] = _over(self.throughput(self.ours), most_tokens)
        most_ended = max(map(self.ended, rivals), default=0.0)
        found["request_throughput_vs_best"] = _over(self.ended(self.ours), most_ended)
        if VLLM in self.unloaded:
            found["throughput_vs_vllm"] = _over(self.throughput(self.ours), self.throughput(VLLM))
            found["unloaded_ttft_vs_vllm"] = _over(
                self.unloaded[VLLM]["ttft"], self.unloaded[self.ours]["ttft"]
            )
        found["worst_model_attainment"] = self.worst_attainment(self.ours, 0.8)
        for name in self.goodputs:
            if name != self.ours and (mine := self._tpot(self.ours)) and (other := self._tpot(name)):
                found[f"p99_tpot_over_{name}"] = round(mine / other, 3)
        return found

    def worst_attainment(self, system: str, load: float) -> float | None:
        """Part of the worst model's requests that met their SLO at that load."""
        for cell in self.cells.get(load, []):
            if cell.system == system and cell.report.worst_model:
                worst = cell.report.models[cell.report.worst_model]
                return round(list(worst.attainment.values())[-1], 4)
        return None

    def _tpot(self, system: str) -> float | None:
        """P99 at the lightest load that was measured, if the system copes with it."""
        for cell in self.cells.get(min(self.cells, default=0.0), []):
            if cell.system == system and list(cell.report.total.attainment.values())[-1] >= 0.99:
                return cell.report.total.tpot.p99
        return None

    def as_json(self) -> dict[str, Any]:
        """For raw results."""
        return {
            "alpha": self.alpha,
            "ours": self.ours,
            "unloaded": as_json(self.unloaded),
            "ratios": self.ratios(),
            "goodputs": as_json(self.goodputs),
            "saturated": as_json(self.saturated),
            "cells": as_json(self.cells),
        }


async def measure(field: Field, plan: Plan, alpha: float, tell: Tell) -> Skew:
    """All of it, by turns. Raises Failed."""
    mix = plan.mix(alpha)
    found = Skew(alpha, field.ours)
    tell(f"alpha {alpha:g}")
    await field.calibrate(mix)
    lengths = plan.lengths
    for name, unloaded in field.unloaded.items():
        typical = round(lengths.prompt), round(lengths.output)
        found.unloaded[name] = {
            **as_json(unloaded),
            "ttft": unloaded.ttft(typical[0]),
            "latency": unloaded.latency(*typical),
        }
    flood = FLOOD / found.unloaded[field.ours]["latency"]
    there = list(field.systems)
    turns = [name for around in range(plan.rounds) for name in there[:: -1 if around % 2 else 1]]
    for name in turns:
        cell = await field.cell(name, mix, flood, plan.saturation, wait=False)
        found.saturated.append(cell)
        total = cell.report.total
        tell(f"{name}: saturated {cell.token_rate:.0f} tokens/s, {total.request_rate:.2f} requests/s ended")
    capacity = found.throughput(field.ours) / mix.mean_output(plan.seed)
    # The machine's pace changes between minutes: what is alone is measured beside what is judged by it.
    await field.calibrate(mix)
    for load in plan.loads:
        # With little time, only ours: what the others do at their own limit is told by their goodput.
        names = list(field.systems) if len(plan.loads) > 1 else [field.ours]
        for name in names:
            cell = await field.cell(name, mix, load * capacity, plan.cell, wait=True)
            found.cells.setdefault(load, []).append(cell)
            met = list(cell.report.total.attainment.values())[-1]
            tell(
                f"{name}: load {load:g} ({cell.rate:.2f} requests/s): {met:.1%} met their SLO, worst model "
                f"{found.worst_attainment(name, load)}, P99 TTFT {cell.report.total.ttft.p99:.2f} s"
            )
    if alpha == plan.alphas[-1]:
        await field.dismiss([name for name in field.systems if name not in (*plan.searched, VLLM)])
    await field.calibrate(mix)
    searched = [name for name in field.systems if name in plan.searched or name == VLLM]
    output = mix.mean_output(plan.seed)
    starts = {name: max(SEARCH_FROM * found.throughput(name) / output, 0.05 * capacity) for name in searched}
    found.goodputs = await field.goodputs(searched, mix, starts)
    return found


def _over(ours: float, theirs: float) -> float | None:
    return round(ours / theirs, 3) if theirs > 0 else None
