"""GGUF twins of the small models: what llama.cpp's converter would write, by the gguf package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors import safe_open

from tests.engine.model_factory import make_tokenizer

Floats = NDArray[np.float32]
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma3_text": "gemma3",
}
INTERLEAVED = ("llama", "smollm3")
CONTROL, NORMAL = 3, 1


def write_gguf(
    directory: Path,
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, Floats] | None = None,
) -> Path:
    """Write the model that `make_model` saved in `directory` to the GGUF file `path`, and return that.

    kind: of matrices; vectors are float32. metadata: more keys under the architecture's name.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    for key, value in (metadata or {}).items():
        _add_value(writer, f"{architecture}.{key}", value)
    _add_vocabulary(writer, directory)
    for name, values in [*_tensors(directory, architecture, config), *(extra_tensors or {}).items()]:
        if values.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _add_vocabulary(writer: gguf.GGUFWriter, directory: Path) -> None:
    saved = json.loads((directory / "tokenizer.json").read_text())
    special = {token["id"] for token in saved["added_tokens"]}
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    tokenizer = make_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if index in special else NORMAL for index in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    template = directory / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


def _tensors(directory: Path, architecture: str, config: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            values = file.get_tensor(name).to(torch.float32).numpy()
            stem, suffix = name.rsplit(".", 1)
            if architecture in INTERLEAVED and stem.endswith(("q_proj", "k_proj")):
                heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
                values = _interleave(values, heads)
            if architecture == "gemma3" and stem.endswith("norm"):
                values = values + np.float32(1)
            yield f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(values)


def _interleave(values: Floats, heads: int) -> Floats:
    """Rows of each head (first half, second half) → pairs side by side."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
