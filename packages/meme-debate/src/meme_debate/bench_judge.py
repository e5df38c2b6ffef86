"""Benchmarks of the judges: training against the authors' scheme, and the light judge's seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusion_core.bench import Row, check_target, paired
from fusion_core.seeding import generator, rng

from .ablations import judge_text
from .batches import JudgeBatches, JudgeTrainConfig
from .encoding import pixels_of
from .features import Features, image_features
from .judge import Judge
from .meme import Debate, Meme
from .settings import JudgeSettings
from .text_judge import TextJudge
from .tokens import word_tokenizer
from .training import decay_groups

__all__ = ["rows"]

MEMES, BATCH, LENGTH = 128, 8, 512
WORDS = 4000
Rows = NDArray[np.int64]
TEXT = {"d_model": 96, "d_kv": 24, "num_heads": 4, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2,
        "dropout_rate": 0.1}  # fmt: skip
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 224, "patch_size": 32}  # fmt: skip
BASE_TEXT = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": 12,
             "num_decoder_layers": 12, "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu"}  # fmt: skip
BASE_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
               "num_attention_heads": 12, "image_size": 224, "patch_size": 32}  # fmt: skip
LIGHT_TEXTS, LIGHT_WORDS, LIGHT_SECONDS = 10_000, 299, 15


def made_debates(count: int, seed: int = 0, *, images: bool = True) -> tuple[list[Meme], list[Debate]]:
    """Memes and debates with the lengths of the authors' Harm-C ones: about 66 tokens alone, 412 with debate.

    Args:
        count: memes.
        seed: of words and lengths.
        images: whether they have pictures.
    """
    draws = rng(seed, "bench debates")
    vocabulary = np.array([f"w{i}" for i in range(WORDS)])
    weights = 1 / np.arange(1, WORDS + 1)
    weights /= weights.sum()

    def words(mean: float, spread: float) -> str:
        length = int(np.clip(draws.normal(mean, spread), 5, 400))
        return " ".join(draws.choice(vocabulary, length, p=weights))

    memes: list[Meme] = []
    debates: list[Debate] = []
    for number in range(count):
        image = None
        if images:
            image = Image.fromarray(draws.integers(0, 256, (224, 224, 3), dtype=np.uint8))
        memes.append(Meme(f"b{number}", image, words(30, 8), words(31, 8), number % 2))
        debates.append(Debate(f"b{number}", words(172, 22), words(168, 22), number % 2))
    return memes, debates


def _judge(
    memes: list[Meme],
    debates: list[Debate],
    text: dict[str, Any] = TEXT,
    vision: dict[str, Any] = VISION,
) -> Judge:
    texts = [judge_text(meme, debate) for meme, debate in zip(memes, debates, strict=True)]
    tokenizer = word_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(0, "bench").initial_seed())
        settings = JudgeSettings(max_length=LENGTH)
        judge = Judge({"vocab_size": len(tokenizer), **text}, vision, settings=settings)
    judge.tokenizer = tokenizer
    judge.image_transformer.requires_grad_(False)
    return judge


class _Run:
    """Training steps over a few batches at a time, by ours or by the authors' scheme.

    Args:
        judge: trained.
        batches: ours; the authors' scheme takes its memes in their order.
        count: batches a call, half of them without debate where ``debate_dropout`` is 0.5.
        update: whether the optimizer steps too.
    """

    def __init__(self, judge: Judge, batches: JudgeBatches, count: int, *, update: bool = True) -> None:
        self.judge, self.batches, self.count = judge.train(), batches, count
        self.optimizer = torch.optim.AdamW(decay_groups(judge, 0.01), lr=5e-4) if update else None
        size = int(judge.vision_config.image_size)
        self.pixels = torch.stack([pixels_of(meme.image, size) for meme in batches.memes])
        plan = batches.plan()
        kinds = [[rows for rows, dropped in plan if dropped == kind] for kind in (False, True)]
        self._ours = itertools.cycle(self._mixed(kinds[0], kinds[1]))
        whole = range(0, len(batches.memes) - batches.config.batch_size + 1, batches.config.batch_size)
        self._theirs = itertools.cycle(whole)

    @staticmethod
    def _mixed(whole: list[Rows], short: list[Rows]) -> list[tuple[Rows, bool]]:
        """The batches of the plan with kinds in turn, so that every call has the same share of each."""
        if not short:
            return [(rows, False) for rows in whole]
        return [each for a, b in zip(whole, short, strict=False) for each in ((a, False), (b, True))]

    def ours(self) -> None:
        """The next batches of our plan: like lengths together, states of the pictures kept."""
        for _ in range(self.count):
            rows, dropped = next(self._ours)
            self._step(self.batches.batch(rows, dropped=dropped))

    def authors(self) -> None:
        """As many memes in arbitrary order, padded to the longest length, the tower run in every step."""
        model: Any = self.judge.text_transformer
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")  # transformers' own; on a CPU it is the faster one of two
        for _ in range(self.count):
            self._step(self.padded(next(self._theirs)))
        model.set_attn_implementation(before)

    def padded(self, start: int) -> dict[str, Tensor]:
        """A batch as the authors make it."""
        rows = np.arange(start, start + self.batches.config.batch_size)
        batch = self.batches.batch(rows)
        lack = LENGTH - batch["input_ids"].shape[1]
        del batch["image_features"]
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, lack))
        return {**batch, "pixel_values": self.pixels[rows]}

    def _step(self, batch: dict[str, Tensor]) -> None:
        self.judge(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.judge.zero_grad(set_to_none=True)


def _fact(name: str, value: float, target: str, note: str) -> Row:
    return Row(name=name, ratio=value, target=target, met=check_target(value, target), note=note,
               threads=torch.get_num_threads())  # fmt: skip


def _training(repeats: int) -> Iterator[Row]:
    memes, debates = made_debates(MEMES)
    judge = _judge(memes, debates)
    forwards: list[int] = []
    judge.image_transformer.register_forward_hook(lambda *_: forwards.append(1))
    features: Features = image_features(judge, [meme.image for meme in memes])
    first = len(forwards) - -(-MEMES // 32)
    for dropout, target in ((0.0, ">= 1.5"), (0.5, ">= 2.5")):
        config = JudgeTrainConfig(batch_size=BATCH, debate_dropout=dropout)
        run = _Run(judge, JudgeBatches(judge, memes, list(debates), config, features), 2)
        before = len(forwards)
        run.ours()
        first += len(forwards) - before
        yield paired(
            f"judge training, tiny model, debate_dropout={dropout:g}",
            run.ours,
            run.authors,
            repeats=repeats,
            warmup=0,
            target=target,
            dtype="float32",
            against=f"pad to {LENGTH}, tower in every step",
            note=f"2 batches of {BATCH} memes of about 412 tokens (66 without debate), of {MEMES} memes",
        )
    kept = "states of pictures are kept"
    yield _fact("vision forwards after the first pass", float(first), "<= 0", kept)
    big = JudgeTrainConfig(batch_size=32, debate_dropout=0.0)
    share = JudgeBatches(judge, *made_debates(1024, 1, images=False), big, features).padding_share()
    note = "of 1024 memes, windows of 8 batches of 32"
    yield _fact("padding share of a training epoch", share, "<= 0.05", note)


def base_row(repeats: int = 5) -> Row:
    """Forward and backward passes at the size of Flan-T5-base and CLIP ViT-B/32, with random weights.

    Args:
        repeats: pairs that are timed.
    """
    memes, debates = made_debates(16)
    judge = _judge(memes, debates, BASE_TEXT, BASE_VISION)
    features = image_features(judge, [meme.image for meme in memes])
    config = JudgeTrainConfig(batch_size=2, debate_dropout=0.0)
    run = _Run(judge, JudgeBatches(judge, memes, list(debates), config, features), 1, update=False)
    return paired(
        "judge training, size of Flan-T5-base, debate_dropout=0",
        run.ours,
        run.authors,
        repeats=repeats,
        warmup=0,
        target=">= 1.25",
        dtype="float32",
        against=f"pad to {LENGTH}, tower in every step",
        note="random weights, 2 memes of about 412 tokens, forward and backward pass",
    )


def _light() -> Row:
    draws = rng(0, "bench light")
    vocabulary = [f"word{i}" for i in range(8000)]
    weights = 1 / np.arange(1, 8001)
    table = draws.choice(len(vocabulary), (LIGHT_TEXTS, LIGHT_WORDS), p=weights / weights.sum()).tolist()
    texts = [" ".join([vocabulary[i] for i in row]) for row in table]
    labels = draws.integers(0, 2, LIGHT_TEXTS)
    start = time.perf_counter()
    TextJudge(min_df=2).fit(texts, labels).predict_proba(texts)
    seconds = time.perf_counter() - start
    return Row(
        name="light judge, fit and predict, seconds",
        ratio=seconds,
        ours_s=seconds,
        threads=torch.get_num_threads(),
        target=f"< {LIGHT_SECONDS}",
        met=check_target(seconds, f"< {LIGHT_SECONDS}"),
        note=f"{LIGHT_TEXTS} texts of {LIGHT_WORDS} words; the number is seconds, not a ratio",
    )


def rows(repeats: int = 5, *, base: bool = False) -> Iterator[Row]:
    """All rows about judges, on the CPU.

    Args:
        repeats: pairs that are timed of each comparison.
        base: also at the size of Flan-T5-base, which takes some minutes.
    """
    yield _light()
    yield from _training(repeats)
    if base:
        yield base_row(repeats)
