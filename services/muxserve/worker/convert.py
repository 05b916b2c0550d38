"""Between the worker's values and `muxserve.v1`. No logic."""

from __future__ import annotations

from collections.abc import Mapping

from muxserve.common.errors import InvalidArgument
from muxserve.engine.messages import LENGTH, STOP, UNFINISHED, Sampling, TokenLogprobs
from muxserve.v1 import common_pb2, worker_pb2
from muxserve.worker.executors import ExecutorProcess
from muxserve.worker.models import LoadedModel, ModelChoice
from muxserve.worker.orders import (
    Chunk,
    DecodeOrder,
    Ended,
    Opening,
    Outcome,
    PrefillOrder,
    QuotasInForce,
    Refused,
)
from muxserve.worker.pacing import Progress
from muxserve.worker.prefix_cache import PrefixCounts
from muxserve.worker.shapes import ServedShape
from muxserve.worker.worker import PoolReport, Worker

_STATES = {
    UNFINISHED: worker_pb2.SEQUENCE_STATE_RUNNING,
    STOP: worker_pb2.SEQUENCE_STATE_STOP,
    LENGTH: worker_pb2.SEQUENCE_STATE_LENGTH,
}
_OUTCOMES = {each: worker_pb2.JobOutcome.Value(f"JOB_OUTCOME_{each.name}") for each in Outcome}
_REASONS = {each: worker_pb2.RefusalReason.Value(f"REFUSAL_REASON_{each.name}") for each in Refused}


def choice(config: common_pb2.ModelConfig) -> ModelChoice:
    """What is to be loaded. Raises InvalidArgument for a field that is required and empty."""
    for field in ("name", "path"):
        if not getattr(config, field):
            raise InvalidArgument(f"model.{field}", "required")
    return ModelChoice(
        name=config.name,
        path=config.path,
        dtype=config.dtype or "auto",
        max_context=config.max_context,
        quota=config.quota_blocks,
    )


def shape(served: ServedShape) -> common_pb2.ModelShape:
    """What a model is on this worker."""
    spec = served.weights.spec
    return common_pb2.ModelShape(
        architecture=spec.architecture,
        dtype=spec.dtype,
        context_length=served.context_length,
        vocab_size=spec.vocab_size,
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        weight_bytes=served.weights.bytes,
        tokens_per_block=served.layout.tokens_per_block,
        blocks_per_span=served.layout.blocks_per_span,
        eos_token_ids=spec.eos_token_ids,
        slots=served.slots,
    )


def opening(message: worker_pb2.OpenSequence) -> Opening:
    """A sequence to open."""
    params = message.sampling
    sampling = Sampling(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        prompt_length=message.prompt_length,
        logprobs=message.logprobs if message.HasField("logprobs") else -1,
        stop_token_ids=tuple(message.stop_token_ids),
    )
    return Opening(message.sequence, message.model, tuple(message.token_ids), message.limit, sampling)


def prefill_order(message: worker_pb2.PrefillJob) -> PrefillOrder:
    """A prefill job. Raises InvalidArgument for a share that is none."""
    chunks = tuple(Chunk(chunk.sequence, chunk.start, chunk.end) for chunk in message.chunks)
    share = _share(message.share)
    return PrefillOrder(message.job, message.model, chunks, share, message.borrow, message.lead_seconds)


def decode_order(message: worker_pb2.DecodeJob) -> DecodeOrder:
    """A decode job; 0 steps are read as 1. Raises InvalidArgument for a share that is none."""
    steps = max(1, message.steps)
    sequences = tuple(message.sequences)
    return DecodeOrder(
        message.job,
        message.model,
        sequences,
        steps,
        _share(message.share),
        message.lead,
        message.borrow,
        message.exclusive,
        frozenset(message.prompts),
    )


def _share(share: float) -> float:
    if not 0.0 < share <= 1.0:
        raise InvalidArgument("share", f"{share} is not in (0, 1]")
    return share


