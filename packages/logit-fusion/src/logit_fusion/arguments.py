"""What ``fuse_logits`` takes, checked once at the border: shapes, ranges, weights, strengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_core.errors import InputError, ShapeError, check_range
from logit_fusion.config import FusionConfig, WeightRule, check_alpha_range, check_step
from logit_fusion.errors import VocabularyMismatchError

Weights = WeightRule | Sequence[float] | Float[Tensor, "*batch experts"] | Callable[[Tensor, Tensor], Tensor]
Strengths = float | Sequence[float] | Float[Tensor, "*batch experts"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices.

    Raises:
        InputError: names the argument, the value and the choices.
    """
    if value not in choices:
        raise InputError(f"{name} is {value!r}, wanted one of {list(choices)}")


def member_rows(
    large: Tensor, base: Tensor, experts: Sequence[Tensor] | Tensor
) -> list[Float[Tensor, "rows vocab"]]:
    """The members' logits as (N, vocab), of one shape: large, base, experts.

    Raises:
        InputError: no expert, or something that is no floating tensor.
        VocabularyMismatchError: vocabularies of different sizes.
        ShapeError: no vocabulary, or other leading dimensions.
    """
    members = [large, base, *experts]
    names = ["large", "base", *(f"experts[{t}]" for t in range(len(members) - 2))]
    if len(members) < 3:
        raise InputError("experts is empty, wanted at least one expert's logits")
    for name, member in zip(names, members, strict=True):
        if not isinstance(member, Tensor) or not member.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
            got = member.dtype if isinstance(member, Tensor) else type(member).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{name} is {got}, wanted a floating tensor of logits (..., vocab)")
        if member.ndim == 0 or member.shape[-1] == 0:
            raise ShapeError(f"{name} has shape {tuple(member.shape)}, wanted (..., vocab)")
        if member.shape[-1] != large.shape[-1]:
            raise VocabularyMismatchError(
                f"{name} has {member.shape[-1]} logits a row and large has {large.shape[-1]}; wanted one "
                "vocabulary (check_vocabulary says how to align them)"
            )
        if member.shape != large.shape:
            raise ShapeError(
                f"{name} has shape {tuple(member.shape)}, wanted that of large, {tuple(large.shape)}"
            )
    return [member.reshape(-1, member.shape[-1]) for member in members]


def check_search(
    alpha_range: tuple[float, float],
    step: float,
    per_expert_range: Sequence[tuple[float, float]] | None,
    experts: int,
    strategy: str,
) -> list[tuple[float, float]] | None:
    """The experts' own ranges, all settings of the search checked.

    Raises:
        InputError: a range or a step that makes no sense, or ranges with another strategy than ``"single"``.
    """
    check_alpha_range("alpha_range", alpha_range)
    check_step(step, alpha_range)
    if per_expert_range is None:
        return None
    if strategy != "single":
        raise InputError(f"per_expert_range needs strategy='single', got strategy={strategy!r}")
    if len(per_expert_range) != experts:
        raise InputError(
            f"per_expert_range has {len(per_expert_range)} pairs, wanted one for each of {experts} experts"
        )
    ranges = [check_alpha_range(f"per_expert_range[{t}]", pair) for t, pair in enumerate(per_expert_range)]
    for pair in ranges:
        check_step(step, pair)
    return ranges


def check_experts(settings: FusionConfig, experts: int) -> None:
    """Raise unless the settings have what they say of each expert as often as there are experts.

    Raises:
        InputError: weights, strengths or ranges of another number, or ranges that the strategy does not take.
    """
    check_search(settings.alpha_range, settings.step, settings.per_expert_range, experts, settings.strategy)
    if isinstance(settings.weights, tuple):
        _shares(settings.weights, experts)
    if isinstance(settings.alpha, tuple):
        _strengths(settings.alpha, experts)


def check_scales(kl_temperature: float, max_kl: float | None) -> None:
    """Raise unless the temperature is > 0 and the bound is >= 0.

    Raises:
        ConfigError: names the value.
    """
    check_range("kl_temperature", kl_temperature, 0.0, math.inf, open=True)
    if max_kl is not None:
        check_range("max_kl", max_kl, 0.0, math.inf)


