"""Log-likelihoods of texts under a fusion, and the members' logits that they and the reports rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import DataError, InputError, check_text
from fusion_core.progress import track
from fusion_core.results import Result
from logit_fusion.config import FusionConfig
from logit_fusion.engine import Prompts

if TYPE_CHECKING:
    from logit_fusion.model import FusedModel

__all__ = ["Encoded", "Read", "Scores", "encode", "read_texts", "score"]

Text = str | tuple[str, str] | Sequence[int]
_ELEMENTS = 1 << 25  # of one member's logits at a time


@dataclass(frozen=True, slots=True, repr=False)
class Scores(Result):
    """Log-likelihoods of N texts.

    Attributes:
        log_probs: (tokens) natural log-probabilities of all scored tokens, text after text.
        text: (tokens) which text each token belongs to.
        token: (tokens) ids.
        hit: (tokens) whether the token is the likeliest.
        nll: (N) negative log-likelihood per scored token, in nats.
        mean_nll: over all tokens.
        top1: share of hits over all tokens, in [0, 1].
    """

    log_probs: NDArray[Any]
    text: NDArray[Any]
    token: NDArray[Any]
    hit: NDArray[Any]
    nll: NDArray[Any]
    mean_nll: float
    top1: float

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return float(np.exp(self.mean_nll))

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], count: int) -> Scores:
        """Scores of parts (log_probs, text, token, hit), in the order of the texts."""
        columns = [torch.cat([part[i].cpu() for part in parts]).numpy() for i in range(4)]
        order = np.argsort(columns[1], kind="stable")
        log_probs, text, token, hit = (column[order] for column in columns)
        tokens = np.bincount(text, minlength=count)
        total = np.bincount(text, weights=-log_probs.astype(np.float64), minlength=count)
        return cls(
            log_probs, text, token, hit, total / np.maximum(tokens, 1), float(total.sum() / len(text)),
            float(hit.mean()),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text: the ids that are given, and those that are scored."""

    prompt: list[int]
    answer: list[int]


def encode(model: FusedModel, texts: Sequence[Text], max_length: int | None = None) -> list[Encoded]:
    """The ids of texts.

    Args:
        model: whose tokenizer.
        texts: a text is scored from its second token on; of a pair (prompt, answer) the answer alone is; ids
            are taken as they are.
        max_length: most tokens of a text; the rest is cut off.

    Raises:
        InputError: no texts, texts without a tokenizer, or one with half a surrogate pair.
        DataError: a text with nothing to score.
    """
    if isinstance(texts, str) or not texts:
        raise InputError(f"texts is {texts!r}, wanted a list of texts, pairs (prompt, answer) or ids")
    found: list[Encoded] = []
    for number, text in enumerate(texts):
        if isinstance(text, str | tuple) and model.tokenizer is None:
            raise InputError("texts need the model's tokenizer; pass FusedModel(tokenizer=...) or give ids")
        for part in (text,) if isinstance(text, str) else text if isinstance(text, tuple) else ():
            check_text(f"text {number}", str(part))
        if isinstance(text, str):
            ids = _plain(model.tokenizer, text)
            one = Encoded(ids[:1], ids[1:])
        elif isinstance(text, tuple):
            prompt, answer = text
            one = Encoded(
                _plain(model.tokenizer, str(prompt)),
                list(model.tokenizer(str(answer), add_special_tokens=False)["input_ids"]),
            )
        else:
            ids = [int(i) for i in text]
            one = Encoded(ids[:1], ids[1:])
        if max_length is not None:
            one = Encoded(one.prompt[:max_length], one.answer[: max(max_length - len(one.prompt), 0)])
        if not one.prompt or not one.answer:
            raise DataError(
                f"text {number} has {len(one.prompt)} tokens to read and {len(one.answer)} to score"
            )
        found.append(one)
    return found


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    return ids[:-1] if len(ids) > 1 and end is not None and ids[-1] == end else ids


