"""Two tokenizers of unlike kinds, tiny Llamas and texts that the tests share."""

from __future__ import annotations

import pytest
import torch

from fusechat.tiny import train_tokenizer
from fusion_core.testing import tiny

WORDS = (
    "the model reads a text and tells what comes next; naïve cafés count bytes",
    "an aligned pair ends at the same character of the same text",
    "Return the number of tokens, or raise an error when none is left.",
    "Open the file, read it line by line and close it again.",
    "Fusing two sources needs one map between their vocabularies.",
    "A dialogue has turns; the assistant's turns are what we learn.",
    "0 1 2 3 4 5 6 7 8 9 !",
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
)


def make_tokenizer(kind, size, texts=WORDS, *, template=TEMPLATE):
    tokenizer = train_tokenizer([*texts, "<|user|> <|assistant|> <|system|>"], size, kind)
    tokenizer.chat_template = template
    return tokenizer


def make_model(vocab, seed=0, hidden=16, dtype=torch.float32):
    return tiny.llama(vocab, hidden, 1, 2, 32, seed=seed, tie_word_embeddings=False).to(dtype)


def chats(n=6):
    return [
        [
            {"role": "user", "content": WORDS[i % len(WORDS)]},
            {"role": "assistant", "content": WORDS[(i + 1) % len(WORDS)] + f" {i}"},
        ]
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def pivot_tokenizer():
    return make_tokenizer("blanks", 120)


@pytest.fixture(scope="session")
def source_tokenizer():
    return make_tokenizer("bytes", 330)


@pytest.fixture(scope="session")
def other_tokenizer():
    return make_tokenizer("blanks", 80)


@pytest.fixture(scope="session")
def source_model(source_tokenizer):
    return make_model(len(source_tokenizer) + 6, seed=1)  # wider than the tokenizer, as Qwen's


@pytest.fixture(scope="session")
def pivot_model(pivot_tokenizer):
    return make_model(len(pivot_tokenizer), seed=2)


@pytest.fixture
def pivot():
    return lambda **options: make_model(120, seed=2, **options)


@pytest.fixture(scope="session")
def dialogues():
    return chats(6)


@pytest.fixture(scope="session")
def store(tmp_path_factory, source_model, source_tokenizer, pivot_tokenizer, dialogues):
    from fusechat import collect

    return collect(
        source_model, dialogues, out=tmp_path_factory.mktemp("store") / "source", k=8,
        tokenizer=source_tokenizer, pivot_tokenizer=pivot_tokenizer, shard_rows=4, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def pivot_store(tmp_path_factory, pivot_model, pivot_tokenizer, dialogues):
    from fusechat import collect

    return collect(
        pivot_model, dialogues, out=tmp_path_factory.mktemp("store") / "pivot", k=8,
        tokenizer=pivot_tokenizer, shard_rows=4, progress=False,
    )  # fmt: skip
