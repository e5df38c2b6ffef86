"""What a fusion did at every token: terminal colors, one HTML file, JSON Lines, arrays, a data frame."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from fusion_core.atomic import atomic_write
from fusion_core.errors import DataError, InputError, reading
from fusion_core.plotting import axes_or_new
from fusion_core.report import Page, dataframe
from fusion_core.results import Result, plain

__all__ = ["FusionTrace"]

Array = NDArray[Any]
# Colors told apart with every common color vision (Okabe and Ito, 2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_VECTORS = ("alpha", "f", "r")
_WHOLE = ("sequence", "position", "token", "expert", "top", "top_large", "certified")
_SCHEMA = "logit-fusion.trace/1"
_MOST_SEQUENCES = 1_000_000  # some may have no token


@dataclass(frozen=True, slots=True, repr=False)
class FusionTrace(Result):
    """One entry per generated token, all sequences end to end.

    Attributes:
        experts: their names, T of them.
        text: each token's text (its id as text without a tokenizer).
        sequence: (N) which sequence the token belongs to.
        position: (N) its place in the output.
        token: (N) its id.
        alpha: (N, T) strength of each expert's shift.
        f: (N, T) KL(expert, base) in nats.
        r: (N, T) KL(base, expert) in nats.
        kl_forward: (N) KL(fused, large) in nats.
        kl_reverse: (N) KL(large, fused) in nats.
        loss: (N) objective at alpha.
        expert: (N) index of the greatest alpha, -1 for none.
        certified: (N) whether the minimum is proven.
        entropy_large: (N) of the large model, in nats.
        entropy_base: (N) of the small base.
        entropy: (N) of the fused distribution.
        top_large: (N) the large model's likeliest token.
        top: (N) the fused distribution's.
        log_prob: (N) fused log-probability of the token (with beams: its processed score).
        log_prob_large: (N) the large model's, NaN where it was not recorded (beams).
    """

    experts: tuple[str, ...]
    text: tuple[str, ...]
    sequence: Array
    position: Array
    token: Array
    alpha: Array
    f: Array
    r: Array
    kl_forward: Array
    kl_reverse: Array
    loss: Array
    expert: Array
    certified: Array
    entropy_large: Array
    entropy_base: Array
    entropy: Array
    top_large: Array
    top: Array
    log_prob: Array
    log_prob_large: Array

    @classmethod
    def of(cls, arrays: Mapping[str, Array], experts: Sequence[str], tokenizer: Any = None) -> FusionTrace:
        """A trace of recorded arrays.

        Args:
            arrays: by field name; those of the log-probabilities may be missing.
            experts: their names.
            tokenizer: tells the tokens' texts.
        """
        count = len(arrays["token"])
        unknown = np.full(count, np.nan, np.float32)
        return cls(
            tuple(experts),
            tuple(_words(arrays["token"].tolist(), tokenizer)),
            **{name: np.asarray(arrays.get(name, unknown)) for name in _names()},
        )

    def __len__(self) -> int:
        return len(self.token)

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return int(self.sequence.max()) + 1 if len(self) else 0

    def of_sequence(self, number: int) -> FusionTrace:
        """The part of one sequence."""
        chosen = np.flatnonzero(self.sequence == number)
        return FusionTrace(
            self.experts,
            tuple(self.text[i] for i in chosen),
            **{name: getattr(self, name)[chosen] for name in _names()},
        )

    @property
    def strength(self) -> Array:
        """(N) sum of the alphas: how far the token was steered."""
        return self.alpha.sum(-1)

    def show(self, console: Console | None = None) -> None:
        """Print the texts; the background is the strength of the shift, its hue the expert that spoke."""
        console = console or Console(highlight=False)
        for number in range(self.sequences):
            part = self.of_sequence(number)
            text = Text()
            for word, amount, who in zip(part.text, part.strength, part.expert, strict=True):
                color = _mixed(int(who), float(amount), dark=True)
                text.append(word, style=f"on {color}" if color else "")
            console.print(text)
            mean = f"mean strength {part.strength.mean():.2f}" if len(part) else "empty"
            console.print(f"[dim]sequence {number}: {len(part)} tokens, {mean}[/]")
        legend = Text("experts: ")
        for number, name in enumerate(self.experts):
            legend.append(f" {name} ", style=f"on {_mixed(number, 1.0, dark=True)}")
            legend.append(" ")
        console.print(legend)

    def to_html(self, path: str | os.PathLike[str] | None = None, title: str = "Fusion trace") -> str:
        """One self-contained page: colored text with numbers on hover, and the strength as a line.

        Args:
            path: where to write it as well.
            title: of the page.

        Returns:
            The document. Every text is escaped.
        """
        page = Page(title).text(
            "Background: how strongly the token was steered (sum of alpha); hue: the expert with the "
            "greatest "
            "alpha. Hover or focus a token for its numbers."
        )
        spans = [
            Markup('<span style="background:{};padding:0 .4em">{}</span>').format(
                _COLORS[n % len(_COLORS)], name
            )
            for n, name in enumerate(self.experts)
        ]
        page.raw(Markup('<p class="legend">{}</p>').format(Markup(" ").join(spans)))
        for number in range(self.sequences):
            part = self.of_sequence(number)
            page.heading(f"Sequence {number}: {len(part)} tokens", level=3)
            page.raw(_paragraph(part))
            page.raw(_line(part))
        document = page.html()
        if path is not None:
            with atomic_write(path, "w") as file:
                file.write(document)
        return document

    def flat_rows(self) -> list[dict[str, Any]]:
        """One flat mapping per token; vectors as ``alpha[math]``."""
        rows: list[dict[str, Any]] = []
        for i in range(len(self)):
            row: dict[str, Any] = {"text": self.text[i]}
            for name in _names():
                value = getattr(self, name)[i]
                if name in _VECTORS:
                    row |= {f"{name}[{who}]": v.item() for who, v in zip(self.experts, value, strict=True)}
                else:
                    row[name] = value.item()
            rows.append(row)
        return rows

    def to_dataframe(self) -> Any:
        """One row per token as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return dataframe(self.flat_rows())

    def plot(self, ax: Any = None) -> Any:
        """Each expert's alpha over the tokens of all sequences; needs the extra ``plot``."""
        ax = axes_or_new(ax, "logit-fusion", 8.0, 3.0)
        for number, name in enumerate(self.experts):
            ax.plot(self.alpha[:, number], color=_COLORS[number % len(_COLORS)], label=name, lw=1)
        ax.set_xlabel("token")
        ax.set_ylabel("alpha")
        ax.legend()
        return ax

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.jsonl`` (one object per sequence), ``.npz`` (arrays) or ``.html``; whole or not at all.

        Raises:
            InputError: another suffix.
        """
        target = Path(path)
        if target.suffix == ".html":
            self.to_html(target)
        elif target.suffix == ".npz":
            arrays = {name: getattr(self, name) for name in _names()}
            with atomic_write(target) as file:
                np.savez(file, experts=np.array(self.experts), text=np.array(self.text), **arrays)
        elif target.suffix == ".jsonl":
            with atomic_write(target, "w") as file:
                for number in range(self.sequences):
                    part = self.of_sequence(number)
                    entry = {"schema": _SCHEMA, "sequence": number, **plain(_columns(part))}
                    file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            raise InputError(f"path is {path}, wanted .jsonl, .npz or .html")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionTrace:
        """Read what :meth:`save` wrote as ``.jsonl`` or ``.npz``.

        Raises:
            DataError: no trace, or it cannot be read.
        """
        source = Path(path)
        with reading(path, "cannot be read as a trace", DataError):
            if source.suffix == ".npz":
                with np.load(source, allow_pickle=False) as found:
                    arrays = {name: found[name] for name in _names()}
                    named = (
                        tuple(map(str, found["experts"].tolist())),
                        tuple(map(str, found["text"].tolist())),
                    )
                    return _checked(cls(*named, **arrays))
            lines = [json.loads(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
            if not lines or any(line.get("schema") != _SCHEMA for line in lines):
                raise DataError(
                    f"{path} is no trace of logit-fusion, wanted schema {_SCHEMA!r} in every line"
                )
            return _checked(_joined(lines))


def _names() -> list[str]:
    return [field.name for field in fields(FusionTrace) if field.name not in ("experts", "text")]


def _checked(trace: FusionTrace) -> FusionTrace:
    """A trace whose columns fit each other; lengths, kinds and indices of a file may be anything."""
    count, experts = len(trace.text), len(trace.experts)
    for name in _names():
        column: Array = getattr(trace, name)
        wanted = (count, experts) if name in _VECTORS else (count,)
        if column.shape != wanted:
            raise DataError(f"{name} has shape {column.shape}, wanted {wanted}: a row for each of the texts")
        if column.dtype.kind not in ("biu" if name in _WHOLE else "biuf"):
            raise DataError(f"{name} is of {column.dtype}, wanted numbers")
    for name, low, high in (("sequence", 0, _MOST_SEQUENCES), ("expert", -1, experts)):
        column = getattr(trace, name)
        if count and not low <= int(column.min()) <= int(column.max()) < high:
            raise DataError(f"{name} runs from {column.min()} to {column.max()}, wanted [{low}, {high})")
    return trace


def _columns(part: FusionTrace) -> dict[str, Any]:
    own = {name: getattr(part, name) for name in _names() if name not in ("sequence", "position")}
    return {"experts": part.experts, "text": part.text, **own}


def _joined(lines: list[dict[str, Any]]) -> FusionTrace:
    experts = tuple(lines[0]["experts"])
    columns: dict[str, list[Any]] = {name: [] for name in _names()}
    text: list[str] = []
    for line in lines:
        count = len(line["token"])
        text += line["text"]
        for name in columns:
            if name == "sequence":
                columns[name].append(np.full(count, line["sequence"]))
            elif name == "position":
                columns[name].append(np.arange(count))
            else:
                kind = bool if name == "certified" else np.int64 if name in _WHOLE else np.float32
                with np.errstate(over="raise"):  # beyond float32
                    values = np.array([np.nan if v is None else v for v in line[name]], kind)
                columns[name].append(values.reshape(count, len(experts)) if name in _VECTORS else values)
    return FusionTrace(
        experts, tuple(text), **{name: np.concatenate(parts) for name, parts in columns.items()}
    )


def _words(tokens: list[int], tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    return [tokenizer.decode([token]) for token in tokens]


def _mixed(expert: int, amount: float, *, dark: bool) -> str:
    """An expert's color, the stronger the further; empty where nothing was steered."""
    if expert < 0 or not amount > 0:
        return ""
    share = min(amount / 2, 1.0) * 0.8 + 0.1
    color = _COLORS[expert % len(_COLORS)]
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    ground = 20 if dark else 255
    return "#" + "".join(f"{round(ground + (part - ground) * share):02x}" for part in parts)


