"""The published procedures written down plainly: what the benchmarks compare with."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def plain_grid(
    large: Float[Tensor, "rows vocab"],
    base: Float[Tensor, "rows vocab"],
    expert: Float[Tensor, "rows vocab"],
    step: float = 0.1,
    high: float = 2.0,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows vocab"]]:
    """The paper's search as its pseudo-code has it: one softmax and two divergences per node.

    Args:
        large: logits.
        base: of the small base.
        expert: of its fine-tune.
        step: spacing of the grid.
        high: its end.

    Returns:
        alpha and the fused log-probabilities.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> alpha, _ = plain_grid(logits, logits, -logits)
        >>> round(float(alpha), 6)
        1.0
    """
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)
    log_p, log_q, log_e = large.log_softmax(-1), base.log_softmax(-1), expert.log_softmax(-1)
    f, r = kl(log_e, log_q), kl(log_q, log_e)
    best = torch.full_like(f, torch.inf)
    alpha = torch.zeros_like(f)
    for j in range(round(high / step) + 1):
        fused = (large + j * step * (expert - base)).log_softmax(-1)
        loss = (kl(fused, log_p) - f) ** 2 + (kl(log_p, fused) - r) ** 2
        alpha = torch.where(loss < best, j * step, alpha)
        best = torch.minimum(loss, best)
    return alpha, (large + alpha.unsqueeze(-1) * (expert - base)).log_softmax(-1)


@torch.no_grad()
def plain_generate(
    large: Any, base: Any, expert: Any, input_ids: Int64[Tensor, "rows tokens"], max_new_tokens: int
) -> Int64[Tensor, "rows length"]:
    """Greedy proxy-tuning loop: three passes one after the other, the literal search, argmax.

    Args:
        large: a causal model of transformers.
        base: the small one.
        expert: its fine-tune.
        input_ids: without padding.
        max_new_tokens: tokens to add.
    """
    ids, caches, new = input_ids, [None] * 3, input_ids
    for _ in range(max_new_tokens):
        outputs = [
            model(input_ids=new, past_key_values=cache, use_cache=True)
            for model, cache in zip((large, base, expert), caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        _, log_probs = plain_grid(*(output.logits[:, -1] for output in outputs))
        new = log_probs.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], -1)
    return ids


@torch.no_grad()
def members_alone(models: tuple[Any, ...], input_ids: Int64[Tensor, "rows tokens"], steps: int) -> None:
    """The members' passes of a generation and nothing else: the floor that fusion is measured against.

    Args:
        models: causal models of transformers.
        input_ids: the prompt, without padding.
        steps: passes of each model; the first reads the prompt, the others one token.
    """
    for model in models:
        cache, new = None, input_ids
        for _ in range(steps):
            output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, new = output.past_key_values, input_ids[:, -1:]
