"""A model's text side: text and conversations to token ids, read from its checkpoint.

A checkpoint is a Hugging Face directory with `tokenizer.json`, or a GGUF file. Token ids are those that
transformers gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from muxserve.common.errors import FailedPrecondition
from muxserve.gateway.chat import BrokenTemplateError, ChatTemplate
from muxserve.gateway.gguf_metadata import read_metadata
from muxserve.gateway.gguf_tokenizer import build
from muxserve.gateway.pieces import Decoding

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(FailedPrecondition):
    """The checkpoint's tokenizer cannot be used; the message says why.

    TokenizerError
    ├── TokenizerMissing    there is none
    └── TokenizerBroken     there is one, but it cannot be read
    """


class TokenizerMissing(TokenizerError):
    """The checkpoint has no tokenizer: it can be served with token ids only."""


class TokenizerBroken(TokenizerError):
    """The checkpoint's tokenizer cannot be read, or is of a kind that is not supported."""


class Tokenizer:
    """Immutable once loaded, and safe to use from several threads."""

    def __init__(
        self, backend: Backend, template: ChatTemplate | None = None, template_error: str = ""
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self._template_error = template_error
        self.decoding = Decoding(backend)
        """How ids become text."""
        vocab = backend.get_vocab(with_added_tokens=True)
        self.longest_token_bytes = max((len(token.encode()) for token in vocab), default=1)
        """Bytes of the longest token's spelling: a text of n bytes has no less than n / this many tokens."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of the checkpoint at `path`; takes up to seconds. Raises TokenizerError."""
        path = Path(path)
        try:
            return _load_directory(path) if path.is_dir() else _load_gguf(path)
        except TokenizerError:
            raise
        except FileNotFoundError as error:
            raise TokenizerMissing(f"no tokenizer: {error.filename} does not exist") from error
        except Exception as error:  # tokenizers raises bare Exception for most of what can be wrong
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TokenizerBroken(f"the tokenizer in {path} cannot be read: {reason[:200]}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the beginning-of-sequence token if the model wants one.

        Special tokens spelled in the text become those tokens. Releases the GIL while it works.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the model's chat template spells it; encode it without adding special tokens.

        Raises FailedPrecondition if there is no template, InvalidArgument if it refuses the conversation.
        """
        if self._template is None:
            raise FailedPrecondition(self._template_error or "the model has no chat template")
        return self._template.render(messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)


def _load_gguf(path: Path) -> Tokenizer:
    metadata = read_metadata(path, lambda key: key.startswith(("tokenizer.", "general.architecture")))
    if not metadata.get("tokenizer.ggml.tokens"):
        raise TokenizerMissing(f"{path} has no tokenizer")
    parts = build(metadata)
    return _assemble(parts.backend, parts.chat_template, parts.special_tokens)


def _load_directory(path: Path) -> Tokenizer:
    backend = Backend.from_buffer((path / "tokenizer.json").read_bytes())
    config = _read_json(path / "tokenizer_config.json")
    if (
        "added_tokens_decoder" not in config
    ):  # older checkpoints say it in a file of its own, which counts more
        config |= _read_json(path / "special_tokens_map.json")
    named = {name: token for name in _NAMED if (token := _content(config.get(name))) is not None}
    _mark_special(backend, config, named.values())
    return _assemble(backend, _template(path, config), named)


def _assemble(backend: Backend, source: str | None, special_tokens: Mapping[str, str]) -> Tokenizer:
    if source is None:
        return Tokenizer(backend)
    try:
        return Tokenizer(backend, ChatTemplate(source, special_tokens))
    except BrokenTemplateError as error:
        return Tokenizer(backend, None, f"the model's chat template is not valid: {error}")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerBroken(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerBroken(f"{path} is not a JSON object")
    return value


def _content(token: object) -> str | None:
    """The text of a token, which files spell as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _mark_special(backend: Backend, config: Mapping[str, Any], named: Iterable[str]) -> None:
    """Make special what the configuration calls special and the tokenizer knows as an ordinary token only."""
    known = backend.get_vocab(with_added_tokens=True)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    more = config.get("additional_special_tokens")
    wanted = [*named, *(_content(token) for token in (more if isinstance(more, list) else []))]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in dict.fromkeys(wanted)
            if token is not None and token in known and token not in special
        ]
    )


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: `chat_template.jinja` if there is one, else the configuration's."""
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
