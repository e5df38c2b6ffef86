"""The published loop written down plainly, for measuring against: batch by batch, graphs kept, pairs in full.

It does what the paper's released implementation does in one I-FGSM step, in the same order and with the same
number of calls: a forward per surrogate; a gradient per surrogate; a forward with a graph for every pair of
surrogate and candidate; the cosine maps of all pairs; one backward through the weighted logits. Nothing but
benchmarks uses it. Written from the equations; no line is taken from another implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def plain_attack(
    surrogates: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    beta: float = 10.0,
    eta: float = -0.3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """AdaEA-I-FGSM with the official filter.

    Args:
        surrogates: at least two, in evaluation mode.
        images: ``(batch, channels, height, width)`` in [0, 1].
        labels: ``(batch,)``.
        eps: budget of linf.
        alpha: step size.
        steps: how many.
        beta: sharpness of the weights.
        eta: threshold of the filter.
        generator: of the start noise.

    Returns:
        Adversarial images.
    """
    count = len(surrogates)

    def clip(moved: Tensor) -> Tensor:
        return (images + (moved - images).clamp(-eps, eps)).clamp(0, 1).detach()

    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    adversarial = images + 0.001 * noise
    for _ in range(steps):
        adversarial.requires_grad_(True)
        outputs = [model(adversarial) for model in surrogates]
        losses = [F.cross_entropy(output, labels) for output in outputs]
        gradients = [torch.autograd.grad(loss, adversarial, retain_graph=True)[0] for loss in losses]

        harms: list[Tensor] = []
        candidates = [clip(adversarial + alpha * gradient.sign()) for gradient in gradients]
        own = [F.cross_entropy(surrogates[i](candidates[i]), labels) for i in range(count)]
        for j in range(count):
            others = [i for i in range(count) if i != j]
            crossed = [F.cross_entropy(surrogates[i](candidates[j]), labels) / own[i] for i in others]
            harms.append(torch.stack(crossed).sum())
        weights = torch.softmax(beta * torch.stack(harms), dim=0)

        cosines = torch.zeros(count, count, images.shape[0], *images.shape[2:], device=images.device)
        for i in range(count):
            for j in range(count):
                if i != j:
                    cosines[i, j] = F.cosine_similarity(gradients[i], gradients[j], dim=1)
        rows = cosines.sum(1) / (count - 1)
        score = rows[:-1].sum(0) / count
        keep = (score >= eta).to(images.dtype).unsqueeze(1)

        fused = torch.stack([weights[k] * outputs[k] for k in range(count)]).sum(0)
        (gradient,) = torch.autograd.grad(F.cross_entropy(fused, labels), adversarial)
        adversarial = clip(adversarial + alpha * (gradient * keep).sign())
    return adversarial
