"""The stand-in judges: small networks for the stand-in memes, with a tower that names their photographs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.seeding import generator, rng

from .judge import Fusion, Judge
from .settings import JudgeSettings
from .stand_in_memes import PIXELS, StandIn

__all__ = ["make_judge", "train_tower"]

TOWER_STEPS = 100
_DRAWING = threading.Lock()  # weights are drawn from the global generator, one network at a time

TEXT = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 1,
        "dropout_rate": 0.0, "feed_forward_proj": "relu", "tie_word_embeddings": True}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": PIXELS, "patch_size": 12}  # fmt: skip


def make_judge(tokenizer: Any, fusion: Fusion, seed: int) -> Judge:
    """A small fused judge with random weights.

    Args:
        tokenizer: of words, such as :func:`meme_debate.tokens.word_tokenizer` makes.
        fusion: see :class:`Judge`.
        seed: of the weights; the same weights for every fusion.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "judge").initial_seed())
        settings = JudgeSettings(max_length=128, name=f"stand-in judge {seed}")
        judge = Judge({**TEXT, "vocab_size": len(tokenizer)}, VISION, fusion, settings)
    judge.tokenizer = tokenizer
    return judge


def train_tower(
    judge: Judge, memes: Sequence[StandIn], pixels: Tensor, *, seed: int = 0, steps: int = TOWER_STEPS
) -> float:
    """Let the tower learn to name its photograph, which stands for CLIP's pretraining; it sees no label.

    Args:
        judge: its tower is trained in place, then frozen.
        memes: whose pictures are shown.
        pixels: (N, 3, S, S) of :func:`meme_debate.stand_in_memes.pixels_of_memes`.
        seed: of weights and order.
        steps: of 64 pictures.

    Returns:
        The share of the last steps' pictures that it named.
    """
    names = sorted({each.thing for each in memes})
    target = torch.tensor([names.index(each.thing) for each in memes])
    tower, right = judge.image_transformer, 0.0
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "tower").initial_seed())
        head = nn.Linear(int(judge.vision_config.hidden_size), len(names))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3, fused=True)
    draws = rng(seed, "tower order")
    for _ in range(steps):
        rows = torch.from_numpy(draws.integers(0, len(memes), 64))
        logits = head(tower(pixel_values=pixels[rows]).last_hidden_state[:, 0])
        loss = nn.functional.cross_entropy(logits, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = 0.9 * right + 0.1 * float((logits.argmax(1) == target[rows]).float().mean())
    optimizer.zero_grad()  # what is left would count in the judge's gradient norm
    tower.requires_grad_(False)
    return right
