"""Tiny Llamas, a tokenizer and a left-padded batch that the tests of models share."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from fusion_core.testing import tiny

VOCABULARY = 97


def make_llama(
    seed=0, *, hidden=32, vocab=VOCABULARY, layers=1, heads=4, dtype=torch.float64, spread=0.25, **more
):
    settings = {
        "num_key_value_heads": heads // 2,
        "bos_token_id": 0,
        "eos_token_id": more.pop("eos", None),
        "pad_token_id": 1,
        "initializer_range": spread,
        "tie_word_embeddings": False,
    }
    made = tiny.llama(vocab, hidden, layers, heads, 48, seed=seed, positions=128, **{**settings, **more})
    return made.to(dtype)


def near(model, seed, size=0.15):
    """A fine-tune of a model: every weight moved a little."""
    made = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight += size * torch.randn(weight.shape, generator=draws).to(weight.dtype)
    return made


class Letters:
    """A tokenizer of single characters; ids 0 and 1 are special."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = None, None, 1, None
    padding_side = "left"

    def __init__(self, order=None):
        self.order = list(range(VOCABULARY)) if order is None else list(order)

    def __len__(self):
        return len(self.order)

    def __call__(self, text, add_special_tokens=True, **_):
        if isinstance(text, str):
            return {"input_ids": [self.order.index(ord(c) % 90 + 2) for c in text]}
        return {"input_ids": [self(one)["input_ids"] for one in text]}

    def decode(self, ids):
        return "".join(chr((self.order[i] - 2) % 90 + 32) for i in ids)

    def get_vocab(self):
        return {f"<{word}>": place for place, word in enumerate(self.order)}

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="session")
def large():
    return make_llama(0, hidden=48, heads=6)


@pytest.fixture(scope="session")
def base():
    return make_llama(1)


@pytest.fixture(scope="session")
def experts(base):
    return {"math": near(base, 2), "chat": near(base, 3)}


@pytest.fixture(scope="session")
def batch():
    """Three prompts of 7, 4 and 6 tokens, padded on the left."""
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def rows_of(batch):
    """The batch's prompts one by one, without padding."""
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield ids[mask > 0][None]


@pytest.fixture(scope="session")
def make():
    """The helpers of this file, which test modules cannot import."""
    return SimpleNamespace(llama=make_llama, near=near, letters=Letters, rows_of=rows_of)
