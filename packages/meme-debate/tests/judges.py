"""Small judges, memes and debates that the tests of this package share."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from meme_debate.judge import Judge
from meme_debate.meme import Debate, Meme
from meme_debate.settings import JudgeSettings
from meme_debate.tokens import word_tokenizer

TEXT = {
    "d_model": 16,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "dropout_rate": 0.0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WORDS = ["cat", "dog", "rocket", "coffee", "giant", "tiny", "look", "cold", "again", "moon", "clock", "rude"]


def picture(seed=0, size=(20, 24)):
    """A PIL picture of noise."""
    draws = np.random.default_rng(seed)
    return Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8))


def make_memes(count=12, seed=0, images=True):
    """Memes with alternating labels whose texts tell the label."""
    draws = np.random.default_rng(seed)
    memes, debates = [], []
    for i in range(count):
        label = i % 2
        words = " ".join(draws.choice(WORDS[:-1], 3 + i % 5))
        text = f"{words} rude" if label else words
        memes.append(
            Meme(f"m{i}", picture(i % 4) if images else None, text, f"a {WORDS[i % 4]}", label,
                 group="even" if i % 4 < 2 else "odd", split="train")
        )  # fmt: skip
        debates.append(
            Debate(f"m{i}", f"the words are {'rude' if label else 'odd'}, {words}", f"only a {words} joke",
                   (i // 2) % 2)
        )  # fmt: skip
    return memes, debates


def make_judge(fusion="layerwise", seed=0, **settings):
    """A judge with random weights and a tokenizer of the words above."""
    memes, debates = make_memes(24)
    texts = [f"Text: Caption: Harmful: Harmless: {m.text} {m.caption} {d.harmful} {d.harmless}" for m, d in
             zip(memes, debates, strict=True)]  # fmt: skip
    tokenizer = word_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge({**TEXT, "vocab_size": len(tokenizer)}, VISION, fusion, JudgeSettings(**settings))
        for name, weight in judge.named_parameters():
            if ".ca_block." in name or name.startswith("clf"):
                torch.nn.init.normal_(weight, std=0.3)
    judge.tokenizer = tokenizer
    return judge.eval()
