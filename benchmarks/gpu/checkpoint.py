"""A model directory of random weights, for what loads checkpoints: services."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape


def write_checkpoint(shape: Shape, path: Path, device: torch.device) -> None:
    """config.json, model.safetensors and a tokenizer. Weights are made on `device`, where that is quick. The
    vocabulary is the tokenizer's of the tests, whatever the shape's is: no larger than it, no smaller."""
    from safetensors.torch import save_file

    from tests.engine.model_factory import make_tokenizer  # trains one, on six sentences

    path.mkdir()
    tokenizer = make_tokenizer(chat_template=True)
    tokenizer.save_pretrained(path)
    vocabulary, spec = len(tokenizer), shape.spec
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": 8192,
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": False,
        "torch_dtype": spec.dtype,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(1)
    dtype = getattr(torch, spec.dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        found = torch.empty(rows, columns, dtype=dtype, device=device)
        return found.normal_(0.0, columns**-0.5, generator=generator).cpu()

    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "lm_head.weight": matrix(vocabulary, hidden),
    }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    for number in range(len(spec.layers)):
        of = f"model.layers.{number}."
        for name, rows, columns in (
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{of}{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{of}{name}.weight"] = torch.ones(hidden, dtype=dtype)
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
