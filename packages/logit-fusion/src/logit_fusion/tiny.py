"""The demo's tiny Llamas: how they are made, trained and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.checkpoint import load_tensors
from fusion_core.seeding import generator
from fusion_core.testing import tiny
from logit_fusion.corpus import Corpus, encode, shipped

__all__ = ["SIZES", "fit", "llama", "load_model", "row_source"]

LENGTH, ROWS, GENERAL_ROWS = 64, 16, 11
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden": 64, "intermediate": 160, "layers": 2},
    "large": {"hidden": 128, "intermediate": 352, "layers": 3},
}


def llama(size: str, vocabulary: int, seed: int = 0) -> Any:
    """A Llama with tied tables and four heads.

    Args:
        size: ``small`` or ``large``.
        vocabulary: entries of the table.
        seed: of the first weights.
    """
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return tiny.llama(vocabulary, **SIZES[size], seed=seed, **marks)


def load_model(name: str) -> Any:
    """A model that ships with the package: ``large``, ``small``, ``docs``, ``web`` or ``qa``."""
    state = load_tensors(Path(str(shipped() / f"{name}.safetensors")))
    vocabulary = state["model.embed_tokens.weight"].shape[0]
    model = llama("large" if name == "large" else "small", vocabulary)
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def _rows(ids: np.ndarray[Any, Any], count: int, draws: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(ids) - LENGTH, (count,), generator=draws)
    return torch.from_numpy(ids)[starts[:, None] + torch.arange(LENGTH)]


def row_source(corpus: Corpus, tokenizer: Any) -> Callable[[str, torch.Generator], Tensor]:
    """A function that draws a batch of a domain, or of the general text with its sums.

    Args:
        corpus: the texts.
        tokenizer: of the models.
    """
    ids = {name: encode(tokenizer, texts) for name, texts in corpus.train.items()}
    ids |= {"general": encode(tokenizer, corpus.general), "sums": encode(tokenizer, corpus.arithmetic)}

    def draw(name: str, draws: torch.Generator) -> Tensor:
        if name != "general":
            return _rows(ids[name], ROWS, draws)
        parts = [_rows(ids[name], GENERAL_ROWS, draws), _rows(ids["sums"], ROWS - GENERAL_ROWS, draws)]
        return torch.cat(parts)

    return draw


def fit(
    model: nn.Module, batch: Callable[[torch.Generator], Tensor], *, steps: int, lr: float, seed: int
) -> Any:
    """Next-token training in place: AdamW, cosine to a tenth, 20 steps of warm-up, gradients clipped at 1.

    Args:
        model: a causal language model.
        batch: draws rows of ids.
        steps: how many.
        lr: peak learning rate.
        seed: of the draws.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    draws = generator(seed, "rows")

    def factor(step: int) -> float:
        if step < 20:
            return (step + 1) / 20
        return 0.55 + 0.45 * math.cos(math.pi * (step - 20) / max(steps - 20, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(steps):
        rows = batch(draws)
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