@dataclass(frozen=True, eq=False)
class Read:
    """What all members say at some positions of some texts.

    Attributes:
        aligned: large, base, experts: logits (rows, positions, vocab).
        weights: (rows, positions, T) by evidence, or a rule.
        target: (rows, positions) the tokens that follow.
        mask: (rows, positions) True where there is one.
        text: (rows) numbers of the texts.
    """

    aligned: list[Tensor]
    weights: Any
    target: Tensor
    mask: Tensor
    text: Tensor

    def scored(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probability, text, token and hit of every token that counts, under (rows, positions, vocab)."""
        found = log_probs.gather(-1, self.target[..., None])[..., 0]
        text = self.text[:, None].expand_as(self.target)
        hit = log_probs.argmax(-1) == self.target
        return tuple(part[self.mask] for part in (found, text, self.target, hit))  # pyright: ignore


def read_texts(
    model: FusedModel,
    encoded: Sequence[Encoded],
    settings: FusionConfig,
    *,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Iterator[Read]:
    """Let all members read texts, by length, a bounded number of positions at a time.

    Args:
        model: a fusion.
        encoded: of :func:`encode`.
        settings: of the fusion; they decide whether evidence is kept.
        batch_size: texts per pass, at least 1.
        progress: a bar; None: on a terminal.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, wanted at least 1")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompt) + len(encoded[i].answer))
    starts = range(0, len(order), batch_size)
    for start in track(starts, "texts", enabled=progress):
        chosen = order[start : start + batch_size]
        yield from _read_batch(model, [encoded[i] for i in chosen], chosen, settings)


def _read_batch(
    model: FusedModel, rows: Sequence[Encoded], numbers: Sequence[int], settings: FusionConfig
) -> Iterator[Read]:
    """Prompts are padded on the left, answers on the right, so that all answers start at one place."""
    device = model.device
    before, after = max(len(row.prompt) for row in rows), max(len(row.answer) for row in rows)
    ids = torch.zeros(len(rows), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, before - len(row.prompt) : before + len(row.answer)] = torch.tensor(
            row.prompt + row.answer
        )
        mask[place, before - len(row.prompt) : before + len(row.answer)] = 1
    ids, mask = ids.to(device), mask.to(device)
    text = torch.tensor(list(numbers), device=device)
    width = max(model.vocabulary.widths.values())
    piece = max(_ELEMENTS // (len(rows) * width), 1)
    shared, cache = Prompts(before), model.engine.cache()
    start = 0
    while start < before + after - 1:
        # The first pass takes the whole prompt: a member's own prompt stands in place of it.
        stop = (
            min(max(start, before - 1) + piece, before + after - 1)
            if start
            else before - 1 + min(piece, after)
        )
        stop = max(stop, start + 1, min(before, before + after - 1))
        keep = stop - max(start, before - 1)
        part = mask[:, :stop]
        aligned, weights = model.engine.read(
            settings, ids[:, start:stop], None if bool(part.all()) else part, None, cache, keep, shared
        )
        target, real = ids[:, stop - keep + 1 : stop + 1], mask[:, stop - keep + 1 : stop + 1] > 0
        home = aligned[0].device
        yield Read(aligned, weights, target.to(home), real.to(home), text.to(home))
        start = stop


@torch.no_grad()
def score(
    model: FusedModel,
    texts: Sequence[Text],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> Scores:
    """Teacher-forced log-likelihoods of texts under the fusion.

    Args:
        model: a fusion.
        texts: a text is scored from its second token on (its first where the tokenizer puts one before
            it); of
            a pair (prompt, answer) the answer alone is; lists of ids are taken as they are.
        batch_size: texts per pass.
        max_length: most tokens of a text.
        progress: a bar; None: on a terminal.
        **changes: fields of the fusion's settings, for this call.

    Raises:
        InputError: no texts, texts without a tokenizer, or one with half a surrogate pair.
        DataError: a text with nothing to score.
        ContextLengthError: a member cannot read as much.
    """
    settings = model.settings.replace(**changes) if changes else model.settings
    encoded = encode(model, texts, max_length)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    names = ["large", *model.engine.names[1:]]
    for read in read_texts(model, encoded, settings, batch_size=batch_size, progress=progress):
        step = model.engine.fuse(settings, read.aligned, read.weights).step
        step.check(names)
        parts.append(read.scored(step.log_probs))
    return Scores.of(parts, len(encoded))
