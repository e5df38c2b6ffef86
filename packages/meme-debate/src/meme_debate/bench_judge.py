"""Benchmarks of the judges: training against the authors' scheme, and the light judge's seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusion_core.bench import Row, check_target, paired
from fusion_core.seeding import generator, rng

from .ablations import judge_text
from .encoding import pixels_of
from .features import Features, image_features
from .judge import Judge
from .meme import Debate, Meme
from .settings import JudgeSettings
from .text_judge import TextJudge
from .tokens import word_tokenizer
from .training import JudgeBatches, JudgeTrainConfig, decay_groups

__all__ = ["rows"]

MEMES, BATCH, LENGTH = 64, 8, 512
WORDS = 4000
TEXT = {"d_model": 96, "d_kv": 24, "num_heads": 4, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2,
        "dropout_rate": 0.1}  # fmt: skip
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 224, "patch_size": 32}  # fmt: skip
LIGHT_TEXTS, LIGHT_WORDS, LIGHT_SECONDS = 10_000, 299, 15


def made_debates(count: int, seed: int = 0) -> tuple[list[Meme], list[Debate]]:
    """Memes and debates with the lengths of the authors' Harm-C ones: about 66 tokens alone, 412 with debate.

    Args:
        count: memes.
        seed: of words and lengths.
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
        image = Image.fromarray(draws.integers(0, 256, (224, 224, 3), dtype=np.uint8))
        memes.append(Meme(f"b{number}", image, words(30, 8), words(31, 8), number % 2))
        debates.append(Debate(f"b{number}", words(172, 22), words(168, 22), number % 2))
    return memes, debates


def _judge(memes: list[Meme], debates: list[Debate]) -> Judge:
    texts = [judge_text(meme, debate) for meme, debate in zip(memes, debates, strict=True)]
    tokenizer = word_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(0, "bench").initial_seed())
        judge = Judge(
            {**TEXT, "vocab_size": len(tokenizer)}, VISION, settings=JudgeSettings(max_length=LENGTH)
        )
    judge.tokenizer = tokenizer
    judge.image_transformer.requires_grad_(False)
    return judge


class _Run:
    """Optimizer steps over one epoch's memes, by our batches or by the authors' scheme.

    Args:
        judge: trained.
        batches: ours; the authors' scheme takes its texts and labels.
    """

    def __init__(self, judge: Judge, batches: JudgeBatches) -> None:
        self.judge, self.batches = judge.train(), batches
        self.optimizer = torch.optim.AdamW(decay_groups(judge, 0.01), lr=5e-4)
        size = int(judge.vision_config.image_size)
        self.pixels = torch.stack([pixels_of(meme.image, size) for meme in batches.memes])

    def ours(self) -> None:
        """One epoch of our batches."""
        self._steps(iter(self.batches))

    def authors(self) -> None:
        """The same memes in arbitrary order, padded to the longest length, the tower run in every step."""
        self._steps(self._padded())

    def _padded(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.batches.memes), BATCH):
            rows = np.arange(start, start + BATCH)
            batch = self.batches.batch(rows)
            lack = LENGTH - batch["input_ids"].shape[1]
            del batch["image_features"]
            for name in ("input_ids", "attention_mask"):
                batch[name] = torch.nn.functional.pad(batch[name], (0, lack))
            yield {**batch, "pixel_values": self.pixels[rows]}

    def _steps(self, batches: Iterator[dict[str, Tensor]]) -> None:
        for batch in batches:
            self.judge(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _fact(name: str, value: float, target: str, note: str) -> Row:
    return Row(name=name, ratio=value, target=target, met=check_target(value, target), note=note,
               threads=torch.get_num_threads())  # fmt: skip


def _training(repeats: int) -> Iterator[Row]:
    memes, debates = made_debates(MEMES)
    judge = _judge(memes, debates)
    forwards: list[int] = []
    judge.image_transformer.register_forward_hook(lambda *_: forwards.append(1))
    features: Features = image_features(judge, [meme.image for meme in memes])
    first = len(forwards)
    share = 0.0
    against = f"pad to {LENGTH}, tower in every step"
    for dropout, target in ((0.0, ">= 1.5"), (0.5, ">= 2.5")):
        config = JudgeTrainConfig(batch_size=BATCH, debate_dropout=dropout)
        run = _Run(judge, JudgeBatches(judge, memes, list(debates), config, features))
        before = len(forwards)
        run.ours()
        first += len(forwards) - before
        yield paired(
            f"judge training, tiny model, debate_dropout={dropout:g}",
            run.ours,
            run.authors,
            repeats=repeats,
            warmup=1,
            target=target,
            dtype="float32",
            against=against,
            note=f"{MEMES} memes of about 412 tokens (66 without debate), batches of {BATCH}",
        )
        if dropout == 0:
            big = JudgeTrainConfig(batch_size=32, debate_dropout=0.0)
            share = JudgeBatches(judge, *made_debates(1024, 1), big, features).padding_share()
    extra = first - -(-MEMES // 32)
    note = "of 1024 memes, windows of 8 batches of 32"
    yield _fact("padding share of a training epoch", share, "<= 0.05", note)
    kept = "states of pictures are kept"
    yield _fact("vision forwards after the first pass", float(extra), "<= 0", kept)


def _light() -> Row:
    draws = rng(0, "bench light")
    vocabulary = np.array([f"word{i}" for i in range(8000)])
    weights = 1 / np.arange(1, 8001)
    table = draws.choice(vocabulary, (LIGHT_TEXTS, LIGHT_WORDS), p=weights / weights.sum())
    texts = [" ".join(row) for row in table]
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


def rows(repeats: int = 5) -> Iterator[Row]:
    """All rows about judges, on the CPU.

    Args:
        repeats: pairs that are timed of each comparison.
    """
    yield from _training(repeats)
    yield _light()