def _paragraph(part: FusionTrace) -> Markup:
    pieces: list[Markup] = []
    for i, word in enumerate(part.text):
        alphas = ", ".join(
            f"{name} {value:.3f}" for name, value in zip(part.experts, part.alpha[i], strict=True)
        )
        numbers = (
            f"alpha: {alphas}; KL(fused, large) {part.kl_forward[i]:.3f}, KL(large, fused) "
            f"{part.kl_reverse[i]:.3f}; "
            f"f {part.f[i].max():.3f}, r {part.r[i].max():.3f}; loss {part.loss[i]:.2e}; entropy large "
            f"{part.entropy_large[i]:.2f}, fused {part.entropy[i]:.2f}; log-probability "
            f"{part.log_prob[i]:.2f}, "
            f"large {part.log_prob_large[i]:.2f}"
        )
        color = _COLORS[max(int(part.expert[i]), 0) % len(_COLORS)]
        share = 0.0 if part.expert[i] < 0 else min(max(float(part.strength[i]), 0.0) / 2, 1.0) * 0.6
        red, green, blue = (int(color[j : j + 2], 16) for j in (1, 3, 5))
        shade = f"rgba({red},{green},{blue},{share:.2f})"
        style = "white-space:pre-wrap"
        pieces.append(
            Markup('<span tabindex="0" title="{}" style="background:{};{}">{}</span>').format(
                numbers, shade, style, word
            )
        )
    return Markup('<p style="line-height:1.9;font-family:monospace">{}</p>').format(Markup("").join(pieces))


def _line(part: FusionTrace) -> Markup:
    """The alphas over the tokens, as an inline picture."""
    if len(part) < 2:
        return Markup("")
    width, height = 720.0, 120.0
    top = max(float(part.alpha.max()), 1e-6)
    lines: list[Markup] = []
    for number, name in enumerate(part.experts):
        points = " ".join(
            f"{i / (len(part) - 1) * width:.1f},{height - 4 - value / top * (height - 12):.1f}"
            for i, value in enumerate(part.alpha[:, number].tolist())
        )
        lines.append(
            Markup(
                '<polyline points="{}" fill="none" stroke="{}" stroke-width="1.5"><title>{}</title>'
                "</polyline>"
            ).format(points, _COLORS[number % len(_COLORS)], name)
        )
    label = f"alpha over {len(part)} tokens, greatest {top:.3f}"
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" style="max-width:100%">{}</svg><p>{}</p>'
    ).format(int(width), int(height), label, Markup("").join(lines), escape(label))
