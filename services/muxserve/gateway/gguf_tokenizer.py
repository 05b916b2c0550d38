"""Builds a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Two kinds are known: "gpt2" (byte-level BPE: Llama 3, Qwen, SmolLM, Mistral Nemo, ...) and "llama"
(SentencePiece: Llama 2, Mistral, Gemma). Token ids are those that transformers gives for the same file; where
the file leaves something out that the model's own tokenizer has (the beginning-of-sequence token of old Llama
3 files, NFC for Qwen), the model's own tokenizer is followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from muxserve.gateway.gguf_metadata import Value

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+",
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*",
)
_TEKKEN = f"{_CASED[0]}|{_CASED[1]}" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
_GPT4O = (
    f"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _TAIL
)

_SPLITS: dict[str, str] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""How text is cut before merging, by `tokenizer.ggml.pre`. Others (gpt-2, smollm...) use GPT-2's rule.

SmolLM's own tokenizer also cuts digits off before that rule. transformers does not when it reads the GGUF,
and the two differ for a number after several spaces alone; our texts are compared with transformers.
"""
_WHOLE_WORDS_FIRST = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
_BEGINS_WITH_BOS = frozenset({"llama3", "llama-v3", "llama-bpe"})


class UnknownTokenizerError(ValueError):
    """The tokenizer is of a kind that is not supported, or parts of it are missing."""


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """What a GGUF file says about text."""

    backend: Tokenizer
    bos_token: str | None
    eos_token: str | None
    special_tokens: dict[str, str]
    """Those that a chat template may name: bos_token, eos_token, unk_token, pad_token."""
    chat_template: str | None


def build(metadata: Mapping[str, Value]) -> GGUFTokenizer:
    """The tokenizer of a file with these entries. Raises UnknownTokenizerError."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens)
    else:
        raise UnknownTokenizerError(f'tokenizer kind "{kind}" is not supported ("gpt2" and "llama" are)')
    named = {
        name: tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(index := metadata.get(f"tokenizer.ggml.{key}_token_id"), int)
        and 0 <= index < len(tokens)
    }
    _add_marked_tokens(backend, metadata, tokens, named)
    set_template(
        backend,
        named.get("bos") if _adds_bos(metadata, str(kind)) else None,
        named.get("eos") if metadata.get("tokenizer.ggml.add_eos_token") else None,
    )
    template = metadata.get("tokenizer.chat_template")
    return GGUFTokenizer(
        backend=backend,
        bos_token=named.get("bos"),
        eos_token=named.get("eos"),
        special_tokens={f"{name}_token": token for name, token in named.items()},
        chat_template=template if isinstance(template, str) else None,
    )


def set_template(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `backend` put `bos` before and `eos` after every text that is encoded with special tokens."""
    around = [token for token in (bos, eos) if token is not None]
    single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B"],
        special_tokens=[(token, backend.token_to_id(token)) for token in around],
    )


def _byte_level(metadata: Mapping[str, Value], tokens: Sequence[str]) -> Tokenizer:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[_pair(merge) for merge in _strings(metadata, "tokenizer.ggml.merges")],
        ignore_merges=pre in _WHOLE_WORDS_FIRST,
    )
    backend = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    split = _SPLITS.get(pre)
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    if split is _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Value], tokens: Sequence[str]) -> Tokenizer:
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma:
        # Runs of spaces are stored as spaces; the merges and the text to be encoded spell them with SPACE.
        tokens = [token if token.strip(" ") else SPACE * len(token) for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = metadata.get("tokenizer.ggml.scores")
    merges: list[tuple[str, str]]
    if "tokenizer.ggml.merges" in metadata:
        merges = [_pair(merge) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    elif gemma or not isinstance(scores, list) or len(scores) != len(tokens):
        # Gemma's scores do not follow the order of its merges; the order of its tokens does.
        merges = _merges_of(vocab, {token: -float(index) for token, index in vocab.items()})
    else:
        merges = _merges_of(vocab, dict(zip(tokens, (float(str(score)) for score in scores), strict=True)))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id") if gemma else None
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token=tokens[unknown]
            if gemma and isinstance(unknown, int) and unknown < len(tokens)
            else None,
        )
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if bool(metadata.get("tokenizer.ggml.add_space_prefix", not gemma)):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_of(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every token cut in two tokens, best score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _add_marked_tokens(
    backend: Tokenizer, metadata: Mapping[str, Value], tokens: Sequence[str], named: Mapping[str, str]
) -> None:
    """Register the tokens that are matched whole in a text: control tokens (special) and user-defined."""
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    control += [token for token in named.values() if token not in control]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    vocab = backend.get_vocab(with_added_tokens=False)
    plain = [
        token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED and token in vocab
    ]
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])


def _adds_bos(metadata: Mapping[str, Value], kind: str) -> bool:
    default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _BEGINS_WITH_BOS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _strings(metadata: Mapping[str, Value], key: str) -> list[str]:
    value = metadata.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UnknownTokenizerError(f"{key} is not a list of strings")
    return [str(item) for item in value]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
