"""Tokenizers of every kind, as files, and texts to try them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

TEXTS = (
    "The capital of France is",
    " leading and  double   spaces ",
    "In 2024, 3.14159 and 1,000,000 items cost $12.50.",
    "def f(x):\n    return {\n\t'a': x[1:-1],\n    }\n\n\n",
    "I'm sure they'll say it's YOUR fault, WE'VE been here!",
    "naïve café — “quotes” … ½ ﬁ Å Å",
    "日本語のテキスト、한국어, العربية, עברית, ไทย, Ελληνικά",
    "👩‍👩‍👧‍👦 🇫🇷 😀😀 e\u0301 \u200b\u00a0|",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>x",
    "<s> </s> <bos><eos> <unk> <pad>",
    "\x00\x01\x7f\r\n\r\t",
    "\U0001d56c\U0001d593 𓀀 ﷽",
)

SENTENCES = (
    *TEXTS,
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "One cluster serves many models, and a cold model lends its memory to a hot one.",
    "Der Fluß fließt langsam durch die Stadt; die Brücken sind älter als die Häuser.",
)

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentencepiece_vocabulary(special: Sequence[str]) -> list[str]:
    """Special tokens, bytes, and what BPE finds in SENTENCES when spaces are spelled with SPACE."""
    trained = Tokenizer(models.BPE())
    alphabet = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, limit_alphabet=40
    )
    trained.train_from_iterator(
        [SPACE + s.replace(" ", SPACE) for s in SENTENCES[:3] + SENTENCES[12:]], trainer
    )
    vocab = trained.get_vocab()
    return [*special, *BYTE_TOKENS, *sorted(vocab, key=lambda token: vocab[token])]


def byte_level() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary trained on SENTENCES; the last three are special."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    trained.train_from_iterator(SENTENCES, trainer)
    vocab = trained.get_vocab()
    merges = [" ".join(merge) for merge in _model(trained)["merges"]]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    return [*tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>"], merges


def _model(tokenizer: Tokenizer) -> dict[str, list[list[str]]]:
    model: dict[str, list[list[str]]] = json.loads(tokenizer.to_str())["model"]
    return model


def merges_of(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order of the tokens."""
    known = set(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        if not token.startswith("<")
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def save_llama(path: Path, **options: bool) -> Path:
    tokens = sentencepiece_vocabulary(["<unk>", "<s>", "</s>"])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges_of(tokens), **options)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def save_gemma(path: Path) -> Path:
    tokens = sentencepiece_vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges_of(tokens), add_bos_token=True)  # type: ignore[arg-type]
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def save_qwen2(path: Path) -> Path:
    tokens, merges = byte_level()
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],  # type: ignore[misc]
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def save_words(path: Path) -> Path:
    """A tokenizer of whole words with no decoder."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(path)
    return path


def save_metaspace(path: Path) -> Path:
    """A SentencePiece vocabulary whose decoder is Metaspace, as older conversions have it."""
    tokens = sentencepiece_vocabulary(["<unk>"])
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges_of(tokens), unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(path)
    return path


def write_gguf(
    path: Path,
    *,
    architecture: str,
    kind: str,
    tokens: Sequence[str],
    special: Sequence[str],
    pre: str = "default",
    merges: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    flags: dict[str, bool] | None = None,
    ids: dict[str, int] | None = None,
) -> Path:
    """A GGUF file with a tokenizer and one tensor's worth of configuration."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    kinds = [3 if t in special else 6 if t in BYTE_TOKENS else 1 for t in tokens]
    writer.add_token_types(kinds)
    if merges is not None:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
    for name, value in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for name, index in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_files(folder: Path) -> dict[str, Path]:
    """One file of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    llama = sentencepiece_vocabulary(["<unk>", "<s>", "</s>"])
    gemma = sentencepiece_vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokens, merges = byte_level()
    return {
        "llama": write_gguf(
            folder / "llama.gguf",
            architecture="llama",
            kind="llama",
            tokens=llama,
            special=llama[:3],
            scores=[-float(i) for i in range(len(llama))],
            ids={"unknown": 0, "bos": 1, "eos": 2},
        ),
        "gemma3": write_gguf(
            folder / "gemma3.gguf",
            architecture="gemma3",
            kind="llama",
            tokens=gemma,
            special=gemma[:5],
            scores=[-1000.0] * len(gemma),
            ids={"padding": 0, "eos": 1, "bos": 2, "unknown": 3},
            flags={"add_bos_token": True, "add_space_prefix": False},
        ),
        **{
            pre: write_gguf(
                folder / f"{pre}.gguf",
                architecture="qwen2" if pre == "qwen2" else "llama",
                kind="gpt2",
                pre=pre,
                tokens=tokens,
                merges=merges,
                special=tokens[-3:],
                ids={"bos": len(tokens) - 2, "eos": len(tokens) - 1},
                flags={"add_bos_token": False},
            )
            for pre in ("gpt-2", "llama-bpe", "qwen2", "tekken")
        },
    }
