"""What a request must be. Pure: the first thing that is wrong is raised as InvalidArgument with the field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence

from muxserve.common.errors import InvalidArgument
from muxserve.v1 import common_pb2, inference_pb2, scheduler_pb2

MAX_MODEL_NAME = 128
MAX_REQUEST_ID = 128
MAX_TENANT = 128
MAX_PRIORITY = 100
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20


def check_request_id(request_id: str) -> None:
    """At most 128 printable ASCII characters."""
    if len(request_id) > MAX_REQUEST_ID:
        raise InvalidArgument("request_id", f"has {len(request_id)} characters; at most {MAX_REQUEST_ID}")
    if not (request_id.isascii() and request_id.isprintable()):
        raise InvalidArgument("request_id", "must be printable ASCII")


def check_tenant(tenant: str) -> None:
    """At most 128 printable ASCII characters."""
    if len(tenant) > MAX_TENANT:
        raise InvalidArgument("tenant", f"has {len(tenant)} characters; at most {MAX_TENANT}")
    if not (tenant.isascii() and (tenant.isprintable() or not tenant)):
        raise InvalidArgument("tenant", "must be printable ASCII")


def check_request(request: inference_pb2.GenerateRequest) -> None:
    """All that can be said without knowing the model."""
    if not request.model:
        raise InvalidArgument("model", "is required")
    if len(request.model) > MAX_MODEL_NAME:
        raise InvalidArgument("model", f"has {len(request.model)} characters; at most {MAX_MODEL_NAME}")
    _check_input(request)
    _check_sampling(request.sampling)
    _check_stops(request.stop)
    if len(request.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidArgument(
            "stop_token_ids", f"there are {len(request.stop_token_ids)}; at most {MAX_STOP_TOKENS}"
        )
    if request.HasField("logprobs") and request.logprobs > MAX_LOGPROBS:
        raise InvalidArgument("logprobs", f"must be 0 to {MAX_LOGPROBS}, is {request.logprobs}")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        reason = f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}, is {request.priority}"
        raise InvalidArgument("priority", reason)
    check_tenant(request.tenant)


def _check_input(request: inference_pb2.GenerateRequest) -> None:
    match request.WhichOneof("input"):
        case "prompt":
            if not request.prompt:
                raise InvalidArgument("prompt", "must not be empty")
        case "prompt_tokens":
            if not request.prompt_tokens.ids:
                raise InvalidArgument("prompt_tokens", "must not be empty")
        case "chat":
            if not request.chat.messages:
                raise InvalidArgument("chat.messages", "must not be empty")
            for index, message in enumerate(request.chat.messages):
                if not message.role:
                    raise InvalidArgument(f"chat.messages[{index}].role", "is required")
        case _:
            raise InvalidArgument("prompt", "one of prompt, prompt_tokens and chat is required")


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    if sampling.HasField("temperature"):
        _check_range("temperature", sampling.temperature, 0, 100)
    if sampling.HasField("top_p"):
        _check_range("top_p", sampling.top_p, 0, 1, open_low=True)
    _check_range("min_p", sampling.min_p, 0, 1)
    if sampling.HasField("repetition_penalty"):
        _check_range("repetition_penalty", sampling.repetition_penalty, 0, 10, open_low=True)
    _check_range("presence_penalty", sampling.presence_penalty, -2, 2)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2, 2)


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if math.isfinite(value) and (low < value or (value == low and not open_low)) and value <= high:
        return
    interval = f"{'(' if open_low else '['}{low}, {high}]"
    raise InvalidArgument(f"sampling.{name}", f"must be in {interval}, is {value:g}")


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidArgument("stop", f"there are {len(stops)} stop strings; at most {MAX_STOPS}")
    for index, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            reason = f"stop string {index} has {size} bytes; must have 1 to {MAX_STOP_BYTES}"
            raise InvalidArgument("stop", reason)


def check_fits(field: str, prompt_tokens: int, max_tokens: int, context: int) -> int:
    """How many tokens may be generated, at least 1. `field` is the one that the prompt came in."""
    if prompt_tokens >= context:
        raise InvalidArgument(
            field,
            f"the prompt has {prompt_tokens} tokens; with at least one token of output it does not fit the"
            f" model's context of {context} tokens",
        )
    if prompt_tokens + max_tokens > context:
        raise InvalidArgument(
            "max_tokens",
            f"a prompt of {prompt_tokens} tokens and {max_tokens} tokens of output are"
            f" {prompt_tokens + max_tokens}, and the model's context is {context} tokens",
        )
    return max_tokens or context - prompt_tokens


def check_vocabulary(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Every id is one of the model's."""
    if token_ids and (largest := max(token_ids)) >= vocab_size:
        reason = f"token id {largest} is not in the model's vocabulary of {vocab_size}"
        raise InvalidArgument(field, reason)


def complete_sampling(sampling: common_pb2.SamplingParams, vocab_size: int) -> common_pb2.SamplingParams:
    """The parameters with every default filled in and a seed drawn if there is none."""
    complete = common_pb2.SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    complete.MergeFrom(sampling)
    if not complete.HasField("seed"):
        complete.seed = secrets.randbits(63)
    if complete.top_k >= vocab_size:
        complete.top_k = 0
    return complete


def queued_request(
    request: inference_pb2.GenerateRequest,
    field: str,
    prompt: Sequence[int],
    shape: common_pb2.ModelShape,
) -> scheduler_pb2.QueuedRequest:
    """The request as it waits for a scheduler, but for ids and times.

    `prompt` are the token ids of what came in `field`. Checks what depends on the model.
    """
    if not prompt:
        raise InvalidArgument(field, "has no tokens")
    max_tokens = check_fits(field, len(prompt), request.max_tokens, shape.context_length)
    check_vocabulary(field, prompt, shape.vocab_size)
    check_vocabulary("stop_token_ids", request.stop_token_ids, shape.vocab_size)
    ends = [] if request.ignore_eos else shape.eos_token_ids
    return scheduler_pb2.QueuedRequest(
        model=request.model,
        prompt_tokens=prompt,
        sampling=complete_sampling(request.sampling, shape.vocab_size),
        max_tokens=max_tokens,
        stop_token_ids=sorted({*ends, *request.stop_token_ids}),
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        priority=request.priority,
        tenant=request.tenant,
    )
