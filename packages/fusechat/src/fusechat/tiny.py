"""The demo's tiny models: tokenizers, Llamas, training and bits per character."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fusion_core.checkpoint import load_tensors
from fusion_core.seeding import generator
from fusion_core.testing import tiny

__all__ = [
    "bits_per_character",
    "fit_language",
    "language_batches",
    "load_model",
    "load_tokenizer",
    "train_tokenizer",
]

LENGTH, BATCH = 80, 8


def train_tokenizer(texts: Sequence[str], size: int, kind: Literal["bytes", "blanks"]) -> Any:
    """A byte-pair tokenizer that puts ``<s>`` and ``</s>`` around a text.

    Args:
        texts: to learn from.
        size: of the vocabulary.
        kind: ``bytes`` keeps blanks as part of tokens by bytes, ``blanks`` marks words.
    """
    from tokenizers import processors

    tokenizer = tiny.bpe(texts, size, kind)
    pieces: Any = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=pieces
    )
    return tokenizer


def load_tokenizer(name: str) -> Any:
    """A tokenizer that ships with the package: ``pivot``, ``source1`` or ``source2``."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str((_shipped() / f"{name}.tokenizer.json").read_text("utf-8"))
    return tiny.as_fast(made)


def _shipped() -> Any:
    return files("fusechat") / "checkpoints"


def load_model(name: str) -> Any:
    """A model that ships with the package: ``pivot``, ``source1`` or ``source2``."""
    entry = json.loads((_shipped() / "models.json").read_text("utf-8"))[name]
    model = tiny.llama(entry["vocabulary"], entry["hidden"])
    state = load_tensors(Path(str(_shipped() / f"{name}.safetensors")))
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def language_batches(tokenizer: Any, texts: Sequence[str], draws: torch.Generator) -> Callable[[], Tensor]:
    """Random rows of 80 tokens out of the texts laid end to end."""
    ids = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])

    def batch() -> Tensor:
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=draws)
        return ids[starts[:, None] + torch.arange(LENGTH)]

    return batch


def fit_language(model: Any, tokenizer: Any, texts: Sequence[str], steps: int, lr: float, seed: int) -> Any:
    """Next-token training on texts."""
    batch = language_batches(tokenizer, texts, generator(seed, "language"))

    def loss() -> Tensor:
        rows = batch()
        return model(input_ids=rows, labels=rows).loss

    return tiny.fit(model, loss, steps, lr)


def bits_per_character(model: Any, tokenizer: Any, texts: Sequence[str], most: int = 512) -> float:
    """Negative log-likelihood of whole texts in bits per character: comparable between tokenizers."""
    nats, characters = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(texts), 16):
            rows = [tokenizer(text)["input_ids"][:most] for text in texts[start : start + 16]]
            width = max(map(len, rows))
            ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            log_probs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
            found = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
            nats -= float((found * mask[:, 1:]).sum())
            characters += sum(len(text) for text in texts[start : start + 16])
    return nats / characters / math.log(2)
