"""What is wrong with a checkpoint is said by `open_checkpoint`, from headers, with the field's name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from muxserve.engine.checkpoint import CheckpointError, open_checkpoint
from tests.engine.gguf_factory import write_gguf
from tests.engine.model_factory import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "model", layers=2)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf")
    make_model("llama", path / "model", layers=1, heads=2, kv_heads=1, head_dim=16)
    return write_gguf(path / "model", path / "a.gguf").read_bytes()


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{caught.value.field}: {caught.value.reason}"
    return caught.value


def edit_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


def test_missing_path(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert error.field == "path" and "does not exist" in error.reason


def test_directory_without_config(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert error.field == "path" and "config.json" in error.reason


def test_directory_of_a_gguf_file_is_told_the_file(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    assert "model-q4.gguf" in refusal(tmp_path).reason


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000], ids=["open", "list", "bytes", "deep"])
def test_broken_config(model: Path, text: str) -> None:
    (model / "config.json").write_text(text, encoding="latin-1")
    assert refusal(model).field == "config.json"


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"model_type": "mamba"}, "model_type", "llama, mistral, qwen2, qwen3"),
        ({"model_type": "absent"}, "model_type", "missing"),
        ({"hidden_size": "absent"}, "hidden_size", "missing"),
        ({"hidden_size": "wide"}, "hidden_size", "integer"),
        ({"hidden_size": -1}, "hidden_size", "-1"),
        ({"hidden_size": 1e400}, "hidden_size", "integer"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers", "10000"),
        ({"head_dim": 63}, "head_dim", "even"),
        ({"head_dim": None, "hidden_size": 130}, "hidden_size", "multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "divide"),
        ({"hidden_act": "relu"}, "hidden_act", "silu"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps", "number"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config", "awq"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters.rope_type", "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor", "positive"),
        ({"rope_parameters": 7}, "rope_parameters", "object"),
        ({"rope_theta": 1.0, "rope_parameters": "absent"}, "rope_parameters.rope_theta", "above 1"),
        ({"partial_rotary_factor": 0.01}, "rope_parameters.partial_rotary_factor", "0 of 64"),
        ({"partial_rotary_factor": 1.5}, "rope_parameters.partial_rotary_factor", "96 of 64"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
    ],
)
def test_bad_configuration_is_named(model: Path, changes: dict[str, Any], field: str, says: str) -> None:
    edit_config(model, **changes)
    error = refusal(model)
    assert error.field == f"config.json:{field}"
    assert says in error.reason


def test_bad_layer_types(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path / "model", window=8)
    edit_config(model, layer_types=["full_attention", "linear_attention", "full_attention"])
    assert refusal(model).field == "config.json:layer_types"
    edit_config(model, layer_types=["full_attention"])
    assert "3 strings" in refusal(model).reason


def test_bidirectional_gemma(tmp_path: Path) -> None:
    model = make_model("gemma3_text", tmp_path / "model")
    edit_config(model, use_bidirectional_attention=True)
    assert refusal(model).field == "config.json:use_bidirectional_attention"


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(model).reason
    (model / "pytorch_model.bin").touch()
    assert "pytorch_model.bin" in refusal(model).reason


def test_missing_tensor(model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(model, lambda tensors: tensors.pop(name))
    assert refusal(model).field == name


def test_wrong_shape(model: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: torch.zeros(64, 128)}))
    error = refusal(model)
    assert error.field == name and "[64, 128]" in error.reason and "[128, 128]" in error.reason


def test_unsupported_dtype_of_a_tensor(model: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: torch.zeros(128, dtype=torch.int8)}))
    error = refusal(model)
    assert error.field == name and "I8" in error.reason


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, 0.5, -1])
def test_truncated_safetensors(model: Path, keep: float) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert refusal(model).field == "model.safetensors"


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"\xff",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
    ],
)
def test_corrupt_safetensors_header(model: Path, header: bytes) -> None:
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    error = refusal(model)
    assert error.field == "model.safetensors" and "corrupt" in error.reason


def test_missing_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors is missing" in refusal(model).reason
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    assert "../secret" in refusal(model).reason
    index.write_text("{}")
    assert refusal(model).field == "model.safetensors.index.json"


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for data in (b"", b"GG", b"not a model at all"):
        path.write_bytes(data)
        error = refusal(path)
        assert error.field == "path" and "not a GGUF" in error.reason


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        (b"llama", b"rwkv6", "general.architecture", "llama, qwen2, qwen3"),
        (b"llama.block_count", b"llama.brick_count", "llama.block_count", "missing"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_in.weight", "blk.0.ffn_up.weight", "no such tensor"),
        (b"token_embd.weight", b"token_embx.weight", "token_embd.weight", "no such tensor"),
        (b"GGUF\3", b"GGUF\1", "path", "version 1"),
    ],
)
def test_bad_gguf(tmp_path: Path, gguf_bytes: bytes, old: bytes, new: bytes, field: str, says: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes.replace(old, new, 1))
    error = refusal(path)
    assert error.field == field and says in error.reason


def test_unsupported_quantisation(tmp_path: Path, gguf_bytes: bytes) -> None:
    name = b"blk.0.attn_v.weight"
    at = gguf_bytes.index(name) + len(name) + 4 + 2 * 8
    path = tmp_path / "a.gguf"
    for kind, says in ((9, "Q8_1"), (200, "unknown quantisation type 200")):
        path.write_bytes(gguf_bytes[:at] + kind.to_bytes(4, "little") + gguf_bytes[at + 4 :])
        error = refusal(path)
        assert error.field == name.decode() and says in error.reason


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_gguf_truncated_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, gguf_bytes: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    # The last bytes are padding of the last tensor.
    path.write_bytes(gguf_bytes[: data.draw(st.integers(0, len(gguf_bytes) - 64))])
    assert refusal(path).field == "path"


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_corrupt_gguf_header_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, gguf_bytes: bytes, data: st.DataObject
) -> None:
    """Whatever bytes change, nothing but CheckpointError is raised, and nothing large is allocated."""
    path = tmp_path_factory.getbasetemp() / "corrupt.gguf"
    corrupt = bytearray(gguf_bytes)
    end = gguf_bytes.index(b"output_norm.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        corrupt[data.draw(st.integers(4, end))] = data.draw(st.integers(0, 255))
    path.write_bytes(corrupt)
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        assert error.reason


def test_headers_are_read_in_milliseconds(model: Path) -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        open_checkpoint(model)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.25
