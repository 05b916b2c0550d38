"""Text in and text out, compared with transformers."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from muxserve.common.errors import FailedPrecondition, InvalidArgument
from muxserve.gateway.detokenizer import detokenizer
from muxserve.gateway.tokenizer import Tokenizer, TokenizerBroken, TokenizerMissing
from tests.gateway.texts import TEMPLATE, TEXTS, save_qwen2, write_gguf

KINDS = (
    "smollm2",
    "llama-directory",
    "llama-directory-without-bos",
    "gemma-directory",
    "qwen2-directory",
    "words-directory",
    "metaspace-directory",
    "llama-gguf",
    "gemma3-gguf",
    "gpt-2-gguf",
    "llama-bpe-gguf",
    "qwen2-gguf",
    "tekken-gguf",
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "naïve 😀 <|im_end|>"},
]


@cache
def load(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


@cache
def reference(path: Path) -> Any:
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_transformers(checkpoints: dict[str, Path], kind: str) -> None:
    path = checkpoints[kind]
    for text in ("", *TEXTS, "".join(TEXTS), "a" * 3000):
        if kind == "qwen2-gguf":
            # Qwen's own tokenizer normalises; transformers leaves that out when it reads the GGUF.
            text = unicodedata.normalize("NFC", text)
        assert load(path).encode(text) == reference(path)(text)["input_ids"], text


@given(text=st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_the_ids_of_transformers(checkpoints: dict[str, Path], text: str) -> None:
    path = checkpoints["smollm2"]
    assert load(path).encode(text) == reference(path)(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_of_all_tokens(checkpoints: dict[str, Path], kind: str) -> None:
    tokenizer, other = load(checkpoints[kind]), reference(checkpoints[kind])
    chance = random.Random(5)
    size = len(other) + 4
    sequences = [load(checkpoints[kind]).encode(text) for text in TEXTS]
    sequences += [[chance.randrange(size) for _ in range(chance.randrange(1, 60))] for _ in range(400)]
    for ids in sequences:
        state = detokenizer(tokenizer.decoding)
        text = "".join([state.push(token) for token in ids]) + state.flush()
        assert text == tokenizer.decode(ids), ids
        if max(ids) < len(other):
            assert text == decode(other, ids), ids


@given(
    ids=st.lists(st.one_of(st.integers(3, 258), st.integers(0, 300)), max_size=80),
    kind=st.sampled_from(("llama-gguf", "gemma3-gguf", "llama-directory")),
)
@settings(max_examples=500, deadline=None)
def test_byte_tokens_in_any_order_decode_as_at_once(
    checkpoints: dict[str, Path], kind: str, ids: list[int]
) -> None:
    tokenizer = load(checkpoints[kind])
    state = detokenizer(tokenizer.decoding)
    assert "".join([state.push(token) for token in ids]) + state.flush() == tokenizer.decode(ids)


@given(text=st.text(st.characters(min_codepoint=0x80, codec="utf-8"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_character_is_never_shown_in_part(checkpoints: dict[str, Path], text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    for kind in ("smollm2", "llama-gguf"):
        tokenizer = load(checkpoints[kind])
        state = detokenizer(tokenizer.decoding)
        ids = tokenizer.encode(text)
        pieces = [state.push(token) for token in ids]
        # Not every vocabulary can spell every character.
        assert tokenizer.decode(ids) != text or "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_token_costs_the_same_in_a_long_text(checkpoints: dict[str, Path]) -> None:
    """Emitted text keeps up: no more than a few characters are ever held back in ordinary text."""
    tokenizer = load(checkpoints["smollm2"])
    state = detokenizer(tokenizer.decoding)
    ids = tokenizer.encode("The quick brown fox. " * 200)
    shown = 0
    for count, token in enumerate(ids, 1):
        shown += len(state.push(token))
        if count % 100 == 0:
            assert shown == len(tokenizer.decode(ids[:count]))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("words-directory", "metaspace-directory")])
def test_conversations_are_rendered_as_transformers_does(checkpoints: dict[str, Path], kind: str) -> None:
    tokenizer, other = load(checkpoints[kind]), reference(checkpoints[kind])
    for messages in (MESSAGES, MESSAGES[1:2], MESSAGES[1:]):
        text = tokenizer.render(messages)
        assert text == other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids


TEMPLATES = {
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "blocks": "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}x",
    "loop controls": "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}x{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = 1 %}{% endfor %}{{ n.x }}",
    "strings": "{{ messages[0].content.strip().split(' ')[0] | upper }}{{ bos_token }}{{ eos_token }}",
    "tools": "{% if tools %}T{% endif %}{% if tools is not none %}N{% endif %}{{ documents is defined }}",
    "generation": "{% generation %}a{{ messages[0].role }}{% endgeneration %}",
    "missing": "{{ nothing }}{{ messages[0].nothing }}",
    "prompt": "{% if add_generation_prompt is defined and add_generation_prompt %}G{% endif %}",
    "date": "{{ strftime_now('%Y') }}",
    "macro": "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[0].role) }}",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Qwen2 directory of this test's own."""
    return save_qwen2(tmp_path / "qwen2")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_templates_mean_what_they_mean_to_transformers(directory: Path, template: str) -> None:
    (directory / "chat_template.jinja").write_text(template)
    ours = Tokenizer.load(directory).render(MESSAGES)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert ours == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_that_refuses_or_fails_names_the_messages(directory: Path, template: str) -> None:
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidArgument) as caught:
        Tokenizer.load(directory).render(MESSAGES)
    assert caught.value.field == "chat.messages"


