"""What the ranks hold, put together, is the model; and no rank's memory holds more than its part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from muxserve.engine.checkpoint import Checkpoint, open_checkpoint
from muxserve.engine.checkpoint.canonical import canonical_tensors
from muxserve.engine.parallel.checkpoint import shard_checkpoint
from muxserve.engine.parallel.shard import Shard, ShardError
from muxserve.engine.spec import LayerSpec, ModelSpec
from tests.engine.gguf_factory import write_gguf
from tests.engine.model_factory import FAMILIES, Family, make_model

Array = NDArray[np.generic]


def make_spec(**fields: object) -> ModelSpec:
    spec = ModelSpec(
        architecture="llama",
        dtype="float32",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        heads=8,
        kv_heads=4,
        head_dim=16,
        context_length=128,
        layers=(LayerSpec(),),
        ropes=(),
        rms_eps=1e-6,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=True,
        post_norms=True,
    )
    return msgspec.structs.replace(spec, **fields)


@given(
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 6),
    head_dim=st.sampled_from([2, 64]),
    inner=st.integers(1, 5),
    vocabulary=st.integers(500, 700),
)
def test_every_weight_is_on_one_rank_or_on_as_many_as_need_it(
    ranks: int, kv_heads: int, group: int, head_dim: int, inner: int, vocabulary: int
) -> None:
    spec = make_spec(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner * ranks,
        vocab_size=vocabulary,
    )
    try:
        shards = [Shard(spec, rank, ranks) for rank in range(ranks)]
    except ShardError as error:
        assert error.field in ("heads", "kv_heads")
        assert spec.heads % ranks or (kv_heads % ranks and ranks % kv_heads)
        return
    copies = max(1, ranks // kv_heads)
    for tensor in canonical_tensors(spec):
        whole = tensor.role in ("embed", "o_bias", "down_bias") or tensor.role.endswith("norm")
        for part, shape in enumerate(tensor.parts):
            count = np.zeros(shape, np.int64)
            for shard in shards:
                axes = shard.cuts(tensor)[part].axes
                count[tuple(slice(axis.start, axis.stop) for axis in axes)] += 1
            repeated = copies if tensor.role.startswith("qkv") and part > 0 else 1
            assert (count == (ranks if whole else repeated)).all(), tensor.name
    for shard in shards:
        # Each query head reads the KV head that it reads in the whole model.
        local = shard.spec.heads // shard.spec.kv_heads
        for head in range(shard.spec.heads):
            assert shard.kv_heads.start + head // local == (shard.heads.start + head) // group
        assert shard.spec == shards[0].spec


def joined(parts: list[Array], role: str, inner: int, spec: ModelSpec, ranks: int) -> Array:
    """Ranks' tensors of one role as the whole one, put together without a look at how they were cut."""
    if role in ("o", "down"):
        return np.concatenate(parts, axis=1)
    if role == "lm_head":
        return np.concatenate(parts)
    if role.startswith("gate_up"):
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([half[i] for i in range(2) for half in halves])
    if role.startswith("qkv"):
        query = spec.heads // ranks * spec.head_dim
        once = parts[:: max(1, ranks // spec.kv_heads)]
        keys, values = zip(*(np.split(part[query:], 2) for part in once), strict=True)
        return np.concatenate([*(part[:query] for part in parts), *keys, *values])
    assert all((part == parts[0]).all() for part in parts)
    return parts[0]


def assert_whole(checkpoint: Checkpoint, ranks: int) -> None:
    spec = checkpoint.spec
    shards = [dict(shard_checkpoint(checkpoint, rank, ranks).tensors()) for rank in range(ranks)]
    for name, want in checkpoint.tensors():
        role = name.split(".")[-1]
        got = joined([shard[name] for shard in shards], role, spec.intermediate_size, spec, ranks)
        assert got.dtype == want.dtype
        assert np.array_equal(got, want), name


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_load_a_checkpoint_between_them(tmp_path: Path, family: Family) -> None:
    make_model(family, tmp_path, heads=8, kv_heads=2, layers=2, bias=True, tie=False)
    checkpoint = open_checkpoint(tmp_path, "bfloat16")
    for ranks in (1, 2, 4):
        assert_whole(checkpoint, ranks)


def test_ranks_load_a_quantised_file_between_them(tmp_path: Path) -> None:
    make_model("llama", tmp_path, head_dim=32, heads=6, kv_heads=3, layers=2)
    path = write_gguf(tmp_path, tmp_path / "m.gguf", kind=GGMLQuantizationType.Q8_0)
    assert_whole(open_checkpoint(path, "float32"), 3)


@pytest.mark.parametrize("tie", [False, True])
def test_a_rank_holds_its_part_of_the_memory_and_the_embedding(tmp_path: Path, tie: bool) -> None:
    make_model("llama", tmp_path, heads=4, kv_heads=4, layers=3, tie=tie)
    checkpoint = open_checkpoint(tmp_path, "float32")
    embedding = checkpoint.spec.vocab_size * checkpoint.spec.hidden_size * 4
    for rank in range(4):
        part = shard_checkpoint(checkpoint, rank, 4)
        split = part.weight_bytes() - embedding
        assert split < 1.05 * (checkpoint.weight_bytes() - embedding) / 4


@pytest.mark.parametrize(
    ("fields", "rank", "ranks", "field", "reason"),
    [
        ({}, 0, 0, "ranks", "at least 1"),
        ({}, 2, 2, "rank", r"in \[0, 2\), got 2"),
        ({"heads": 12, "kv_heads": 6}, 0, 4, "kv_heads", "6 KV heads do not spread evenly over 4 ranks"),
        ({"heads": 6, "kv_heads": 2}, 0, 4, "heads", "6 attention heads do not divide into 4 ranks"),
        ({"intermediate_size": 97}, 0, 2, "intermediate_size", "97 columns do not divide into 2 ranks"),
        ({"vocab_size": 24}, 0, 4, "vocab_size", "24 tokens are too few for 4 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(
    fields: dict[str, object], rank: int, ranks: int, field: str, reason: str
) -> None:
    with pytest.raises(ShardError, match=reason) as caught:
        Shard(make_spec(**fields), rank, ranks)
    assert caught.value.field == field


def test_a_loader_needs_no_torch_to_load_a_part() -> None:
    code = "import sys, muxserve.engine.parallel.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
