"""`ModelTable`: the models that jobs may name, and how they come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import structlog

from muxserve.common.errors import Aborted, AlreadyExists, FailedPrecondition, Internal, NotFound
from muxserve.engine.messages import AddModel
from muxserve.engine.pool import BlockPool
from muxserve.engine.tables import SequenceTables
from muxserve.worker.executors import ExecutorFailed, ExecutorProcess
from muxserve.worker.prefix_cache import PrefixCounts
from muxserve.worker.shapes import ServedShape, serve
from muxserve.worker.weights import WeightStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to serve, and how."""

    name: str
    path: str
    dtype: str = "auto"
    max_context: int = 0
    """0 = the checkpoint's own."""
    quota: int = 0
    """Blocks; 0 = none of its own until the scheduler sets one."""


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A model that jobs may name."""

    choice: ModelChoice
    shape: ServedShape
    tables: SequenceTables
    resources: AsyncExitStack
    """Gives back, in order, what loading took."""
    load_seconds: float = 0.0
    """That loading took."""
    open_sequences: int = 0
    prefix_counts: PrefixCounts = field(default_factory=PrefixCounts)

    @property
    def name(self) -> str:
        """The name that it is served under."""
        return self.choice.name


class ModelTable:
    """Loads and unloads models; one load or unload of a name at a time. `on_change`: the set has changed."""

    def __init__(
        self,
        pool: BlockPool,
        store: WeightStore,
        executors: Sequence[ExecutorProcess],
        *,
        block_bytes: int,
        slots: int,
        on_change: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._store = store
        self._executors = executors
        self._block_bytes = block_bytes
        self._slots = slots
        self._on_change = on_change
        self._loaded: dict[str, LoadedModel] = {}
        self._loads: dict[str, tuple[ModelChoice, asyncio.Task[LoadedModel]]] = {}
        self._unloads: dict[str, asyncio.Task[None]] = {}
        self._quotas: dict[str, int] = {}

    @property
    def loaded(self) -> list[LoadedModel]:
        """Models that jobs may name."""
        return list(self._loaded.values())

    def get(self, name: str) -> LoadedModel | None:
        """The model, if jobs may name it."""
        return self._loaded.get(name)

    async def inspect(self, choice: ModelChoice) -> ServedShape:
        """What serving the model would take. Raises InvalidArgument."""
        weights = await self._store.inspect(choice.path, choice.dtype)
        return serve(
            choice.name,
            weights,
            block_bytes=self._block_bytes,
            blocks=self._pool.blocks,
            slots=self._slots,
            max_context=choice.max_context,
        )

    async def load(self, choice: ModelChoice) -> LoadedModel:
        """Load the model; calls for one name share one load, which goes on if a caller gives up.

        Raises InvalidArgument, Overloaded if its weights do not fit, AlreadyExists if the name is another
        checkpoint's, Aborted if it is unloaded meanwhile, Internal.
        """
        if (leaving := self._unloads.get(choice.name)) is not None:
            await asyncio.shield(leaving)
        if (model := self._loaded.get(choice.name)) is not None:
            _check_same(choice, model.choice)
            return model
        if (load := self._loads.get(choice.name)) is not None:
            _check_same(choice, load[0])
            return await _result(load[1])
        task = asyncio.create_task(self._load(choice), name=f"model-{choice.name}")
        self._loads[choice.name] = (choice, task)
        task.add_done_callback(lambda done: self._load_ended(choice.name, done))
        return await _result(task)

    async def unload(self, name: str) -> None:
        """Returns when nothing of the model is left; a load that is going on is given up.

        Raises NotFound, FailedPrecondition while sequences are open.
        """
        if (leaving := self._unloads.get(name)) is not None:
            return await asyncio.shield(leaving)
        if (load := self._loads.get(name)) is not None:
            load[1].cancel()
            await asyncio.wait((load[1],))
            return None
        model = self._loaded.get(name)
        if model is None:
            raise NotFound("model", name)
        if model.open_sequences:
            raise FailedPrecondition(f'model "{name}" has {model.open_sequences} open sequences')
        del self._loaded[name]
        self._on_change()
        task = self._unloads[name] = asyncio.create_task(model.resources.aclose(), name=f"unload-{name}")
        task.add_done_callback(lambda _: self._unloads.pop(name))
        await asyncio.shield(task)
        log.info("model unloaded", model=name)
        return None

    def set_quotas(self, blocks: Mapping[str, int]) -> None:
        """Quotas by model name; those of models that are not loaded hold when they are."""
        self._quotas.update(blocks)
        for name, quota in blocks.items():
            if name in self._pool.models:
                self._pool.set_quota(name, quota)

    async def stop(self) -> None:
        """Give up loads and give back the memory of every model; all sequences must be closed."""
        for _, task in list(self._loads.values()):
            task.cancel()
            await asyncio.wait((task,))
        for leaving in list(self._unloads.values()):
            await asyncio.wait((leaving,))
        for name in list(self._loaded):
            await self._loaded.pop(name).resources.aclose()

    async def _load(self, choice: ModelChoice) -> LoadedModel:
        name = choice.name
        clock = asyncio.get_running_loop().time
        began = clock()
        shape = await self.inspect(choice)
        async with AsyncExitStack() as undo:
            weights = await self._store.acquire(name, choice.path, shape.weights)
            undo.push_async_callback(self._store.release, shape.weights)
            tables = SequenceTables.create(shape.layout, shape.slots, shape.context_length)
            undo.callback(tables.close)
            self._pool.register(name, shape.layout, choice.quota or self._quotas.get(name, self._pool.blocks))
            undo.callback(self._pool.unregister, name)
            message = AddModel(
                name,
                shape.weights.spec,
                shape.layout,
                shape.slots,
                shape.context_length,
                shape.weights.manifest,
                shape.weights.layout,
                weights.handle,
            )
            for executor in self._executors:
                undo.push_async_callback(executor.remove_model, name)
            try:
                descriptors = (*weights.descriptors, tables.fd)
                await asyncio.gather(*(e.add_model(message, descriptors) for e in self._executors))
            except ExecutorFailed as error:
                raise Internal(f'model "{name}" was loaded but not accepted: {error}') from error
            return LoadedModel(choice, shape, tables, undo.pop_all(), clock() - began)
        raise AssertionError("AsyncExitStack swallows no exception")

    def _load_ended(self, name: str, task: asyncio.Task[LoadedModel]) -> None:
        del self._loads[name]
        if not task.cancelled() and task.exception() is None:
            self._loaded[name] = task.result()
            log.info("model loaded", model=name, context=task.result().shape.context_length)
            self._on_change()


async def _result(load: asyncio.Task[LoadedModel]) -> LoadedModel:
    """Of a load that is not this caller's alone."""
    try:
        return await asyncio.shield(load)
    except asyncio.CancelledError:
        if load.cancelled():
            raise Aborted("the model was unloaded while it was loading") from None
        raise


def _check_same(choice: ModelChoice, present: ModelChoice) -> None:
    """A name is one checkpoint's, in one dtype; the rest may differ and is not changed by loading again."""
    if (choice.path, choice.dtype) != (present.path, present.dtype):
        raise AlreadyExists(f'model "{choice.name}" is {present.path} in dtype {present.dtype}')