def test_a_template_in_the_configuration_counts_where_there_is_no_file(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    file.write_text(json.dumps(config))
    assert Tokenizer.load(directory).render(MESSAGES) == "D"
    config["chat_template"] = "S"
    file.write_text(json.dumps(config))
    assert Tokenizer.load(directory).render(MESSAGES) == "S"
    del config["chat_template"]
    file.write_text(json.dumps(config))
    assert not Tokenizer.load(directory).has_chat_template
    with pytest.raises(FailedPrecondition, match="no chat template"):
        Tokenizer.load(directory).render(MESSAGES)


def test_a_broken_template_leaves_the_tokenizer_usable(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for %}")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("hi")
    with pytest.raises(FailedPrecondition, match="not valid"):
        tokenizer.render(MESSAGES)


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("add_eos", [True, False, None])
def test_flags_of_the_configuration_decide_about_bos_and_eos(
    directory: Path, add_bos: bool | None, add_eos: bool | None
) -> None:
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for name, value in (("add_bos_token", add_bos), ("add_eos_token", add_eos)):
        config.pop(name, None)
        if value is not None:
            config[name] = value
    file.write_text(json.dumps(config))
    assert (
        Tokenizer.load(directory).encode("hi") == AutoTokenizer.from_pretrained(directory)("hi")["input_ids"]
    )


def test_missing_and_broken_tokenizers_are_told_apart(tmp_path: Path, directory: Path, smollm2: Path) -> None:
    with pytest.raises(TokenizerMissing):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerMissing):
        Tokenizer.load(tmp_path)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerBroken):
        Tokenizer.load(directory)
    shutil.copy(save_qwen2(tmp_path / "again") / "tokenizer.json", directory)
    (directory / "tokenizer_config.json").write_text("[1")
    with pytest.raises(TokenizerBroken):
        Tokenizer.load(directory)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(TokenizerBroken):
        Tokenizer.load(tmp_path / "text.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(TokenizerBroken):
        Tokenizer.load(tmp_path / "empty.gguf")


@pytest.mark.parametrize(
    ("kind", "merges", "pre"),
    [("gpt2", ["nosuch token"], "gpt-2"), ("gpt2", ["one-part"], "gpt-2"), ("wordpiece", [], "default")],
)
def test_a_tokenizer_that_cannot_be_built_is_broken(
    tmp_path: Path, kind: str, merges: list[str], pre: str
) -> None:
    tokens = ["a", "b", "ab"]
    path = write_gguf(
        tmp_path / "odd.gguf",
        architecture="llama",
        kind=kind,
        pre=pre,
        tokens=tokens,
        special=[],
        merges=merges,
    )
    with pytest.raises(TokenizerBroken) as caught:
        Tokenizer.load(path)
    assert len(str(caught.value)) < 500


def test_a_file_that_calls_weights_its_only_content_has_no_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bare.gguf", architecture="llama", kind="none", tokens=[], special=[])
    with pytest.raises(TokenizerMissing):
        Tokenizer.load(path)


@given(length=st.integers(4, 1_500_000))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_in_its_metadata_is_broken(
    tmp_path_factory: pytest.TempPathFactory, smollm2: Path, length: int
) -> None:
    stump = tmp_path_factory.mktemp("stump") / "stump.gguf"
    with smollm2.open("rb") as whole:
        stump.write_bytes(whole.read(length))
    with pytest.raises((TokenizerBroken, TokenizerMissing)):
        Tokenizer.load(stump)


def test_the_template_of_the_tests_is_in_use(checkpoints: dict[str, Path]) -> None:
    assert TEMPLATE.startswith("{{ bos_token }}")
    assert load(checkpoints["llama-gguf"]).render(MESSAGES).startswith("<s>")
