"""The models that are served, as the placement says, and their tokenizers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import structlog

from muxserve.common.errors import FailedPrecondition, NotFound, Unavailable
from muxserve.gateway.tokenizer import Tokenizer, TokenizerError
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2

log = structlog.get_logger(__name__)

LOADING_RETRY = 2.0
"""Seconds after which clients are told to try a model again that is loading."""
_NAMES_IN_ERROR = 20
_READY, _ASLEEP = inference_pb2.MODEL_STATE_READY, inference_pb2.MODEL_STATE_ASLEEP
_LOADING, _FAILED = inference_pb2.MODEL_STATE_LOADING, inference_pb2.MODEL_STATE_FAILED
_DRAINING = inference_pb2.MODEL_STATE_DRAINING
_RANK = {_READY: 0, _ASLEEP: 1, _LOADING: 2, _FAILED: 3}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, over all units that hold it."""

    name: str
    path: str
    """Of its checkpoint."""
    state: inference_pb2.ModelState.ValueType
    """READY if any unit has it ready; else ASLEEP if a request for it would wake it, or wait while it loads
    because another one did."""
    reason: str
    """Why it FAILED."""
    shape: common_pb2.ModelShape
    """context_length is what fits on every unit that may serve it."""
    wait: float = 0.0
    """Where it is ASLEEP: seconds that a request is likely to wait, from `room_at` on. 0: not known."""
    room_at: float = 0.0
    """Where it is ASLEEP: Unix time when there will be room for it."""

    def expected_wait(self, now: float) -> float:
        """Seconds that a request which comes at Unix time `now` is likely to wait before it is served."""
        return self.wait + max(0.0, self.room_at - now)


def served_models(placement: admin_pb2.Placement) -> dict[str, ServedModel]:
    """Models by name, sorted."""
    placed: dict[str, list[admin_pb2.PlacedModel]] = {}
    for model in (*(m for unit in placement.units for m in unit.models), *placement.unplaced):
        placed.setdefault(model.config.name, []).append(model)
    return {name: _merged(name, placed[name]) for name in sorted(placed)}


def _merged(name: str, placed: Iterable[admin_pb2.PlacedModel]) -> ServedModel:
    ranked = sorted(placed, key=lambda model: _RANK.get(_state(model), len(_RANK)))
    state = _state(ranked[0])
    alike = [model for model in ranked if _state(model) == state]
    best = min(alike, key=lambda model: (model.room_at_unix_ms, model.expected_wait_seconds))
    shape = common_pb2.ModelShape()
    shape.CopyFrom(best.shape)
    shape.context_length = min(model.shape.context_length for model in alike)
    reason = best.reason if state == _FAILED else ""
    served = ServedModel(name, best.config.path, state, reason, shape)
    if state != _ASLEEP:
        return served
    return replace(served, wait=best.expected_wait_seconds, room_at=best.room_at_unix_ms / 1000)


def _state(model: admin_pb2.PlacedModel) -> inference_pb2.ModelState.ValueType:
    """A place that was asleep and loads, or that the model leaves for another one, is to clients as one that
    is asleep: their requests wait for it."""
    if model.state == _DRAINING or (model.state == _LOADING and model.expected_wait_seconds):
        return _ASLEEP
    return model.state


class Catalog:
    """The newest placement seen.

    Tokenizers are loaded in a thread as soon as their model appears, one load per checkpoint, and forgotten
    with it.
    """

    def __init__(self, threads: ThreadPoolExecutor, changed: Callable[[], None]) -> None:
        """`changed` is called after every update."""
        self._threads = threads
        self._changed = changed
        self._known = False
        self._models: dict[str, ServedModel] = {}
        self._tokenizers: dict[str, asyncio.Task[Tokenizer | TokenizerError]] = {}

    def update(self, placement: admin_pb2.Placement) -> None:
        """Take over a newer placement."""
        self._known = placement.epoch > 0
        self._models = served_models(placement)
        paths = {model.path for model in self._models.values()}
        for path in paths - self._tokenizers.keys():
            self._tokenizers[path] = asyncio.create_task(self._load(path), name=f"load tokenizer {path}")
        for path in self._tokenizers.keys() - paths:
            del self._tokenizers[path]
        self._changed()

    @property
    def any_served(self) -> bool:
        """Whether requests for some model are taken."""
        return any(model.state in (_READY, _ASLEEP) for model in self._models.values())

    def find(self, name: str) -> ServedModel:
        """Raises NotFound, or Unavailable before the first placement is seen."""
        try:
            return self._models[name]
        except KeyError:
            if not self._known:
                raise Unavailable("no model is placed yet", LOADING_RETRY) from None
            names = list(self._models)
            more = ", ..." if len(names) > _NAMES_IN_ERROR else ""
            hint = f"there are {', '.join(names[:_NAMES_IN_ERROR])}{more}" if names else "there is none"
            raise NotFound("model", name, hint) from None

    def check(self, name: str) -> None:
        """Raises NotFound or FailedPrecondition if requests for the model that wait will never be served."""
        if self._known and self.find(name).state == _FAILED:
            raise FailedPrecondition(f'model "{name}" cannot be served: {self._models[name].reason}')

    def admit(self, name: str, seconds: float) -> ServedModel:
        """A model that may serve a request within the `seconds` that it has.

        Raises NotFound, FailedPrecondition where it has failed, and Unavailable where it loads, or is asleep
        and could not be woken in time.
        """
        model = self.find(name)
        if model.state == _READY:
            return model
        self.check(name)
        if model.state != _ASLEEP:
            raise Unavailable(f'model "{name}" is loading', LOADING_RETRY)
        wait = model.expected_wait(time.time())
        if math.isinf(wait):
            raise Unavailable(
                f'model "{name}" is asleep, and pinned models leave no room for it', LOADING_RETRY
            )
        if wait > seconds:
            raise Unavailable(
                f'model "{name}" is asleep: it is expected to take {wait:.2f} s until it is awake, and the'
                f" request has {seconds:.2f} s",
                wait,
            )
        return model

    async def tokenizer(self, model: ServedModel) -> Tokenizer:
        """Waits for it to be loaded. Raises TokenizerError."""
        task = self._tokenizers.get(model.path)
        found = await (asyncio.shield(task) if task is not None else self._load(model.path))
        if isinstance(found, TokenizerError):
            # A fresh one for each request: an exception that is raised collects tracebacks and a request id.
            raise type(found)(f'model "{model.name}": {found}')
        return found

    async def describe(self, model: ServedModel) -> inference_pb2.Model:
        """As clients see it."""
        try:
            chat = (await self.tokenizer(model)).has_chat_template
        except TokenizerError:
            chat = False
        return inference_pb2.Model(
            name=model.name,
            state=model.state,
            reason=model.reason,
            context_length=model.shape.context_length,
            architecture=model.shape.architecture,
            dtype=model.shape.dtype,
            chat=chat,
            expected_wait_seconds=model.expected_wait(time.time()) if model.state == _ASLEEP else 0.0,
        )

    async def describe_all(self) -> list[inference_pb2.Model]:
        """All models, by name."""
        return [await self.describe(model) for model in list(self._models.values())]

    async def _load(self, path: str) -> Tokenizer | TokenizerError:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, Tokenizer.load, path)
        except TokenizerError as error:
            log.warning("no tokenizer", path=path, reason=str(error))
            return error