def row_mask(
    name: str, mask: Tensor | None, shape: Sequence[int], device: torch.device
) -> Bool[Tensor, "..."] | None:
    """A bool mask broadcast to a shape.

    Raises:
        InputError: another dtype.
        ShapeError: it does not broadcast.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise InputError(f"{name} is {mask.dtype}, wanted torch.bool (True = takes part)")
    try:
        return mask.to(device).expand(*shape)
    except RuntimeError as error:
        raise ShapeError(
            f"{name} has shape {tuple(mask.shape)}, wanted one that broadcasts to {tuple(shape)}"
        ) from error


def _shares(weights: Sequence[float], experts: int) -> list[float]:
    numbers = [float(value) for value in weights]
    if len(numbers) != experts:
        raise InputError(f"weights has {len(numbers)} numbers, wanted one for each of the {experts} experts")
    total = sum(numbers)
    if not all(0.0 <= number < math.inf for number in numbers) or not total > 0.0:
        raise InputError(f"weights is {weights!r}, wanted numbers >= 0 with a positive sum")
    return [number / total for number in numbers]


def _strengths(alpha: Sequence[float], experts: int) -> list[float]:
    numbers = [float(value) for value in alpha]
    if len(numbers) not in (1, experts):
        raise InputError(
            f"alpha has {len(numbers)} numbers, wanted 1 or one for each of the {experts} experts"
        )
    return numbers * experts if len(numbers) == 1 else numbers


def strengths(alpha: Strengths, like: Float[Tensor, "rows experts"], batch: torch.Size) -> Tensor:
    """A static alpha as (N, T).

    Args:
        alpha: one number, T numbers, or a (T) or (..., T) tensor.
        like: (N, T), for dtype and device.
        batch: the leading shape of the logits.

    Raises:
        InputError: not finite, or not 1 or T numbers.
    """
    rows, experts = like.shape
    if isinstance(alpha, Tensor):
        return _rows("alpha", alpha, like, batch)
    if isinstance(alpha, int | float):
        numbers = [float(alpha)] * experts
    else:
        numbers = _strengths(alpha, experts)
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(f"alpha is {alpha!r}, wanted finite numbers")
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).expand(rows, -1)


def _rows(name: str, values: Tensor, like: Tensor, batch: torch.Size) -> Tensor:
    rows, experts = like.shape
    if values.ndim == 0 or values.shape[-1] != experts or values.shape[:-1] not in (batch, torch.Size([])):
        raise ShapeError(
            f"{name} has shape {tuple(values.shape)}, wanted ({experts},) or {(*batch, experts)}"
        )
    return values.to(like.device, like.dtype).expand(*batch, experts).reshape(rows, experts)


def expert_weights(
    weights: Weights,
    f: Float[Tensor, "rows experts"],
    r: Float[Tensor, "rows experts"],
    batch: torch.Size,
) -> Float[Tensor, "rows experts"]:
    """How much each expert counts, row by row.

    Args:
        weights: a rule, T numbers, a tensor, or a function of f and r.
        f: (N, T) KL(expert, base).
        r: (N, T) KL(base, expert).
        batch: the leading shape of the logits.

    Raises:
        InputError: an unknown rule, ``"evidence"``, or weights that are negative, NaN or too few.
    """
    experts = f.shape[-1]
    if isinstance(weights, str):
        if weights == "uniform":
            return torch.full_like(f, 1.0 / experts)
        if weights == "jeffreys":
            total = (f + r).sum(-1, keepdim=True)
            share = (f + r) / torch.where(total > 0.0, total, 1.0)
            return torch.where(total > 0.0, share, 1.0 / experts)
        if weights == "evidence":
            raise InputError(
                "weights='evidence' needs the tokens seen so far, which fuse_logits has not; wanted the "
                "(..., T) tensor of logit_fusion.evidence.evidence_weights, or FusedModel, which keeps it"
            )
        raise InputError(f"weights is {weights!r}, wanted 'uniform', 'jeffreys', T numbers or a tensor")
    if isinstance(weights, Tensor):
        found = _rows("weights", weights, f, batch)
    elif callable(weights):
        found = _rows("weights", weights(f.view(*batch, experts), r.view(*batch, experts)), f, batch)
    else:
        return torch.tensor(_shares(weights, experts), dtype=f.dtype, device=f.device).expand_as(f)
    # Elsewhere the look would cost a synchronisation.
    if found.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((found >= 0.0).all()):
        raise InputError(f"weights holds {float(found.min())}, wanted numbers >= 0")
    return found
