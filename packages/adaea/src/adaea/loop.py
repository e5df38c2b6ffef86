"""The loop of the attack: what happens in one step, in the order of the method.

Transform, forward, gradient per surrogate; AGM and DRF; fused gradient; variance; filter; smoothing;
momentum; step; projection. Source: AdaEA (ICCV 2023) and its official code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from adaea.agm import agm_weights, linear_losses
from adaea.budget import project, step
from adaea.candidates import candidate_losses
from adaea.draws import Draws, Resize
from adaea.drf import disparity_map
from adaea.fusion import fused_loss
from adaea.losses import LOSSES, cross_entropy, wide
from adaea.settings import AdaptiveSettings
from adaea.surrogates import Surrogate, check_classes, check_connected
from adaea.targets import target_labels
from adaea.trace import AttackState, StepRecord, Trace
from adaea.transforms import DI, SI, TI, Admix, mixed, scaled, smooth
from adaea.updates import Momentum, Nesterov, Variance, accumulate
from fusion_core.errors import FusionWarning

OnStep = Callable[[StepRecord], None]


class Loop:
    """One run of an attack on one batch.

    Args:
        settings: of the attack.
        surrogates: ready to be called, frozen.
        images: clean, checked.
        labels: true ones, or wanted ones where the settings say so.
        draws: random numbers.
        state: of an earlier run to go on from.
        traced: keep what a :class:`~adaea.trace.Trace` holds.
        on_step: called after every step.
    """

    def __init__(
        self,
        settings: AdaptiveSettings,
        surrogates: Sequence[Surrogate],
        images: Tensor,
        labels: Tensor,
        draws: Draws,
        *,
        state: AttackState | None = None,
        traced: bool = False,
        on_step: OnStep | None = None,
    ) -> None:
        self.s, self.surrogates, self.draws, self.on_step = settings, surrogates, draws, on_step
        self.count, self.traced = len(surrogates), traced
        self.sign = -1.0 if settings.targeted else 1.0
        self.clean = wide(images.detach())
        self.labels = labels.to(images.device).long()
        self.di: DI | None = settings.part(DI)
        si: SI | None = settings.part(SI)
        self.admix: Admix | None = settings.part(Admix)
        self.scales = self.admix.scales if self.admix else si.scales if si else 1
        self.variance_part: Variance | None = settings.part(Variance)
        nesterov: Nesterov | None = settings.part(Nesterov)
        momentum: Momentum | None = settings.part(Momentum)
        self.mu = nesterov.mu if nesterov else momentum.mu if momentum else None
        self.ahead = nesterov is not None
        ti: TI | None = settings.part(TI)
        self.kernel = None if ti is None else ti.kernel().to(self.clean)
        self.chunk = settings.agm_batch_size
        self.adaptive = settings.agm != "off" and self.count > 1
        self.filtered = settings.drf != "off" and self.count > 1
        self.records: list[tuple[Tensor, ...]] = []
        even = torch.full((self.count,), 1.0 / self.count, dtype=self.clean.dtype, device=self.clean.device)
        self.weights = even.unsqueeze(-1).expand(-1, len(images)) if settings.per_sample else even
        self.targets: Tensor | None = None
        self.done = 0
        self.checked = False
        if state is None:
            self.images = self._start()
            self.momentum, self.variance = torch.zeros_like(self.clean), torch.zeros_like(self.clean)
        else:
            self.images, self.momentum, self.variance, self.weights = (
                value.to(self.clean)
                for value in (state.images, state.momentum, state.variance, state.weights)
            )
            self.targets = state.targets.to(self.labels)
            self.done = int(state.step)
            draws.generator.set_state(state.generator)

    def _start(self) -> Tensor:
        s = self.s
        if s.start == "uniform":
            u = self.draws.uniform(self.clean)
            move = (
                s.eps * u
                if s.norm == "linf"
                else step(u, s.eps, "l2") * u.abs().amax((1, 2, 3), keepdim=True)
            )
            return project(self.clean + move, self.clean, s.eps, s.norm, s.bounds)
        if s.noise == 0.0:
            return self.clean.clone()
        noisy = self.clean + s.noise * self.draws.normal(self.clean)
        return project(noisy, self.clean, s.eps, s.norm, s.bounds) if s.start == "projected" else noisy

    def run(self) -> Tensor:
        """Take all steps; returns the adversarial images in the dtype of the loop."""
        if self.s.eps == 0:
            return self.clean
        if self.targets is None:
            self.targets = self._find_targets()
        for _ in range(self.s.steps):
            self._step()
        return self.images

    @torch.no_grad()
    def _find_targets(self) -> Tensor:
        if not self.s.targeted or self.s.target == "label":
            return self.labels
        logits = [surrogate(self.clean) for surrogate in self.surrogates]
        check_classes(self.surrogates, logits, self.labels)
        return target_labels(self.s.target, self.labels, torch.stack(logits), self.draws.generator)

    def _views(self, leaf: Tensor, partners: Tensor | None, draw: Resize | None) -> tuple[Tensor, int]:
        """What a surrogate sees of the images: (copies * batch, ...) and the number of copies."""
        views = leaf.unsqueeze(0)
        if self.admix is not None and partners is not None:
            views = mixed(leaf, partners, self.admix.strength)
        if self.scales > 1:
            views = torch.cat([scaled(view, self.scales) for view in views])
        copies = views.shape[0]
        flat = views.flatten(0, 1)
        return (flat if draw is None or self.di is None else self.di.apply(flat, draw)), copies

    def _resizes(self, number: int) -> list[Resize | None]:
        if self.di is None:
            return [None] * self.count
        height, width = (int(side) for side in self.clean.shape[-2:])
        sides, canvas = self.di.plan(height, width)
        return [
            self.draws.resize(sides, canvas, (height, width), step=number, surrogate=k)
            for k in range(self.count)
        ]

    def _objective(self, losses: Tensor) -> Tensor:
        """Sum over images of the mean over copies (the leading dimensions), in the direction of ascent."""
        return self.sign * losses.sum() / max(1, losses.numel() // len(self.clean))

    def _step(self) -> None:
        s, t = self.s, self.done
        point = self.images
        if self.ahead and self.mu is not None:
            point = point + s.alpha * self.mu * self.momentum
        leaves, logits, gradients = self._look(point)
        losses = torch.stack([cross_entropy(z.detach(), self._labels).mean(0) for z in logits])
        if self.adaptive and (t == 0 or (s.agm_every > 0 and t % s.agm_every == 0)):
            self.weights = self._weigh(point, gradients, losses)
        score, keep = self._filter(gradients)
        fused = self._fuse(leaves, logits, gradients)
        del leaves, logits
        gradient = fused
        if self.variance_part is not None:
            gradient = fused + self.variance
            self.variance = self._neighbourhood(t, self.variance_part) - fused
        if self.filtered:
            gradient = gradient * keep
        if self.kernel is not None:
            gradient = smooth(gradient, self.kernel)
        direction = gradient
        if self.mu is not None:
            direction = self.momentum = accumulate(gradient, self.momentum, self.mu)
        length = s.alpha if s.final_step is None else s.final_step
        moved = self.images + step(direction, length, s.norm)
        self.images = project(moved, self.clean, s.eps, s.norm, s.bounds)
        self.done += 1
        if self.traced:
            still = (gradient == 0).flatten(1).all(1)
            self.records.append((self.weights, keep.to(fused.dtype).mean((1, 2, 3)), losses, keep, still))
        if self.on_step is not None:
            record = (point, gradients, losses, self.weights, score, keep, fused, self.images)
            self.on_step(StepRecord(t, *record))

    @property
    def _labels(self) -> Tensor:
        return self.labels if self.targets is None else self.targets

    def _look(self, point: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Each surrogate's leaf and logits (copies, batch, classes); the gradients (K, batch, ...) of all.

        A surrogate's gradient follows its forward at once, while its activations are near.
        """
        s = self.s
        partners = self.draws.partners(len(point), self.admix.others) if self.admix else None
        leaves, logits, gradients = [], [], point.new_empty(self.count, *point.shape)
        with torch.enable_grad():
            for k, (surrogate, draw) in enumerate(
                zip(self.surrogates, self._resizes(self.done), strict=True)
            ):
                leaf = point.detach().requires_grad_()
                views, copies = self._views(leaf, partners, draw)
                z = surrogate(views).unflatten(0, (copies, -1))
                leaves.append(leaf)
                logits.append(z)
                if not self.checked:
                    check_classes(self.surrogates[: k + 1], logits, self._labels)
                gradient = None
                if z.requires_grad:
                    loss = self._objective(LOSSES[s.loss](z, self._labels))
                    (gradient,) = torch.autograd.grad(
                        loss, leaf, retain_graph=s.fusion != "loss", allow_unused=True
                    )
                if not self.checked:
                    self._check_gradient(surrogate, gradient)
                gradients[k] = 0.0 if gradient is None else gradient
        self.checked = True
        return leaves, logits, gradients

    def _check_gradient(self, surrogate: Surrogate, gradient: Tensor | None) -> None:
        found = check_connected(surrogate, gradient)
        if not bool(found.any()):
            self._explain_zero(surrogate)

    def _explain_zero(self, surrogate: Surrogate) -> None:
        """Tell a saturated loss (a warning) from a surrogate that has no gradient anywhere (an error)."""
        leaf = self.images.detach().requires_grad_()
        with torch.enable_grad():
            z = surrogate(leaf)
            ramp = torch.linspace(-1.0, 1.0, z.shape[-1], dtype=z.dtype, device=z.device)
            (gradient,) = torch.autograd.grad((z * ramp).sum(), leaf)
        if not bool(gradient.any()):
            check_connected(surrogate, None)
        warnings.warn(
            f"surrogate {surrogate.name!r} is so sure of every label that its loss has no gradient; "
            "loss='logit' or 'margin' does not saturate",
            FusionWarning,
            stacklevel=7,
        )

    def _weigh(self, point: Tensor, gradients: Tensor, losses: Tensor) -> Tensor:
        s = self.s
        moves = step(gradients, s.alpha, s.norm)
        candidates = project(self.images + moves, self.clean, s.eps, s.norm, s.bounds)
        if s.linear:
            matrix = linear_losses(losses, self.sign * gradients, candidates - point)
        else:
            views: list[Callable[[Tensor], Tensor] | None] = [None] * self.count
            if s.agm_transform and self.di is not None:
                again = self._resizes(self.done)
                views = [partial(self.di.apply, draw=draw) for draw in again if draw is not None]
            matrix, self.chunk = candidate_losses(
                self.surrogates, candidates, self._labels, chunk=self.chunk, dtype=s.agm_dtype, views=views
            )
        matrix = matrix.to(gradients.dtype)
        return agm_weights(
            matrix if s.per_sample else matrix.mean(-1), s.beta, ratio=s.ratio, targeted=s.targeted
        )

    def _filter(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        if self.filtered:
            score = disparity_map(gradients, "official" if self.s.drf == "official" else "symmetric")
        else:
            score = torch.ones_like(self.clean[:, :1])
        return score, score >= self.s.eta if self.filtered else score > 0

    def _fuse(self, leaves: Sequence[Tensor], logits: Sequence[Tensor], gradients: Tensor) -> Tensor:
        if self.s.fusion == "loss":
            w = self.weights
            shape = (self.count, -1 if w.dim() == 2 else 1, 1, 1, 1)
            return (w.reshape(shape) * gradients).sum(0)
        return self._backward(leaves, logits)

    def _backward(self, leaves: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        """Gradient of the fused objective at the images; frees each surrogate's graph in turn."""
        heads = torch.stack([z.detach() for z in logits]).requires_grad_()
        with torch.enable_grad():
            losses = fused_loss(heads, self.weights, self._labels, self.s.fusion, self.s.loss)
            (cotangents,) = torch.autograd.grad(self._objective(losses), heads)
        total = torch.zeros_like(self.clean)
        for leaf, z, cotangent in zip(leaves, logits, cotangents, strict=True):
            if z.requires_grad:
                total += torch.autograd.grad(z, leaf, cotangent.to(z.dtype))[0]
        return total

    def _neighbourhood(self, number: int, part: Variance) -> Tensor:
        """Mean gradient of the fused objective at random points round the iterate."""
        total = torch.zeros_like(self.clean)
        for n in range(part.neighbours):
            offset = self.draws.neighbour(self.clean, part.radius * self.s.eps, step=number, number=n)
            leaves: list[Tensor] = []
            logits: list[Tensor] = []
            near = self.images + offset
            for surrogate in self.surrogates:
                leaf = near.detach().requires_grad_()
                with torch.enable_grad():
                    logits.append(surrogate(leaf).unsqueeze(0))
                leaves.append(leaf)
            total = total + self._backward(leaves, logits)
        return total / part.neighbours

    def trace(self) -> Trace:
        """The records of all steps, and the state."""
        batch, clean = len(self.clean), self.clean
        if self.records:
            weights, kept, losses, keep, still = (
                torch.stack(list(x)) for x in zip(*self.records, strict=True)
            )
        else:
            weights = clean.new_zeros(0, *self.weights.shape)
            kept, losses = clean.new_zeros(0, batch), clean.new_zeros(0, self.count, batch)
            keep = torch.zeros(0, batch, 1, *clean.shape[-2:], dtype=torch.bool, device=clean.device)
            still = torch.zeros(0, batch, dtype=torch.bool, device=clean.device)
        names = tuple(surrogate.name for surrogate in self.surrogates)
        return Trace(weights, kept, losses, keep, still, self._labels, names, self.state())

    def state(self) -> AttackState:
        """All that going on from here needs."""
        return AttackState(
            self.images,
            self.momentum,
            self.variance,
            self.weights,
            self._labels,
            self.draws.generator.get_state(),
            torch.tensor(self.done),
        )
