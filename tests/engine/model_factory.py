"""Small random models of every family, saved as transformers saves them: real files for tests of any layer.

Weights are large enough that greedy text varies and that a wrong rotation, mask or norm changes it. Norm
weights and biases are random too: ones and zeros would hide a norm or bias that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

Family = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "gemma3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "gemma3")

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EOS_TOKEN_ID = 2
"""TURN_END."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "One cluster serves many models, and a cold model lends its memory to a hot one.",
    "Der Fluß fließt langsam durch die Stadt; die Brücken sind älter als die Häuser.",
    "Les modèles partagent la mémoire, mais chacun garde ses propres poids.",
    "記憶は共有され、重みは一度だけ読み込まれる。 数字: 0123456789 🙂",
    "def answer(question: str) -> str:\n    return lookup[question.strip().lower()]\n",
)

MULTIMODAL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}


def make_model(
    family: Family,
    path: Path,
    *,
    head_dim: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    window: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    tie: bool | None = None,
    bias: bool = False,
    context: int = 512,
    chat_template: bool = False,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Save a random float32 model with its tokenizer to the directory `path`, and return that.

    window: of every layer (mistral), of the layers after the first (qwen, smollm3), of two in three (gemma).
    tie, bias: None / False = as the family is. overrides: more keys of the configuration.
    """
    tokenizer = make_tokenizer(chat_template)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32 * heads,
        "intermediate_size": 48 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": 0,
        **_family_values(family, head_dim, window, rope_scaling),
    }
    if tie is not None:
        values["tie_word_embeddings"] = tie
    if bias:
        values |= {"attention_bias": True, "mlp_bias": True}
    model = _build(family, {**values, **(overrides or {})})
    _randomise(model, seed)
    disable_progress_bar()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _family_values(
    family: Family, head_dim: int, window: int | None, rope_scaling: Mapping[str, Any] | None
) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope_scaling or {})}
    if family in ("gemma3_text", "gemma3"):
        return {
            "sliding_window": window or 4096,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": head_dim,
            "rope_parameters": {
                "full_attention": rope | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }
    values: dict[str, Any] = {"rope_parameters": rope}
    if family == "mistral":
        values["sliding_window"] = window
    elif family != "llama":
        values |= {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": 1}
    if family == "smollm3":
        values |= {"no_rope_layer_interval": 2}
    return values


def _build(family: Family, values: dict[str, Any]) -> PreTrainedModel:
    if family == "gemma3":
        config = Gemma3Config(
            text_config=values,
            vision_config=MULTIMODAL_VISION,
            mm_tokens_per_image=4,
            tie_word_embeddings=values.get("tie_word_embeddings", True),
        )
        model: PreTrainedModel = Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gemma = "Gemma" in type(model).__name__
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        width = math.sqrt(parameter.shape[-1])
        if name.endswith("norm.weight"):
            # Gemma's head is its small embedding: the final norm makes up for that.
            final = 9.0 if name.endswith("model.norm.weight") else 0.0
            parameter.copy_((final if gemma else 1.0) + 0.3 * noise)
        elif parameter.ndim < 2:
            parameter.copy_(0.5 * noise)
        elif "embed_tokens" in name:
            # Gemma multiplies by `width`. Larger, a tied model would repeat its last token.
            parameter.copy_((0.1 / width if gemma else 0.5) * noise)
        else:
            parameter.copy_(2.0 / width * noise)


def make_tokenizer(chat_template: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on SENTENCES; it encodes any text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=TEXT_END,
        eos_token=TURN_END,
        pad_token=TEXT_END,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())
