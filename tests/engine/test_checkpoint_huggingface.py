"""Model directories as they are found: older and newer configurations, shards, prefixes, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.checkpoint.families import spec_of
from tests.engine.greedy import load_reference, our_greedy, their_greedy
from tests.engine.model_factory import EOS_TOKEN_ID, FAMILIES, Family, make_model

PROMPTS = [list(range(3, 43)), list(range(50, 60))]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def read_config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config


def write_config(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config))


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    single = make_model("qwen2", tmp_path / "single")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = open_checkpoint(single, "float32"), open_checkpoint(sharded, "float32")
    assert one.spec == many.spec
    for (name, a), (_, b) in zip(one.tensors(), many.tensors(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_without_optional_keys_means_the_family_defaults(
    tmp_path: Path, family: Family
) -> None:
    """Keys that a file leaves out have the values that transformers gives them."""
    model = tmp_path
    sizes = {"vocab_size": 200_000, "hidden_size": 512, "intermediate_size": 192}
    sizes |= {"num_attention_heads": 128, "num_hidden_layers": 30}
    config = {"model_type": family} | ({"text_config": sizes} if family == "gemma3" else sizes)
    write_config(model, config)
    theirs = AutoConfig.from_pretrained(model)
    text = theirs.get_text_config()
    spec = spec_of(config, "float32", None)
    assert spec.kv_heads == text.num_key_value_heads
    assert spec.head_dim == (getattr(text, "head_dim", None) or 512 // 128)
    assert spec.context_length == text.max_position_embeddings
    assert spec.tie_embeddings == theirs.tie_word_embeddings
    assert spec.rms_eps == text.rms_norm_eps
    assert spec.bos_token_id == text.bos_token_id
    assert spec.eos_token_ids == (() if text.eos_token_id is None else (text.eos_token_id,))
    sliding = [kind == "sliding_attention" for kind in getattr(text, "layer_types", None) or [False] * 30]
    if family == "mistral":
        sliding = [True] * 30
    assert [layer.window for layer in spec.layers] == [text.sliding_window if s else None for s in sliding]
    rope = text.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    assert spec.ropes[0].inverse_frequencies[1] == pytest.approx(theta ** (-2 / spec.head_dim))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_older_configurations_say_rope_their_own_way(tmp_path: Path, family: Family) -> None:
    model = make_model(family, tmp_path, window=16, rope_scaling={"rope_type": "linear", "factor": 2.0})
    newer = open_checkpoint(model, "float32").spec
    config = read_config(model)
    rope = config.pop("rope_parameters")
    if family == "gemma3_text":
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 3
        del config["layer_types"]
    else:
        config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    write_config(model, config)
    assert open_checkpoint(model, "float32").spec == newer


def test_rope_parameters_per_layer_type(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path, window=16)
    config = read_config(model)
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    write_config(model, config)
    spec = open_checkpoint(model).spec
    assert [layer.rope for layer in spec.layers] == [0, 1, 1]
    assert [rope.inverse_frequencies[16] for rope in spec.ropes] == pytest.approx([5e5**-0.5, 1e4**-0.5])


def test_partial_rotary_factor_rotates_the_leading_dimensions(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    config = read_config(model)
    config["partial_rotary_factor"] = 0.5
    write_config(model, config)
    (rope,) = open_checkpoint(model).spec.ropes
    np.testing.assert_allclose(rope.inverse_frequencies, 1e4 ** -(np.arange(0, 32, 2) / 32))


def test_yarn_context_is_the_extended_one_and_longrope_the_original(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert open_checkpoint(make_model("qwen2", tmp_path / "y", rope_scaling=yarn)).spec.context_length == 2048
    longrope: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [4.0] * 32,
    }
    longrope |= {"original_max_position_embeddings": 128, "factor": 4.0}
    spec = open_checkpoint(make_model("llama", tmp_path / "l", rope_scaling=longrope)).spec
    assert spec.context_length == 128


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gemma3", "language_model.model.", "model.language_model."),
        ("gemma3_text", "model.", ""),
    ],
)
def test_other_places_of_the_decoder(tmp_path: Path, family: Family, old: str, new: str) -> None:
    model = make_model(family, tmp_path, tie=family == "gemma3_text")
    before = dict(open_checkpoint(model, "float32").tensors())
    tensors = {
        name.replace("language_model.lm_head", "lm_head").replace(old, new): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    assert f"{new}embed_tokens.weight" in tensors
    save_file(tensors, model / "model.safetensors")
    after = dict(open_checkpoint(model, "float32").tensors())
    assert before.keys() == after.keys() and ("lm_head" in after) == (family == "gemma3")
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)


@pytest.mark.parametrize(
    ("declared", "served"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_auto_dtype(tmp_path: Path, declared: str, served: str, key: str | None) -> None:
    """Of the configuration under its newer or older key, else of the stored tensors."""
    source = make_model("llama", tmp_path / "source")
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, declared)).save_pretrained(model)
    config = read_config(model)
    del config["dtype"]
    if key is not None:
        config[key] = declared
    write_config(model, config)
    checkpoint = open_checkpoint(model, "auto")
    assert checkpoint.spec.dtype == served
    stored = load_file(model / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    for name, values in checkpoint.tensors():
        assert values.dtype == (np.float32 if "norm" in name or served == "float32" else ml_dtypes.bfloat16)
        if name == "embed":
            expected = stored if served == "float32" else stored.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(values, expected)


def test_eos_ids_come_from_the_generation_configuration_first(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    generation = model / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_checkpoint(model).spec.eos_token_ids == (7, 9)
    generation.write_text(json.dumps({"eos_token_id": 5}))
    assert open_checkpoint(model).spec.eos_token_ids == (5,)
    generation.unlink()
    assert open_checkpoint(model).spec.eos_token_ids == (EOS_TOKEN_ID,)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bfloat16_starts_as_transformers_does(tmp_path: Path, family: Family) -> None:
    """Text may part where two tokens are nearly as likely; the first tokens agree if the rounding does."""
    path = make_model(family, tmp_path)
    reference = load_reference(path).bfloat16()
    ours = our_greedy(open_checkpoint(path, "bfloat16"), PROMPTS, 4, chunk=64)
    theirs = their_greedy(reference, PROMPTS, 4)
    assert [text[0] for text in ours] == [text[0] for text in theirs]
