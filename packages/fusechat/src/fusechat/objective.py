"""The training objective: supervised fine-tuning and fusion, weighed by lambda (section 2.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fusechat.losses import (
    Divergence,
    check_divergence,
    dense_divergence,
    log_probs_at,
    sparse_divergence,
    uld,
)
from fusechat.selecting import UNKNOWN, Rewards, avg_ce_weights, min_ce, rewards, stack_ce
from fusechat.targets import FusionBatch, Tail, Targets, coalesce, padded
from fusion_core.errors import ConfigError, InputError, check_range, check_shape

Select = Literal["min_ce", "avg_ce", "source"]
Schedule = Literal["hard", "decay", "soft"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "select": ("min_ce", "avg_ce", "source"),
    "mince": ("sequence", "token"),
    "mask": ("assistant", "attention"),
    "schedule": ("hard", "decay", "soft"),
    "tail": ("none", "uniform"),
    "rewards": ("exact", "bf16"),
    "sft_dtype": ("auto", "float32"),
}


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """The loss and its parts.

    Attributes:
        total: lambda * sft + (1 - lambda) * fusion.
        sft: mean cross-entropy of the assistant's tokens.
        fusion: mean divergence from the chosen distributions.
        lam: lambda of this step.
        choice: (batch,) or (batch, tokens) index of the followed model, the pivot first where it is there;
            None for ``select="avg_ce"``.
    """

    total: Float[Tensor, ""]
    sft: Float[Tensor, ""]
    fusion: Float[Tensor, ""]
    lam: Float[Tensor, ""]
    choice: Int64[Tensor, "..."] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """Entries to follow, where, and who was chosen."""

    ids: Tensor
    probs: Tensor
    rest: Tensor
    mask: Tensor
    choice: Tensor | None


class FusionLoss(nn.Module):
    """Supervised fine-tuning together with fusion of other models' distributions.

    Args:
        weight: share of the fusion term in [0, 1]; the papers' lambda is 1 - weight.
        divergence: ``"ce"``, ``"kl"`` (target to student), ``"rkl"`` (needs ``tail="uniform"``), ``"jsd"`` or
            ``"uld"`` (sorted probabilities; needs a collator with ``vocab="none"``).
        select: ``"min_ce"`` follows the model of least cross-entropy, ``"avg_ce"`` FuseLLM's average,
            ``"source"`` the first source always.
        mince: choose per ``"sequence"`` or per ``"token"``.
        beta: share of the target in the middle of ``"jsd"``, in (0, 1).
        temperature: of the targets, > 0.
        tail: ``"uniform"`` keeps the mass outside the top k instead of renormalizing it away.
        rewards: ``"bf16"`` compares cross-entropies with the published rounding.
        mask: ``"assistant"`` learns where the next token is the assistant's; ``"attention"`` is FuseLLM's.
        schedule: ``"hard"`` keeps lambda; ``"decay"`` (the publication's name) moves it to 1 over the steps;
            ``"soft"`` takes it from the rewards, for batches of one.
        sft_dtype: ``"float32"`` rounds the logits of the supervised part first, as transformers' own loss
            does; ``"auto"`` keeps their dtype, at least float32.

    Raises:
        ConfigError: a value outside of these.

    Example:
        >>> probs = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]])
        >>> batch = FusionBatch({}, torch.tensor([[-100, 2]]), (Targets.from_dense(probs, torch.zeros(1)),))
        >>> out = FusionLoss(weight=0.1)(torch.zeros(1, 2, 3), batch)
        >>> round(out.total.item(), 4)
        1.0986
    """

    def __init__(
        self,
        weight: float = 0.1,
        divergence: Divergence = "ce",
        select: Select = "min_ce",
        *,
        mince: Literal["sequence", "token"] = "sequence",
        beta: float = 0.5,
        temperature: float = 1.0,
        tail: Tail = "none",
        rewards: Rewards = "exact",
        mask: Literal["assistant", "attention"] = "assistant",
        schedule: Schedule = "hard",
        sft_dtype: Literal["auto", "float32"] = "auto",
    ) -> None:
        super().__init__()
        self.weight = check_range("weight", weight, 0.0, 1.0)
        check_divergence(divergence, beta)
        self.temperature = check_range("temperature", temperature, 0.0, float("inf"), open=True)
        given = {
            "select": select,
            "mince": mince,
            "mask": mask,
            "schedule": schedule,
            "tail": tail,
            "rewards": rewards,
            "sft_dtype": sft_dtype,
        }
        for name, value in given.items():
            if value not in _CHOICES[name]:
                raise ConfigError(f"{name} is {value!r}, wanted one of {list(_CHOICES[name])}")
        if tail == "uniform" and temperature != 1.0:
            raise ConfigError(f'temperature is {temperature}, but tail="uniform" knows the mass at 1 only')
        self.divergence: Divergence = divergence
        self.beta = beta
        self.tail: Tail = tail
        self.rewards: Rewards = rewards
        self.select, self.mince = select, mince
        self.mask, self.schedule, self.sft_dtype = mask, schedule, sft_dtype

    def extra_repr(self) -> str:
        """The settings that matter most."""
        return f"weight={self.weight}, divergence={self.divergence!r}, select={self.select!r}"

    def forward(
        self,
        logits: Float[Tensor, "batch tokens classes"],
        batch: FusionBatch,
        *,
        step: int = 0,
        max_steps: int | None = None,
        items: tuple[Any, Any] | None = None,
    ) -> LossOutput:
        """Compare logits with a batch.

        Args:
            logits: of the student for ``batch.inputs``; position t predicts token t + 1.
            batch: labels and targets.
            step: done so far, for ``schedule="decay"``.
            max_steps: of the training, for ``schedule="decay"``.
            items: numbers of supervised and of fused positions to divide by (:meth:`counts`), summed over
                ranks and accumulated batches; None takes this batch's own.

        Raises:
            ShapeError: logits that do not fit the labels.
            InputError: no target, or targets for a wider vocabulary than the logits'.
            ConfigError: a schedule without what it needs.
        """
        rows, length = batch.labels.shape
        size = check_shape("logits", logits, "batch tokens classes", batch=rows, tokens=length)["classes"]
        chosen = self._choose(batch)
        following = torch.cat([batch.labels[:, 1:], batch.labels.new_full((rows, 1), -100)], 1)
        supervised = following >= 0
        own = following.clamp(min=0)[..., None]
        extra = own if self.sft_dtype == "auto" else own[..., :0]
        fused, picked = self._fusion(logits, chosen, extra, size)
        if self.sft_dtype == "float32":
            picked = log_probs_at(logits.float(), own)[0].to(logits.dtype)
        mask = chosen.mask & self._learned(batch)
        n_sft, n_fused = items if items is not None else (supervised.sum(), mask.sum())
        sft = _mean(-picked[..., 0], supervised, n_sft)
        fusion = _mean(fused, mask, n_fused)
        lam = self._lam(batch, step, max_steps).to(sft)
        return LossOutput(lam * sft + (1 - lam) * fusion, sft, fusion, lam, chosen.choice)

    @torch.no_grad()
    def counts(self, batch: FusionBatch) -> tuple[Tensor, Tensor]:
        """How many positions the supervised and the fusion part average over."""
        mask = self._choose(batch).mask & self._learned(batch)
        return (batch.labels[:, 1:] >= 0).sum(), mask.sum()

    def _learned(self, batch: FusionBatch) -> Tensor:
        if self.mask == "attention":
            return batch.inputs["attention_mask"].bool()
        return torch.cat(
            [batch.labels[:, 1:] >= 0, torch.zeros_like(batch.labels[:, :1], dtype=torch.bool)], 1
        )

    def _candidates(self, batch: FusionBatch) -> tuple[Targets, ...]:
        sources = tuple(source.filled(batch.pivot) for source in batch.sources)
        if self.select == "source":
            found = sources[:1]
        else:
            found = (*(() if batch.pivot is None else (batch.pivot,)), *sources)
        if not found:
            raise InputError("batch holds no targets, wanted at least one source")
        return padded(found)

    def _choose(self, batch: FusionBatch) -> _Chosen:
        found = self._candidates(batch)
        made = [t.probabilities(self.temperature, self.tail) for t in found]
        masks = torch.stack([t.mask for t in found])
        ids, probs = torch.stack([t.ids for t in found]), torch.stack([p for p, _ in made])
        rest = torch.stack([r for _, r in made])
        if self.select == "avg_ce":
            return self._average(found, ids, probs, rest, masks)
        if self.mince == "token" and len(found) > 1:
            if any(t.token_ce is None for t in found):
                raise InputError('mince="token" needs token_ce in every target, which stores have')
            scores = torch.stack([t.token_ce for t in found]).float()  # type: ignore[misc]
            scores = torch.nan_to_num(scores, nan=UNKNOWN, posinf=UNKNOWN)
            choice = min_ce(scores.masked_fill(~masks, 2 * UNKNOWN))
        else:
            choice = min_ce(stack_ce([t.ce for t in found]), self.rewards)
        place = choice if choice.ndim == 2 else choice[:, None].expand(masks.shape[1:])
        wide = place[None, ..., None].expand(1, *ids.shape[1:])
        return _Chosen(
            ids.gather(0, wide)[0],
            probs.gather(0, wide)[0],
            rest.gather(0, place[None])[0],
            masks.gather(0, place[None])[0],
            choice,
        )

    def _average(
        self, found: tuple[Targets, ...], ids: Tensor, probs: Tensor, rest: Tensor, masks: Tensor
    ) -> _Chosen:
        if self.tail == "uniform" and len(found) > 1:
            raise ConfigError(
                'select="avg_ce" of several models with tail="uniform" is not defined; use "none"'
            )
        weights = avg_ce_weights(stack_ce([t.ce for t in found]), self.rewards).to(probs.dtype)
        share = torch.where(
            masks, weights[..., None], torch.zeros((), dtype=probs.dtype, device=probs.device)
        )
        # Models that have nothing to say at a position leave their weight to the others.
        share = torch.where(
            masks.all(0), share, share / share.sum(0).clamp(min=torch.finfo(probs.dtype).tiny)
        )
        mixed = (probs * share[..., None]).movedim(0, -2).flatten(-2)
        joined = ids.movedim(0, -2).flatten(-2)
        return _Chosen(joined, mixed, (rest * share).sum(0), masks.any(0), None)

    def _fusion(self, logits: Tensor, chosen: _Chosen, extra: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Divergence per position, and the log-probabilities of the extra ids."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.divergence == "uld":
            k = min(chosen.probs.shape[-1], size)
            top = logits.detach().topk(k, -1).indices
            log_q, _ = log_probs_at(logits, torch.cat([top, extra], -1))
            p = chosen.probs.to(wide).sort(-1, descending=True).values
            beyond = p[..., k:].sum(-1)
            return uld(log_q[..., :k], p[..., :k]) + beyond, log_q[..., k:]
        ids, probs = coalesce(chosen.ids, chosen.probs.to(wide))
        if ids.numel() and int(ids.max()) >= size:
            raise InputError(
                f"targets hold id {int(ids.max())}, but the logits have {size} classes; "
                "make them for this pivot"
            )
        rest = chosen.rest.to(wide)
        if self.divergence == "rkl" or (self.divergence == "jsd" and self.tail == "uniform"):
            if self.tail == "none" and chosen.ids.shape[-1] < size:
                raise ConfigError('divergence "rkl" is infinite where the target is 0; use tail="uniform"')
            picked, _ = log_probs_at(logits, extra)
            return self._dense(logits.to(wide), ids, probs, rest, size), picked
        log_q, total = log_probs_at(logits, torch.cat([ids.clamp(min=0), extra], -1))
        k = ids.shape[-1]
        kind: Any = self.divergence
        return sparse_divergence(log_q[..., :k], total, ids, probs, rest, size, kind, self.beta), log_q[
            ..., k:
        ]

    def _dense(self, logits: Tensor, ids: Tensor, probs: Tensor, rest: Tensor, size: int) -> Tensor:
        kept = ids >= 0
        spread = rest / (size - kept.sum(-1)).clamp(min=1)
        full = spread[..., None].expand(*spread.shape, size).clone()
        place = ids.clamp(min=0)
        # Entries that are none add nothing to class 0.
        gain = torch.where(kept, probs - spread[..., None], torch.zeros_like(probs))
        return dense_divergence(
            logits.log_softmax(-1), full.scatter_add(-1, place, gain), self.divergence, self.beta
        )

    def _lam(self, batch: FusionBatch, step: int, max_steps: int | None) -> Tensor:
        lam = 1.0 - self.weight
        if self.schedule == "hard":
            return torch.tensor(lam, dtype=torch.float64)
        if self.schedule == "decay":
            if not max_steps or not 0 <= step <= max_steps:
                raise ConfigError(
                    f'schedule "decay" got step {step} of max_steps {max_steps}, '
                    "wanted 0 <= step <= max_steps"
                )
            return torch.tensor(lam + (1.0 - lam) * step / max_steps, dtype=torch.float64)
        if len(batch) != 1:
            raise ConfigError(f'schedule "soft" got a batch of {len(batch)}, wanted batches of one dialogue')
        reward = rewards(stack_ce([t.ce for t in self._candidates(batch)]), self.rewards).double()
        return 1.0 - (reward.mean() if self.select == "avg_ce" else reward.max())


def _mean(values: Tensor, mask: Tensor, count: Any) -> Tensor:
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() / torch.as_tensor(count, device=values.device).clamp(min=1).to(values.dtype)
