"""muxserve.v1 inference messages to and from the values of this SDK."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack
from uuid import uuid4

import grpc

from muxserve.v1 import common_pb2, inference_pb2

from .errors import InternalError, InvalidRequest, RequestTooLarge
from .options import ARGUMENT_FIELDS, SAMPLING_FIELDS, Arguments, Sampling
from .results import (
    Chunk,
    Completion,
    FinishReason,
    Logprobs,
    Message,
    Model,
    ModelState,
    TokenLogprob,
    Usage,
)

_FINISH = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
    common_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
}
_STATES = {
    inference_pb2.MODEL_STATE_LOADING: ModelState.LOADING,
    inference_pb2.MODEL_STATE_READY: ModelState.READY,
    inference_pb2.MODEL_STATE_FAILED: ModelState.FAILED,
    inference_pb2.MODEL_STATE_ASLEEP: ModelState.ASLEEP,
    inference_pb2.MODEL_STATE_DRAINING: ModelState.DRAINING,
}


@contextmanager
def naming(field: str) -> Iterator[None]:
    """InvalidRequest that names `field`, where protobuf will not have a value that is written inside."""
    try:
        yield
    except (KeyError, AttributeError) as error:
        raise InvalidRequest.of(field, "is missing") from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest.of(field, str(error)) from error


def _write_sampling(message: common_pb2.SamplingParams, arguments: Mapping[str, Any]) -> None:
    base = arguments.get("sampling") or Sampling()
    for name in SAMPLING_FIELDS:
        value = arguments.get(name)
        value = getattr(base, name) if value is None else value
        if value is not None:
            with naming(f"sampling.{name}"):
                setattr(message, name, value)


def _write_chat(chat: inference_pb2.Chat, messages: Iterable[Message | Mapping[str, str]]) -> None:
    chat.SetInParent()
    for number, turn in enumerate(messages):
        added = chat.messages.add()
        for name in ("role", "content"):
            with naming(f"chat.messages[{number}].{name}"):
                setattr(added, name, turn[name] if isinstance(turn, Mapping) else getattr(turn, name))


def completion_request(
    model: str,
    *,
    prompt: str | None = None,
    prompt_tokens: Sequence[int] | None = None,
    messages: Iterable[Message | Mapping[str, str]] | None = None,
    **arguments: Unpack[Arguments],
) -> inference_pb2.GenerateRequest:
    """The request of a generation, without a request id unless one was given.

    InvalidRequest: a value has the wrong type or does not fit its field, or there is not exactly one input.
    Ranges are for the server to check. TypeError: an unknown keyword.
    """
    if unknown := sorted(arguments.keys() - ARGUMENT_FIELDS):
        raise TypeError(f"unexpected keyword argument: {', '.join(unknown)}")
    if sum(given is not None for given in (prompt, prompt_tokens, messages)) != 1:
        raise InvalidRequest.of("prompt", "give exactly one of prompt and prompt_tokens")
    request = inference_pb2.GenerateRequest()
    with naming("model"):
        request.model = model
    if prompt is not None:
        with naming("prompt"):
            request.prompt = prompt
    elif prompt_tokens is not None:
        request.prompt_tokens.SetInParent()
        with naming("prompt_tokens.ids"):
            request.prompt_tokens.ids.extend(prompt_tokens)
    else:
        _write_chat(request.chat, messages or ())
    _write_sampling(request.sampling, arguments)
    stop = arguments.get("stop")
    with naming("stop"):
        request.stop.extend([stop] if isinstance(stop, str) else stop or ())
    with naming("stop_token_ids"):
        request.stop_token_ids.extend(arguments.get("stop_token_ids") or ())
    for name in ("max_tokens", "ignore_eos", "logprobs", "request_id", "priority", "tenant"):
        if (value := arguments.get(name)) is not None:
            with naming(name):
                setattr(request, name, value)
    return request


def new_request_id() -> str:
    """A request id for an attempt whose caller gave none."""
    return f"req-{uuid4().hex}"


def largest_field(request: inference_pb2.GenerateRequest) -> str:
    """The field that takes most of the message: the one to blame where it is too large."""
    sizes = {
        "prompt": len(request.prompt),
        "prompt_tokens": request.prompt_tokens.ByteSize(),
        "chat": request.chat.ByteSize(),
        "stop": sum(map(len, request.stop)),
        "stop_token_ids": len(request.stop_token_ids),
    }
    return max(sizes, key=sizes.__getitem__)


def check_size(request: inference_pb2.GenerateRequest, limit: int) -> None:
    """RequestTooLarge if the message is larger than `limit` bytes."""
    if (size := request.ByteSize()) > limit:
        field = largest_field(request)
        description = f"the message is {size} bytes, more than the {limit} that the client sends"
        raise RequestTooLarge.of(field, description, request.request_id or None)


def _logprob(message: common_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob)


def chunk_of(message: inference_pb2.GenerateResponse) -> Chunk:
    """A piece of an answer."""
    reason = message.finish_reason
    return Chunk(
        text=message.text,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            Logprobs(_logprob(entry.chosen), tuple(map(_logprob, entry.top))) for entry in message.logprobs
        ),
        finish_reason=_FINISH.get(reason, FinishReason.UNKNOWN) if reason else None,
        request_id=message.request_id,
    )


def model_of(message: inference_pb2.Model) -> Model:
    """A model."""
    return Model(
        name=message.name,
        state=state_of(message.state),
        reason=message.reason,
        context_length=message.context_length,
        architecture=message.architecture,
        dtype=message.dtype,
        chat=message.chat,
        expected_wait=message.expected_wait_seconds,
    )


def state_of(state: int) -> ModelState:
    """A model's state."""
    return _STATES.get(state, ModelState.UNKNOWN)  # type: ignore[call-overload,no-any-return]


class Assembly:
    """Puts the pieces of one answer together, and makes sure that none is missing, repeated or out of
    order."""

    def __init__(self, model: str, request_id: str) -> None:
        self.request_id = request_id
        self._model = model
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._last: inference_pb2.GenerateResponse | None = None
        self.begun = False
        """Whether anything was received: from then on the call cannot be tried again."""

    def add(self, message: inference_pb2.GenerateResponse) -> Chunk:
        """Take the next piece. InternalError: it does not continue the ones before."""
        self.begun = True
        self.request_id = message.request_id or self.request_id
        if message.index != len(self._tokens) or self._last is not None:
            raise self._fault(f"the stream broke: piece {message.index} after {len(self._tokens)} tokens")
        chunk = chunk_of(message)
        self._text.append(chunk.text)
        self._tokens += chunk.token_ids
        self._logprobs += chunk.logprobs
        if message.finish_reason:
            self._last = message
        return chunk

    def completion(self) -> Completion:
        """The whole answer. InternalError: it has not ended."""
        if self._last is None:
            raise self._fault("the stream ended without a finish reason")
        usage = self._last.usage
        return Completion(
            model=self._model,
            text="".join(self._text),
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish_reason=_FINISH.get(self._last.finish_reason, FinishReason.UNKNOWN),
            stop_string=self._last.stop_string,
            usage=Usage(usage.prompt_tokens, usage.completion_tokens),
            request_id=self.request_id,
        )

    def _fault(self, message: str) -> InternalError:
        return InternalError(message, code=grpc.StatusCode.INTERNAL, request_id=self.request_id)