def step_events(progress: Progress) -> worker_pb2.StepEvents:
    """Tokens of a job."""
    runs = progress.runs
    token_ids = [token for run in runs.values() for token in run.tokens]
    return worker_pb2.StepEvents(
        job=progress.job,
        steps=progress.steps,
        sequences=runs,
        positions=[run.position for run in runs.values()],
        counts=[len(run.tokens) for run in runs.values()],
        token_ids=token_ids,
        states=[_STATES[run.finished] for run in runs.values()],
        logprobs=[_logprobs(*each) for each in zip(token_ids, progress.logprobs, strict=False)],
    )


def _logprobs(token: int, found: TokenLogprobs | None) -> common_pb2.Logprobs:
    if found is None:
        return common_pb2.Logprobs()
    pairs = zip(found.top_ids, found.top_logprobs, strict=True)
    return common_pb2.Logprobs(
        chosen=common_pb2.TokenLogprob(token_id=token, logprob=found.logprob),
        top=[common_pb2.TokenLogprob(token_id=each, logprob=logprob) for each, logprob in pairs],
    )


def job_done(ended: Ended) -> worker_pb2.JobDone:
    """A job's end."""
    refused = [worker_pb2.Refusal(sequence=number, reason=_REASONS[why]) for number, why in ended.refused]
    return worker_pb2.JobDone(
        job=ended.job,
        outcome=_OUTCOMES[ended.outcome],
        steps=ended.steps,
        seconds=ended.seconds,
        refused=refused,
        error=ended.error,
        available_blocks=ended.available_blocks,
        cached_tokens=ended.cached_tokens,
    )


def quotas_in_force(quotas: QuotasInForce) -> worker_pb2.QuotasInForce:
    """What became of quotas."""
    return worker_pb2.QuotasInForce(revision=quotas.revision, above=quotas.above)


def worker_info(worker: Worker) -> worker_pb2.WorkerInfo:
    """State of the worker."""
    ready = next((executor.ready for executor in worker.lanes.executors if executor.ready), None)
    return worker_pb2.WorkerInfo(
        worker_id=worker.settings.id,
        incarnation=worker.incarnation,
        device=ready.device if ready else "",
        compute_units=worker.device.units,
        partition=ready.partition if ready else "",
        pool=_pool_state(worker.pool_report(), {m.name: m.prefix_counts for m in worker.models.loaded}),
        models=[_loaded(model) for model in worker.models.loaded],
        executors=[_executor(executor) for executor in worker.lanes.executors],
        weight_budget_bytes=worker.weights.budget,
        prompts_join=worker.settings.device == "cpu",
    )


def _loaded(model: LoadedModel) -> worker_pb2.LoadedModel:
    return worker_pb2.LoadedModel(
        model=model.name, shape=shape(model.shape), open_sequences=model.open_sequences
    )


def _executor(executor: ExecutorProcess) -> worker_pb2.ExecutorInfo:
    return worker_pb2.ExecutorInfo(kind=executor.kind, pid=executor.pid, restarts=executor.restarts)


def _pool_state(report: PoolReport, prefixes: Mapping[str, PrefixCounts]) -> worker_pb2.PoolState:
    pool = report.pool
    none = PrefixCounts()
    uses = [(model, pool.use(model), prefixes.get(model, none)) for model in pool.models]
    return worker_pb2.PoolState(
        block_bytes=report.block_bytes,
        total_blocks=pool.blocks,
        free_blocks=pool.free_blocks,
        cached_blocks=pool.cached_blocks,
        models=[
            worker_pb2.ModelBlocks(
                model=model,
                held_blocks=use.held,
                quota_blocks=use.quota,
                borrowed_blocks=use.borrowed,
                peak_blocks=use.peak,
                cached_blocks=use.cached,
                prefix_query_tokens=counts.queried,
                prefix_hit_tokens=counts.hit,
            )
            for model, use, counts in uses
        ],
        integrity_error=report.integrity_error,
    )
