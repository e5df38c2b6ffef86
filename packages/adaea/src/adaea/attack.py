"""AdaEA as a callable: settings and surrogates in, adversarial images out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaea.draws import Draws
from adaea.inputs import check_geometry, check_inputs, check_state, warn_inactive
from adaea.loop import Loop, OnStep
from adaea.settings import AdaptiveSettings
from adaea.surrogates import Surrogates, name_surrogates, prepared
from adaea.trace import AttackState, Trace
from adaea.updates import Momentum
from fusion_core.seeding import generator as make_generator

Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]


class Attack(ABC):
    """Being called on a batch: what :class:`AdaEA` and :class:`adaea.Ens` share."""

    @abstractmethod
    def _adaptive(self) -> AdaptiveSettings:
        """The settings as the loop takes them."""

    @overload
    def __call__(
        self,
        images: Images,
        labels: Labels,
        *,
        trace: Literal[False] = False,
        surrogates: Surrogates | None = None,
        state: AttackState | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        images: Images,
        labels: Labels,
        *,
        trace: Literal[True],
        surrogates: Surrogates | None = None,
        state: AttackState | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, Trace]: ...

    def __call__(
        self,
        images: Images,
        labels: Labels,
        *,
        trace: bool = False,
        surrogates: Surrogates | None = None,
        state: AttackState | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor | tuple[Tensor, Trace]:
        """Attack a batch.

        Args:
            images: float ``(batch, channels, height, width)`` in ``bounds``; not modified.
            labels: integer ``(batch,)``: the true classes, or the wanted ones with ``targeted=True``.
            trace: return what happened at every step too.
            surrogates: instead of those bound at construction.
            state: ``trace.state`` of an earlier run on these images, to take ``steps`` more.
            generator: of all random numbers; by default one of its own, made of ``seed``.
            draws: recorded random numbers, see :class:`adaea.draws.Recorded`.
            on_step: called with a :class:`adaea.trace.StepRecord` after every step.

        Returns:
            Images of the same shape, dtype and device, within ``eps`` and ``bounds``; with ``trace=True`` a
            pair of them and the :class:`Trace`.

        Raises:
            InputError: no surrogates, or one without a gradient to its input; it is named.
            DataError: images or labels of another dtype or range, or a surrogate that returns labels.
            ShapeError: other shapes, or surrogates with different numbers of classes.
            NonFiniteError: NaN or infinity in the images or a gradient.
        """
        settings = self._adaptive()
        models = name_surrogates(settings.surrogates if surrogates is None else surrogates)
        check_inputs(images, labels, settings.bounds)
        if state is not None:
            check_state(state, images, len(models))
        if draws is None:
            draws = Draws(make_generator(settings.seed, "adaea") if generator is None else generator)
        if len(images):
            check_geometry(settings, images)
            warn_inactive(settings, len(models), images)
        with torch.inference_mode(False), prepared(models, settings.devices) as ready:
            if images.is_inference():
                images = images.clone()  # as a tensor that a graph may hold
            if labels.is_inference():
                labels = labels.clone()
            loop = Loop(settings, ready, images, labels, draws, state=state, traced=trace, on_step=on_step)
            adversarial = loop.run() if len(images) and settings.eps > 0 else images
            found = loop.trace() if trace else None
        made = adversarial.detach().to(images.dtype).clone()
        return made if found is None else (made, found)


@dataclass(frozen=True, eq=False, repr=False)
class AdaEA(Attack, AdaptiveSettings):
    """The adaptive ensemble attack: surrogates weighted by AGM, pixels filtered by DRF.

    An object is immutable; :meth:`with_` makes another, :meth:`config` gives the settings as JSON values. For
    models that one owns or is allowed to test.

    Args:
        surrogates: models with gradients from image to logits: a mapping by name, a sequence, or one module;
            may be given at the call instead. They take images in ``bounds`` and normalise by themselves.
            Modules are frozen and in evaluation mode for the run; plain functions are called as they are.
        eps: budget, >= 0; 8/255, or 3.0 for ``norm="l2"``. 0 gives the images back bit for bit.
        alpha: step size, > 0; 2/255, or a quarter of ``eps`` for l2.
        steps: at least 1.
        update: none (I-FGSM), :class:`Momentum` or :class:`Nesterov`, with or without :class:`Variance`.
        transforms: :class:`DI`, :class:`SI` or :class:`Admix`, :class:`TI`; the method fixes their order.
        fusion: ``"logits"``, ``"probs"`` or ``"loss"``.
        loss: ``"ce"``, ``"logit"``, ``"margin"`` or ``"dlr"``; AGM's matrix stays cross-entropy.
        norm: ``"linf"`` or ``"l2"``.
        targeted: the labels of the call are the classes wanted.
        target: ``"random"``, ``"least-likely"``, a class or a function ``(labels, logits) -> classes``; each
            makes the attack targeted, with the true labels at the call.
        start: ``"normal"``: ``noise`` times normal numbers, not projected, as in the official code;
            ``"projected"``: those, projected; ``"uniform"``: anywhere in the ball.
        noise: standard deviation of the start noise; 0 starts at the images.
        final_step: length of the real step where it is not ``alpha`` (FGSM: eps); candidates keep ``alpha``.
        bounds: least and largest value of a pixel.
        devices: name -> device for surrogates that are to run elsewhere than where they lie.
        seed: of the attack's own generator; the same for every call that names no ``generator``.
        beta: sharpness of AGM, >= 0.
        eta: threshold of DRF on a mean cosine.
        agm: ``"exact"``; ``"per_sample"``: weights per image, so that the batch does not matter;
            ``"linear"``: to first order without further forwards; ``"linear_per_sample"``; ``"off"`` or
            False: even weights.
        agm_every: weights anew every so many steps; 0 at the first step only.
        agm_transform: judge the candidates through a fresh draw of DI.
        agm_dtype: half dtype for AGM's forwards only, such as ``"bfloat16"``.
        agm_batch_size: most candidate images per forward; halved where memory runs out.
        ratio: ``"given"`` or ``"received"``, see :func:`adaea.agm_weights`.
        drf: ``"symmetric"``; ``"official"``: without the last surrogate's row; ``"off"`` or False.

    Raises:
        ConfigError: a setting that is out of range or unknown.

    Example:
        >>> from torch import nn
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(3)]
        >>> images, labels = torch.rand(5, 3, 2, 2), torch.arange(5) % 3
        >>> attack = AdaEA(nets, eps=8 / 255, steps=2, update=Momentum(0.9))
        >>> bool(((attack(images, labels) - images).abs() <= 8 / 255 + 1e-6).all())
        True
    """

    def _adaptive(self) -> AdaptiveSettings:
        return self

    @classmethod
    def official(cls, surrogates: Surrogates | None = None, **changes: Any) -> Self:
        """The authors' code: the filter without the last surrogate's row, momentum 0.9, start noise 0.001.

        Args:
            surrogates: to bind.
            **changes: other settings, such as ``update=None`` for its I-FGSM.

        Example:
            >>> AdaEA.official().drf
            'official'
        """
        theirs: dict[str, Any] = {"drf": "official", "eta": -0.3, "update": Momentum(0.9), "noise": 0.001}
        return cls(surrogates, **theirs | changes)

    @classmethod
    def literature(cls, surrogates: Surrogates | None = None, **changes: Any) -> Self:
        """The usual setting of transfer benchmarks: eps 16/255, alpha 1.6/255, 10 steps, momentum 1.0.

        Args:
            surrogates: to bind.
            **changes: other settings.

        Example:
            >>> AdaEA.literature().update
            (Momentum(mu=1.0),)
        """
        usual: dict[str, Any] = {"eps": 16 / 255, "alpha": 1.6 / 255, "steps": 10, "update": Momentum(1.0)}
        return cls(surrogates, **usual | changes)
