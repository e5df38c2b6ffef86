"""The demo's texts: Python's standard library, its language reference, and made-up questions.

General text is the library's own source; three domains lie outside it: ``docs`` (the language reference of
:mod:`pydoc_data`), ``web`` (the sources of email, http, urllib, html and xml) and ``qa`` (sums in words).
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.errors import DataError
from fusion_core.seeding import rng

__all__ = [
    "DOMAINS",
    "Corpus",
    "collect",
    "held_out_windows",
    "load_tokenizer",
    "load_windows",
    "train_tokenizer",
]

DOMAINS = ("docs", "web", "qa")
_WEB = {"email", "http", "urllib", "html", "xml"}
_LEFT_OUT = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests",
}  # fmt: skip
_NUMBERS = 50


@dataclass(frozen=True)
class Corpus:
    """Texts by use.

    Args:
        general: the library's source files.
        arithmetic: lines ``a+b=c``, part of the general text.
        train: domain -> texts for its expert.
        held_out: domain (and ``"general"``) -> texts that no model sees.
    """

    general: list[str]
    arithmetic: list[str]
    train: dict[str, list[str]]
    held_out: dict[str, list[str]]


def _sources(root: Path) -> tuple[list[str], list[str]]:
    general: list[str] = []
    web: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.intersection(parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            (web if parts[0] in _WEB else general).append(text)
    return general, web


def _part(texts: Sequence[str], every: int) -> tuple[list[str], list[str]]:
    """What is left, and every n-th text, which is held out."""
    held = list(texts[::every])
    return [text for place, text in enumerate(texts) if place % every], held


def _without_paragraphs(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Texts without the paragraphs that stand in others too."""
    known = {paragraph.strip() for other in others for paragraph in other.split("\n\n")}
    kept = ("\n\n".join(p for p in text.split("\n\n") if p.strip() not in known) for text in texts)
    return [text for text in kept if text.strip()]


def collect(seed: int = 0) -> Corpus:
    """Read the texts of the running Python.

    Args:
        seed: of the sums' order.

    Raises:
        DataError: the standard library or its language reference is not installed whole.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "pydoc_data.topics is missing: this Python's standard library is not whole"
        ) from error
    general, web = _sources(Path(sysconfig.get_path("stdlib")))
    if len(general) < 200 or len(web) < 20:
        raise DataError(
            f"the standard library has {len(general)} + {len(web)} sources, wanted about 500 + 60"
        )
    draws = rng(seed, "corpus")
    pairs = [(a, b) for a in range(_NUMBERS) for b in range(_NUMBERS)]
    questions = [f"Q: what is {a} plus {b}? A: {a + b}\n" for a, b in pairs]
    questions = [questions[i] for i in draws.permutation(len(questions))]
    general, held_general = _part(general, 20)
    docs, held_docs = _part([str(topics[key]) for key in sorted(topics)], 5)
    docs = _without_paragraphs(docs, held_docs)  # topics quote each other
    web, held_web = _part(web, 5)
    qa, held_qa = _part(questions, 5)
    arithmetic = [f"{a}+{b}={a + b}\n" for a, b in pairs]
    arithmetic = [arithmetic[i] for i in draws.permutation(len(arithmetic))]
    return Corpus(
        general,
        arithmetic,
        {"docs": docs, "web": web, "qa": qa},
        {"docs": held_docs, "web": held_web, "qa": held_qa, "general": held_general},
    )


def held_out_windows(corpus: Corpus, count: int, characters: int, seed: int = 0) -> dict[str, list[str]]:
    """Windows of the held-out texts, cut at random places.

    Args:
        corpus: whose held-out texts.
        count: windows of each domain.
        characters: of each.
        seed: of the places.
    """
    found: dict[str, list[str]] = {}
    for name, texts in corpus.held_out.items():
        draws = rng(seed, "windows", name)
        joined = "".join(texts) if name == "qa" else "\n\n".join(texts)
        # Not one of many windows may overlap another: one place in each of `count` equal stretches.
        stretch = (len(joined) - characters) / count
        starts = [
            int((i + draws.random() * max(1 - characters / stretch, 0)) * stretch) for i in range(count)
        ]
        found[name] = [joined[start : start + characters] for start in starts]
    return found


def train_tokenizer(texts: Sequence[str], size: int = 512) -> Any:
    """A byte-level byte-pair tokenizer with digits apart.

    Args:
        texts: to learn from.
        size: of the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made: Any = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(list(texts), trainer)
    return wrap_tokenizer(made)


def wrap_tokenizer(made: Any) -> Any:
    """A tokenizer of ``tokenizers`` as one of transformers, padded on the left."""
    from transformers import PreTrainedTokenizerFast

    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


def load_tokenizer() -> Any:
    """The tokenizer that ships with the package."""
    from tokenizers import Tokenizer

    return wrap_tokenizer(Tokenizer.from_str((shipped() / "tokenizer.json").read_text("utf-8")))


def load_windows() -> dict[str, list[str]]:
    """The held-out windows that ship with the package: domain -> texts."""
    return json.loads((shipped() / "windows.json").read_text("utf-8"))


def shipped() -> Any:
    """The folder of the shipped checkpoints."""
    return files("logit_fusion") / "checkpoints"


def encode(tokenizer: Any, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids of texts laid end to end."""
    rows = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray(row.ids, np.int64) for row in rows])
