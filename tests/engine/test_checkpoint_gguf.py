"""GGUF files: the same spec and weights as the Hugging Face directory they were made from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from muxserve.engine.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from muxserve.engine.checkpoint.quants import to_float
from tests.engine.gguf_factory import write_gguf
from tests.engine.greedy import load_reference, our_greedy, their_greedy
from tests.engine.model_factory import EOS_TOKEN_ID, Family, make_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def assert_same_weights(one: Checkpoint, other: Checkpoint) -> None:
    assert one.manifest() == other.manifest()
    for (name, ours), (_, theirs) in zip(one.tensors(), other.tensors(), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("tie", [True, False])
def test_twins_have_the_same_weights(tmp_path: Path, family: Family, tie: bool) -> None:
    directory = make_model(family, tmp_path / "hf", head_dim=80, tie=tie, bias=family in ("llama", "qwen3"))
    twin = write_gguf(directory, tmp_path / "twin.gguf")
    assert_same_weights(open_checkpoint(directory, "float32"), open_checkpoint(twin, "float32"))
    assert_same_weights(open_checkpoint(directory, "bfloat16"), open_checkpoint(twin, "bfloat16"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text"])
def test_twins_have_the_same_spec(tmp_path: Path, family: Family) -> None:
    gemma, window = family == "gemma3_text", 9 if family in ("mistral", "gemma3_text") else None
    overrides = {"no_rope_layer_interval": 4} if family == "smollm3" else {"sliding_window_pattern": 6}
    directory = make_model(
        family, tmp_path / "hf", layers=7, window=window, overrides=overrides, chat_template=True
    )
    spec = open_checkpoint(directory, "float32").spec
    twin = open_checkpoint(write_gguf(directory, tmp_path / "twin.gguf"), "float32").spec
    assert twin.layers == spec.layers
    assert len({layer.window for layer in twin.layers}) == (2 if gemma else 1)
    differences = {field for field in spec.__struct_fields__ if getattr(spec, field) != getattr(twin, field)}
    assert differences <= {"architecture"}


@pytest.mark.parametrize(
    ("family", "head_dim", "kind"),
    [
        ("llama", 64, GGMLQuantizationType.Q8_0),
        ("llama", 80, GGMLQuantizationType.F32),
        ("qwen2", 32, GGMLQuantizationType.Q4_0),  # transformers ignores key_length of these two
        ("qwen3", 128, GGMLQuantizationType.Q5_0),
        ("gemma3_text", 256, GGMLQuantizationType.Q4_1),  # and takes Gemma's query scale for that of 256
    ],
)
def test_text_is_what_transformers_reads_from_the_same_file(
    tmp_path: Path, family: Family, head_dim: int, kind: GGMLQuantizationType
) -> None:
    gemma = family == "gemma3_text"
    directory = make_model(
        family,
        tmp_path / "hf",
        head_dim=head_dim,
        layers=7 if gemma else 3,
        window=20 if gemma else None,
        overrides={"sliding_window_pattern": 6} if gemma else None,
    )
    write_gguf(directory, tmp_path / "twin.gguf", kind=kind)
    prompts = [list(range(3, 53)), list(range(100, 130)), [7]]
    ours = our_greedy(open_checkpoint(tmp_path / "twin.gguf", "float32"), prompts, 16, chunk=16)
    assert ours == their_greedy(load_reference(tmp_path, gguf_file="twin.gguf"), prompts, 16)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "F16", "BF16", "F32"])
def test_dequantised_rows_are_those_of_the_gguf_package(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((7, 96), np.float32)
    kind_of = GGMLQuantizationType[kind]
    stored = quantize(values, kind_of)
    rows = np.ascontiguousarray(stored).view(np.uint8).reshape(7, -1)
    np.testing.assert_array_equal(to_float(rows, kind_of).astype(np.float32), dequantize(stored, kind_of))


@pytest.mark.parametrize(
    ("kind", "halves"),
    [("Q5_0", (0,)), ("Q5_1", (0, 2)), ("Q4_K", (0, 2)), ("Q5_K", (0, 2)), ("Q6_K", (208,))],
)
def test_blocks_of_any_bits_are_dequantised_as_by_the_gguf_package(
    kind: str, halves: tuple[int, ...]
) -> None:
    """halves: where a block has its float16 numbers, which are to be finite."""
    kind_of = GGMLQuantizationType[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (6 * 5, GGML_QUANT_SIZES[kind_of][1]), np.uint8)
    for start in halves:
        scales = random.standard_normal((len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    rows = blocks.reshape(6, -1)
    np.testing.assert_array_equal(to_float(rows, kind_of), dequantize(rows, kind_of))


def test_end_of_turn_of_the_chat_template_is_an_end_of_text(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path / "hf", chat_template=True)
    path = write_gguf(directory, tmp_path / "a.gguf")
    assert open_checkpoint(path).spec.eos_token_ids == (EOS_TOKEN_ID,)
    without_eos = path.read_bytes().replace(b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.sep_token_id")
    path.write_bytes(without_eos)
    assert open_checkpoint(path).spec.eos_token_ids == (EOS_TOKEN_ID,)


def test_auto_dtype_is_bfloat16(tmp_path: Path) -> None:
    path = write_gguf(make_model("llama", tmp_path / "hf"), tmp_path / "a.gguf")
    assert open_checkpoint(path, "auto").spec.dtype == "bfloat16"


def test_frequency_factors_of_the_file_divide_the_frequencies(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path / "hf")
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = write_gguf(directory, tmp_path / "a.gguf", extra_tensors={"rope_freqs.weight": factors})
    (plain,), (scaled,) = open_checkpoint(directory).spec.ropes, open_checkpoint(path).spec.ropes
    np.testing.assert_allclose(
        np.array(scaled.inverse_frequencies) * factors, plain.inverse_frequencies, rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_in_the_metadata_is_that_of_the_configuration(tmp_path: Path, kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0}
    metadata: dict[str, object] = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 128
        metadata["rope.scaling.original_context_length"] = 128
    directory = make_model("qwen2", tmp_path / "hf", rope_scaling=scaling)
    path = write_gguf(directory, tmp_path / "a.gguf", metadata=metadata)
    spec, twin = open_checkpoint(directory, "float32").spec, open_checkpoint(path, "float32").spec
    assert twin.ropes == spec.ropes
    assert twin.context_length == spec.context_length == 512


def test_partly_rotated_heads_keep_their_other_rows(tmp_path: Path) -> None:
    """Only the rotated rows of a head are stored as pairs, so only they are put back in order."""
    directory = make_model("llama", tmp_path / "hf", head_dim=64)
    path = write_gguf(directory, tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    key = b"llama.rope.dimension_count"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = (32).to_bytes(4, "little")
    path.write_bytes(data)
    spec = open_checkpoint(path, "float32").spec
    assert len(spec.ropes[0].inverse_frequencies) == 16
    stored = dict(open_checkpoint(write_gguf(directory, tmp_path / "b.gguf"), "float32").tensors())
    partly = dict(open_checkpoint(path, "float32").tensors())
    half_split = stored["layers.0.qkv"][:64].reshape(2, 32, -1)
    interleaved = half_split.swapaxes(0, 1).reshape(64, -1)
    expected = np.concatenate([interleaved[0:32:2], interleaved[1:32:2], interleaved[32:]])
    np.testing.assert_array_equal(partly["layers.0.qkv"][:64], expected)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("attention.sliding_window_pattern", [True, False], "llama.attention.sliding_window_pattern"),
        ("rope.scaling.type", "spiral", "llama.rope.scaling.type"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, key: str, value: object, field: str) -> None:
    directory = make_model("mistral", tmp_path / "hf", window=8)
    path = write_gguf(directory, tmp_path / "a.gguf", metadata={key: value})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.field == field


def test_weights_are_as_many_bytes_as_the_manifest_says(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(make_model("qwen3", tmp_path / "hf"), tmp_path / "a.gguf"))
    end = 0
    for entry in checkpoint.manifest():
        assert entry.offset >= end and entry.offset % 64 == 0
        end = entry.offset + math.prod(entry.shape) * (4 if entry.dtype == "float32" else 2)
    assert end <= checkpoint.weight_bytes() < end + 64
