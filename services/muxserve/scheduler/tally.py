"""`Tally`: what a unit has done since its scheduler began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from muxserve.scheduler.requests import Request
from muxserve.v1 import scheduler_pb2

BESIDE = 0.5
"""Part of the device that a job does not have while one of the other kind runs beside it."""


@dataclass(slots=True)
class Spent:
    """Jobs or steps, seconds of the device, and tokens that came of them."""

    runs: int = 0
    seconds: float = 0.0
    tokens: int = 0


NOTHING = Spent()


class Tally:
    """Counts, by kind of job and by model."""

    def __init__(self) -> None:
        self.jobs: Counter[str] = Counter()
        """Started, by kind."""
        self.preemptions: Counter[str] = Counter()
        """Sequences that lost their blocks and were to be recomputed."""
        self.refusals: Counter[str] = Counter()
        """Requests that were turned away."""
        self.generated: Counter[str] = Counter()
        """Tokens sampled."""
        self.prefilled: Counter[str] = Counter()
        """Prompt tokens computed, recomputation included."""
        self.finished: Counter[str] = Counter()
        """Requests that were generated to their end, and their tokens."""
        self.finished_prompt: Counter[str] = Counter()
        self.finished_output: Counter[str] = Counter()
        self.spent: dict[tuple[str, str], Spent] = {}
        """What jobs took, by kind and model."""

    def answered(self, request: Request) -> None:
        """A request was generated to its end."""
        self.finished[request.model] += 1
        self.finished_prompt[request.model] += len(request.queued.prompt_tokens)
        self.finished_output[request.model] += len(request.output)

    def took(self, kind: str, model: str, runs: int, seconds: float, beside: float, tokens: int) -> None:
        """A job of one kind alone ended well: `runs` jobs or steps in `seconds`, of which the part `beside`
        had a job of the other kind beside it, and so many tokens."""
        spent = self.spent.setdefault((kind, model), Spent())
        spent.runs += runs
        spent.tokens += tokens
        spent.seconds += seconds * (1 - BESIDE * beside)

    def status(
        self, unit: str, policy: str, connected: bool, quotas: Mapping[str, int], requests: Iterable[Request]
    ) -> scheduler_pb2.UnitStatus:
        """The unit's status; its models are those of `quotas`."""
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for request in requests:
            (waiting if request.sequence is None else running)[request.model] += 1
        models = [
            scheduler_pb2.UnitModelStatus(
                model=name,
                running=running[name],
                waiting=waiting[name],
                quota_blocks=quota,
                preemptions=self.preemptions[name],
                generated_tokens=self.generated[name],
                prefill_tokens=self.prefilled[name],
                refusals=self.refusals[name],
                finished_requests=self.finished[name],
                finished_prompt_tokens=self.finished_prompt[name],
                finished_output_tokens=self.finished_output[name],
                prefill_jobs=self.spent.get(("prefill", name), NOTHING).runs,
                prefill_seconds=self.spent.get(("prefill", name), NOTHING).seconds,
                decode_steps=self.spent.get(("decode", name), NOTHING).runs,
                decode_seconds=self.spent.get(("decode", name), NOTHING).seconds,
                prefill_job_tokens=self.spent.get(("prefill", name), NOTHING).tokens,
                decode_step_tokens=self.spent.get(("decode", name), NOTHING).tokens,
            )
            for name, quota in quotas.items()
        ]
        return scheduler_pb2.UnitStatus(
            unit=unit,
            connected=connected,
            policy=policy,
            models=models,
            prefill_jobs=self.jobs["prefill"],
            decode_jobs=self.jobs["decode"],
        )
