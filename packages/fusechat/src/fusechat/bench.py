"""The benchmark: alignment against a plain Python dynamic program, and the memory of the loss.

Two byte-pair tokenizers are trained on this Python's own docstrings; one text of about 1024 tokens is
aligned.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusechat.align.pairs import dtw, span
from fusechat.align.vocabulary import decode_each
from fusechat.objective import FusionLoss
from fusechat.plain import plain_dtw, plain_loss
from fusechat.spans import encode
from fusechat.targets import FusionBatch, Targets
from fusechat.texts import Text
from fusion_core.bench import Bench, Row, memory_row, paired, peak_memory
from fusion_core.errors import ConfigError, FusionError
from fusion_core.testing import tiny

SPAN_TARGET, DTW_TARGET = ">= 1000", ">= 50"
AGAINST = "plain Python DP, rapidfuzz per pair"
_FILES = 150


def docstrings(limit: int = _FILES) -> list[str]:
    """Docstrings of the standard library, blanks collapsed, longer than 80 characters."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:limit]:
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # pragma: no cover - none in a whole installation
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 80:
                    found.append(text)
    return found


def alignment_rows(tokens: int = 1024, repeats: int = 5) -> list[Row]:
    """Time both alignments of one pair of token sequences.

    Raises:
        FusionError: the fast path is not the plain one.
    """
    texts = docstrings()
    pivot, source = tiny.bpe(texts, 3000, "blanks"), tiny.bpe(texts, 8000, "bytes")
    plain = Text(" ".join(texts), (), whole=True)
    long = encode(pivot, plain, max_length=tokens)
    text = Text(plain.text[: int(long.ends[-1])], (), whole=True)
    ours, theirs = encode(pivot, text), encode(source, text)
    strings = decode_each(source, theirs.ids), decode_each(pivot, ours.ids)
    wanted, _ = plain_dtw(*strings)
    found = dtw(*strings)
    if list(zip(found.source.tolist(), found.pivot.tolist(), strict=True)) != wanted:
        raise FusionError("the fast path of dynamic time warping differs from the plain one")
    note = f"{len(ours)} x {len(theirs)} tokens, path identical"
    reference = lambda: plain_dtw(*strings)
    common: dict[str, Any] = {"repeats": repeats, "against": AGAINST, "note": note, "warmup": 0}
    return [
        paired(
            "span alignment", lambda: span(ours.ends, theirs.ends), reference, target=SPAN_TARGET, **common
        ),
        paired("exact DTW", lambda: dtw(*strings), reference, target=DTW_TARGET, **common),
        paired("exact DTW without numba", lambda: dtw(*strings, compiled=False), reference, **common),
    ]


class _LossTask:
    """One loss with its gradient in a fresh process; unpickling makes the inputs, so they do not count."""

    def __init__(self, kind: str, batch: int, tokens: int, classes: int, k: int) -> None:
        self.arguments = (kind, batch, tokens, classes, k)

    def __reduce__(self) -> tuple[Any, ...]:
        return loss_call, self.arguments


def loss_call(
    kind: str, batch: int, tokens: int, classes: int, k: int, device: str = "cpu"
) -> Callable[[], object]:
    """A function that computes a loss and its gradient, ``"ours"`` or ``"dense"``."""
    if device == "cpu":
        torch.set_num_threads(1)
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, tokens, classes, generator=made).to(device).requires_grad_()
    labels = torch.randint(0, classes, (batch, tokens), generator=made).to(device)
    ids = torch.randint(0, classes, (batch, tokens, k), generator=made).to(device)
    values = torch.randn(batch, tokens, k, generator=made).to(device)
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    sample = FusionBatch({}, labels, (Targets(ids, values, mask, torch.zeros(batch, device=device)),))
    loss = FusionLoss(0.1, select="source")

    def ours() -> None:
        loss(logits, sample).total.backward()

    def dense() -> None:
        plain_loss(logits, labels, ids, values.softmax(-1), 0.9).backward()

    # The libraries set themselves up on the first call.
    small = torch.zeros(1, 2, 8, device=device, requires_grad=True)
    few = Targets(ids[:1, :2] % 8, values[:1, :2], mask[:1, :2], torch.zeros(1, device=device))
    loss(small, FusionBatch({}, labels[:1, :2] % 8, (few,))).total.backward()
    plain_loss(small, labels[:1, :2] % 8, ids[:1, :2] % 8, values[:1, :2].softmax(-1), 0.9).backward()
    return ours if kind == "ours" else dense


def loss_rows(
    batch: int = 2, tokens: int = 512, classes: int = 32_000, k: int = 10, device: str = "cpu"
) -> list[Row]:
    """Peak memory of the sparse loss and of the dense one, beyond the logits; the gradient counts."""
    sizes = (batch, tokens, classes, k)
    kinds = ("ours", "dense")
    if not device.startswith("cuda"):
        device = "cpu"
        peaks = {kind: peak_memory(_LossTask(kind, *sizes)) for kind in kinds}  # type: ignore[arg-type]
    else:
        peaks = {kind: peak_memory(loss_call(kind, *sizes, device), device) for kind in kinds}
    gradient = batch * tokens * classes * 4
    note = f"{batch} x {tokens} x {classes}, k={k}; the gradient alone is {gradient / 2**20:.0f} MiB"
    extra = max(peaks["ours"] - gradient, 1), max(peaks["dense"] - gradient, 1)
    common: dict[str, Any] = {"device": device, "against": "dense targets", "note": note}
    return [
        memory_row("loss and gradient, peak", peaks["ours"], peaks["dense"], **common),
        memory_row("loss beyond logits and gradient", *extra, **common),
    ]


def run(
    *,
    repeats: int = 5,
    device: str = "cpu",
    tokens: int = 1024,
    memory: bool = True,
    merging: Path | None = None,
) -> Bench:
    """Measure alignment and, on request, the memory of the loss and merging.

    Args:
        repeats: pairs per row.
        device: of the loss; alignment and merging are work of the CPU.
        tokens: of the pivot's side of the aligned pair, at least 16.
        memory: measure peaks too; on the CPU each in a fresh process.
        merging: a folder with 4 GB of room; compare a 2 GB merge with mergekit there.

    Raises:
        ConfigError: too few tokens.
    """
    if tokens < 16:
        raise ConfigError(f"tokens is {tokens}, wanted at least 16")
    bench = Bench("fusechat")
    for row in alignment_rows(tokens, repeats):
        bench.add(row)
    for row in loss_rows(device=device) if memory else ():
        bench.add(row)
    if merging is not None:
        from fusechat.bench_merging import merging_rows

        for row in merging_rows(merging, repeats=repeats):
            bench.add(row)
    return bench
