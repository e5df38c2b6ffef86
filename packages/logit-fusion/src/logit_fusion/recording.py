"""Taking down what a fusion does at every step, on its device; nothing is read before the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from logit_fusion.engine import Passed
from logit_fusion.errors import EmptySupportError, NonFiniteLogitsError
from logit_fusion.fuse import FusionStep
from logit_fusion.trace import FusionTrace

__all__ = ["Chosen", "Guard", "Recorder"]

_PER_TOKEN = ("alpha", "f", "r", "kl_forward", "kl_reverse", "loss", "expert", "certified")


class Guard:
    """Unusable rows: looked for at the first step, remembered on the device after it, told at the end.

    Args:
        names: of the members.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._bad: Tensor | None = None
        self._empty: Tensor | None = None

    def add(self, step: FusionStep) -> None:
        """Take a step's flags; the first one's are read at once.

        Raises:
            NonFiniteLogitsError, EmptySupportError: at the first step.
        """
        if self._bad is None or self._empty is None or self._bad.shape[0] != step.non_finite.shape[0]:
            step.check(self.names)
            self._bad, self._empty = step.non_finite.any(1), step.empty.any(1)
        else:
            self._bad = self._bad | step.non_finite.any(1)
            self._empty = self._empty | step.empty.any(1)

    def check(self) -> None:
        """Read the flags.

        Raises:
            NonFiniteLogitsError: names member and row.
            EmptySupportError: names the row.
        """
        if self._bad is None or self._empty is None:
            return
        if bool(self._bad.any()):
            row, member = (int(x) for x in self._bad.nonzero()[0])
            raise NonFiniteLogitsError(
                f"the logits of member {self.names[member]!r} hold NaN or +inf in row {row}; they take "
                "finite "
                "numbers or -inf (Llama's eager attention in float64 gives NaN for padded rows: take sdpa)"
            )
        if bool(self._empty.any()):
            raise EmptySupportError(
                f"row {int(self._empty.nonzero()[0])} has no token that every member allows"
            )


class Recorder:
    """Keeps the tensors of every step.

    Args:
        names: of the members.
        guard: gets every step.
        full: also what a trace needs.
    """

    def __init__(self, names: Sequence[str], guard: Guard, *, full: bool) -> None:
        self.names, self.guard, self.full = list(names), guard, full
        self.steps: list[dict[str, Tensor]] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, passed: Passed) -> None:
        """Take down the last position of a pass."""
        self.guard.add(passed.step)
        if not self.full:
            return
        found = {name: getattr(passed.step, name)[:, -1] for name in _PER_TOKEN}
        fused = passed.step.log_probs[:, -1].float()
        large, base = (x[:, -1].float().log_softmax(-1) for x in (passed.large, passed.base))
        found |= {
            "entropy_large": _entropy(large),
            "entropy_base": _entropy(base),
            "entropy": _entropy(fused),
        }
        found |= {"top_large": large.argmax(-1), "top": fused.argmax(-1)}
        self.steps.append(found)
        self._last = fused, large

    def chosen(self, tokens: Tensor) -> None:
        """Take down the log-probabilities of the tokens that were chosen, (rows)."""
        if self._last is not None and len(tokens) == len(self._last[0]):
            fused, large = self._last
            tokens = tokens.to(fused.device)[:, None]
            self.steps[-1] |= {
                "log_prob": fused.gather(-1, tokens)[:, 0],
                "log_prob_large": large.gather(-1, tokens.clamp(max=large.shape[-1] - 1))[:, 0],
            }

    def trace(
        self,
        model: Any,
        sequences: Tensor,
        prompt: int,
        scores: Any,
        beam_indices: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> FusionTrace:
        """The trace of finished sequences.

        Args:
            model: the fused model.
            sequences: (rows, prompt + output).
            prompt: tokens of the prompt.
            scores: of beam search.
            beam_indices: of beam search, (rows, output).
            kwargs: that ``generate`` was called with.
        """
        output = sequences[:, prompt:]
        config = kwargs.get("generation_config") or model.generation_config
        ends = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
        pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
        lengths = _lengths(output.cpu().numpy(), ends, pad)
        rows = torch.arange(len(output), device=output.device)
        columns: dict[str, list[Any]] = {}
        # Parts of one step have one shape whatever the step, so one copy to the host takes them all.
        kept = [name for name in self.steps[0] if all(name in step for step in self.steps)]
        whole = {name: torch.stack([step[name] for step in self.steps], 1).cpu() for name in kept}
        if beam_indices is not None:
            moved = model.compute_transition_scores(sequences, scores, beam_indices, normalize_logits=False)
            whole["log_prob"] = moved.cpu()
        for row, length in zip(rows.tolist(), lengths, strict=True):
            length = min(length, len(self.steps))
            for name, values in whole.items():
                if beam_indices is None or name == "log_prob":
                    part = values[row, :length]
                else:
                    source = beam_indices[row, :length].clamp(min=0).cpu()
                    part = values[source, torch.arange(length)]
                columns.setdefault(name, []).append(
                    part.float().numpy() if part.is_floating_point() else part.numpy()
                )
            columns.setdefault("sequence", []).append(np.full(length, row))
            columns.setdefault("position", []).append(np.arange(length))
            columns.setdefault("token", []).append(output[row, :length].cpu().numpy())
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        return FusionTrace.of(arrays, self.names[2:], model.tokenizer)


class Chosen(StoppingCriteria):
    """Never stops; hands the recorder the tokens that were just chosen."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002
        """False for every row."""
        self.recorder.chosen(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1)


def _lengths(output: Any, ends: Any, pad: Any) -> list[int]:
    """Tokens of each row up to and with its first end, padding behind it left out."""
    listed = [] if ends is None else ends if isinstance(ends, list | tuple) else [ends]
    found: list[int] = []
    for row in output.tolist():
        stop = next((place + 1 for place, token in enumerate(row) if token in listed), len(row))
        while stop == len(row) and row and pad is not None and row[-1] == pad and pad not in listed:
            row.pop()
            stop = len(row)
        found.append(stop)
    return found
