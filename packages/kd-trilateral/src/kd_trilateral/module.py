"""TrilateralKD: the distillation loss with one teacher weight per sample, as an ``nn.Module``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.errors import ConfigError, DataError, ShapeError, check_range, check_shape
from fusion_core.numerics import masked_mean
from kd_trilateral import ratios
from kd_trilateral.classmean import ClassMeanState, class_mean
from kd_trilateral.errors import StateError
from kd_trilateral.geometry import Geometry
from kd_trilateral.losses import TASKS, CEOn, Task, as_pair, kd_terms, mix, taking_part
from kd_trilateral.ratio import RatioNet, Shape

Preset = Literal["robust", "paper"]
Ratio = Literal["tgeo", "const", "anl", "ada", "wls", "rw"]
RATIOS = ("tgeo", "const", "anl", "ada", "wls", "rw")
PRIORS = ("none", "ada", "wls", "const")
_PRESETS: dict[str, dict[str, Any]] = {
    "robust": {"geometry": "auto", "init_alpha": 0.5, "outer_loss": "gce"},
    "paper": {"geometry": "official", "init_alpha": None, "outer_loss": "ce"},
}


@dataclass(frozen=True)
class Context:
    """What the bilevel engine and the trace need of a forward pass; every tensor is detached."""

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor
    mask: Tensor
    vertices: tuple[Tensor, Tensor, Tensor]
    phi: Tensor | None
    prior: Tensor | None
    sample_id: Tensor | None
    untrusted: Tensor | None


@dataclass(frozen=True)
class Output:
    """Result of one call of :class:`TrilateralKD`.

    Attributes:
        loss: scalar, mean over the rows that take part.
        alpha: weight of the TEACHER ``(batch,)``, with graph to the ratio network.
        kl: tau^2 KL per sample ``(batch,)``.
        ce: cross-entropy per sample ``(batch,)``.
    """

    loss: Tensor
    alpha: Tensor
    kl: Tensor
    ce: Tensor
    context: Context = field(repr=False, compare=False)


class TrilateralKD(nn.Module):
    """``L = mean_i alpha_i tau^2 KL_i + (1 - alpha_i) CE_i`` with alpha_i read off the sample's geometry.

    Args:
        num_classes: K >= 2; 2 in a binary task.
        temperature: tau of the KL term; None = 4.0, and 2.0 in a binary task.
        task: ``"multiclass"`` (logits ``(batch, K)``) or ``"binary"`` (also ``(batch,)`` or ``(batch, 1)``).
        preset: ``"robust"`` (geometry auto, ratios start at 0.5, bounded outer loss) or ``"paper"`` (geometry
            official, PyTorch's initialisation, outer cross-entropy); arguments given here win.
        geometry: a name, a :class:`~kd_trilateral.geometry.Geometry` or a list of blocks.
        geometry_temperature: of the probabilities that the geometry sees.
        ratio: ``"tgeo"``, a heuristic (``const``, ``anl``, ``ada``, ``wls``, ``rw``) or any callable of this
            module's :class:`Context` that returns alpha ``(batch,)``.
        alpha: weight of the TEACHER of ``const`` (also as a prior).
        init_alpha: ratio that training starts at; None = plain initialisation.
        alpha_range: (low, high) that alpha stays inside.
        prior: a heuristic whose logit is added to the network's.
        network: shape of the ratio network, see :class:`~kd_trilateral.ratio.RatioNet`.
        hidden: its hidden sizes.
        dropout: in the ratio network.
        input_norm: running standardisation of the features.
        tbar: class means ``"train"`` (fitted once by :meth:`fit_class_mean`), of the ``"batch"``, or
            ``"none"`` (vertex ``o`` uniform).
        ce_on: ``"probs"`` reproduces the authors' double softmax.
        ignore_index: label of rows that take no part.
        class_weight: of the cross-entropy.
        label_smoothing: of the cross-entropy.
        standardize_logits: z-score both logits in the KL term.
        on_bad_teacher: rows of NaN or infinite teacher logits are an ``"error"`` or get ``"zero_alpha"``.
        validate: look at the values of labels and teacher logits: ``"always"``, ``"never"``, or ``"auto"`` =
            on the CPU always, on an accelerator (where it would stall the queue) on calls 1, 2, 4, 8, ...
        total_steps: length of training, for ``anl``.
        num_samples: rows of the training set, for ``rw``.
        seed: of the ratio network's initialisation.

    Raises:
        ConfigError: a setting that cannot be used.

    Example:
        >>> kd = TrilateralKD(num_classes=3, tbar="none")
        >>> out = kd(torch.zeros(2, 3), torch.eye(3)[:2], torch.tensor([0, 1]))
        >>> out.alpha
        tensor([0.5000, 0.5000], grad_fn=<...>)
    """

    tbar: Tensor
    tbar_fitted: Tensor
    step_count: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        temperature: float | None = None,
        task: Task = "multiclass",
        preset: Preset = "robust",
        geometry: str | Geometry | Sequence[str] | None = None,
        geometry_temperature: float = 1.0,
        ratio: Ratio | Callable[[Context], Tensor] = "tgeo",
        alpha: float = 0.5,
        init_alpha: float | Literal["preset"] | None = "preset",
        alpha_range: tuple[float, float] = (0.0, 1.0),
        prior: Literal["none", "ada", "wls", "const"] = "none",
        network: Shape = "tgeo",
        hidden: Sequence[int] | None = None,
        dropout: float = 0.0,
        input_norm: bool = False,
        tbar: Literal["train", "batch", "none"] = "train",
        ce_on: CEOn = "logits",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        standardize_logits: bool = False,
        on_bad_teacher: Literal["error", "zero_alpha"] = "error",
        validate: Literal["auto", "always", "never"] = "auto",
        total_steps: int | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("task", task, TASKS),
            ("preset", preset, tuple(_PRESETS)),
            ("prior", prior, PRIORS),
            ("tbar", tbar, ("train", "batch", "none")),
            ("ce_on", ce_on, ("logits", "probs")),
            ("on_bad_teacher", on_bad_teacher, ("error", "zero_alpha")),
            ("validate", validate, ("auto", "always", "never")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}, wanted one of {allowed}")
        if not callable(ratio) and ratio not in RATIOS:
            raise ConfigError(f"ratio is {ratio!r}, wanted one of {RATIOS} or a callable")
        if not isinstance(cast(Any, num_classes), int):
            raise ConfigError(f"num_classes is {num_classes!r}, wanted an integer >= 2")
        if num_classes < 2 or (task == "binary" and num_classes != 2):
            raise ConfigError(
                f"num_classes is {num_classes}, wanted " + ("2" if task == "binary" else ">= 2")
            )
        if class_weight is not None:
            check_shape("class_weight", class_weight, "classes", classes=num_classes)
        if ratio == "anl" and not total_steps:
            raise ConfigError("ratio 'anl' goes from 1 to 0 over training; pass total_steps")
        if ratio == "rw" and not num_samples:
            raise ConfigError("ratio 'rw' learns one number per training row; pass num_samples")
        chosen = _PRESETS[preset]
        self.num_classes = num_classes
        self.task: Task = task
        default_tau = 2.0 if task == "binary" else 4.0
        self.temperature = default_tau if temperature is None else temperature
        check_range("temperature", self.temperature, 0.0, float("inf"), open=True)
        check_range("geometry_temperature", geometry_temperature, 0.0, float("inf"), open=True)
        self.geometry = Geometry.named(chosen["geometry"] if geometry is None else geometry, num_classes)
        self.geometry_temperature = geometry_temperature
        self.outer_loss: str = chosen["outer_loss"]
        self.ratio = ratio
        self.constant_alpha = check_range("alpha", alpha, 0.0, 1.0)
        self.prior = prior
        self.tbar_from = tbar
        self.ce_on: CEOn = ce_on
        self.ignore_index = ignore_index
        self.label_smoothing = check_range("label_smoothing", label_smoothing, 0.0, 1.0)
        self.standardize_logits = standardize_logits
        self.on_bad_teacher = on_bad_teacher
        self.validate = validate
        self.total_steps = total_steps
        self.detach_alpha = ratio != "rw"  # rw descends the training loss with the student
        self._calls = 0
        start = chosen["init_alpha"] if init_alpha == "preset" else init_alpha
        self.network = (
            RatioNet(
                self.geometry.width(num_classes),
                network,
                hidden=hidden,
                init_alpha=start,
                alpha_range=alpha_range,
                dropout=dropout,
                input_norm=input_norm,
                seed=seed,
            )
            if ratio == "tgeo"
            else None
        )
        self.free_logit = nn.Parameter(torch.zeros(num_samples or 0)) if ratio == "rw" else None
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.register_buffer("tbar", torch.full((num_classes, num_classes), 1.0 / num_classes))
        self.register_buffer("tbar_fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))  # written when saved
        self._fitted = False
        self._steps = 0

    # ---------------------------------------------------------------- class mean

    def fit_class_mean(
        self,
        teacher_logits: Tensor,
        labels: Tensor,
        previous: ClassMeanState | None = None,
    ) -> ClassMeanState:
        """Fill T-bar from the teacher's logits on TRAINING rows, in parts if need be.

        Args:
            teacher_logits: ``(rows, classes)``, in a binary task also ``(rows,)``.
            labels: ``(rows,)``.
            previous: the state that the call for the former part returned.

        Returns:
            The state, to be passed on with the next part.

        Raises:
            DataError: labels out of range; rows of NaN or infinite logits, unless ``on_bad_teacher`` is
                ``"zero_alpha"``, which leaves them out.
        """
        pair = as_pair(teacher_logits) if self.task == "binary" else teacher_logits
        sizes = check_shape("teacher_logits", pair, "rows classes", classes=self.num_classes)
        check_shape("labels", labels, "rows", rows=sizes["rows"])
        self.check_labels(labels)
        labels = labels.to(self.tbar.device)
        pair = pair.to(self.tbar)
        bad = ~torch.isfinite(pair).all(-1)
        if self.on_bad_teacher == "error":
            self._refuse(bad)
        pair, labels = torch.where(bad.unsqueeze(-1), 0.0, pair), torch.where(bad, self.ignore_index, labels)
        t = F.softmax(pair / self.geometry_temperature, dim=-1)
        tbar, state = class_mean(t, labels, self.num_classes, previous, ignore_index=self.ignore_index)
        self.set_class_mean(tbar)
        return state

    def set_class_mean(self, tbar: Float[Tensor, "classes classes"]) -> None:
        """Take a T-bar that is known already, such as a cache's."""
        check_shape("tbar", tbar, "classes classes", classes=self.num_classes)
        self.tbar.copy_(tbar)
        self.tbar_fitted.fill_(True)
        self._fitted = True

    def restart(self, step: int = 0) -> None:
        """Count training steps from here again: ``anl`` starts over."""
        self._steps = step

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.step_count.fill_(self._steps)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fitted = bool(self.tbar_fitted)
        self._steps = int(self.step_count)

    # ---------------------------------------------------------------- checks

    def check_labels(self, labels: Tensor, name: str = "labels") -> None:
        """Raise DataError unless labels are integers in ``[0, classes)`` or ``ignore_index``."""
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise DataError(f"{name} have dtype {labels.dtype}, wanted integers (class indices)")
        if not self._look(labels):
            return
        bad = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise DataError(
                f"{name}[{first}] is {int(labels[first])}, wanted 0..{self.num_classes - 1}"
                f" (or ignore_index {self.ignore_index})"
            )

    def _refuse(self, bad: Tensor) -> None:
        if bool(bad.any()):
            shown = bad.nonzero().flatten()[:8].tolist()
            raise DataError(
                f"teacher_logits hold NaN or infinity in rows {shown} ({int(bad.sum())} rows in all); "
                "mend them, or pass on_bad_teacher='zero_alpha' to learn from the label alone there"
            )

    def _look(self, tensor: Tensor) -> bool:
        if self.validate == "auto":
            return tensor.device.type == "cpu" or self._calls & (self._calls - 1) == 0
        return self.validate == "always"

    def _prepare(
        self, zs: Tensor, zt: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.task == "binary":
            zs, zt = as_pair(zs), as_pair(zt)
        sizes = check_shape("student_logits", zs, "batch classes", classes=self.num_classes)
        if zt.shape != zs.shape:
            raise ShapeError(
                f"teacher_logits have shape {tuple(zt.shape)}, wanted {tuple(zs.shape)} like student_logits"
            )
        check_shape("labels", labels, "batch", batch=sizes["batch"])
        self.check_labels(labels)
        zt = zt.detach().to(zs.device, torch.promote_types(zs.dtype, torch.float32))
        if self.on_bad_teacher == "zero_alpha":
            bad = ~torch.isfinite(zt).all(-1)
            return zs, torch.where(bad.unsqueeze(-1), 0.0, zt), labels.to(zs.device).long(), bad
        if self._look(zt):
            self._refuse(~torch.isfinite(zt).all(-1))
        return zs, zt, labels.to(zs.device).long(), None

    # ---------------------------------------------------------------- forward

    def terms(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(kl, ce)`` per sample with this module's settings, see :func:`~kd_trilateral.losses.kd_terms`."""
        return kd_terms(
            student_logits,
            teacher_logits,
            labels,
            self.temperature,
            self.task,
            self.ce_on,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            standardize_logits=self.standardize_logits,
        )

    @torch.no_grad()
    def _vertices(
        self, zs: Tensor, zt: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(zs.dtype, torch.float32)
        s = F.softmax(zs.detach().to(wide) / self.geometry_temperature, dim=-1)
        t = F.softmax(zt.to(wide) / self.geometry_temperature, dim=-1)
        safe = torch.where(mask, labels, 0)
        return s, t, F.one_hot(safe, self.num_classes).to(wide)

    @torch.no_grad()
    def _features(self, vertices: tuple[Tensor, Tensor, Tensor], labels: Tensor, mask: Tensor) -> Tensor:
        s, t, g = vertices
        safe = torch.where(mask, labels, 0)
        if not self.geometry.needs_class_mean:
            return self.geometry(s, t, g)
        if self.tbar_from == "batch":
            rows = torch.where(mask, labels, self.ignore_index)
            tbar = class_mean(t, rows, self.num_classes, ignore_index=self.ignore_index)[0]
        else:
            if self.tbar_from == "train" and not self._fitted:
                raise StateError(
                    "the class mean T-bar is not fitted: call fit_class_mean(teacher_logits, labels) with "
                    "the "
                    "TRAINING rows first, or pass tbar='batch' or tbar='none'"
                )
            tbar = self.tbar
        return self.geometry(s, t, g, tbar.to(s)[safe])

    @torch.no_grad()
    def _heuristic(self, name: str, context: Context) -> Tensor:
        s, t, _ = context.vertices
        safe = torch.where(context.mask, context.labels, 0)
        like = s[:, 0]
        if name == "const":
            return ratios.const(like, self.constant_alpha)
        if name == "anl":
            return ratios.anl(like, self._steps, self.total_steps or 1)
        if name == "ada":
            return ratios.ada(t, safe)
        ce = [
            F.cross_entropy(z.to(like.dtype), safe, reduction="none")
            for z in (context.student_logits, context.teacher_logits)
        ]
        return ratios.wls(ce[0], ce[1])

    def alpha_of(self, context: Context) -> Tensor:
        """The weight of the TEACHER per sample of an earlier pass, with the ratio network as it is now."""
        if self.network is not None:
            assert context.phi is not None
            alpha = self.network(context.phi, context.prior)
        elif self.free_logit is not None:
            if context.sample_id is None:
                raise StateError("ratio 'rw' needs to know the rows: call loss(..., sample_id=indices)")
            alpha = torch.sigmoid(self.free_logit[context.sample_id])
        elif isinstance(self.ratio, str):
            alpha = self._heuristic(self.ratio, context)
        else:
            alpha = self.ratio(context)
        if alpha.shape != context.labels.shape:
            raise ShapeError(
                f"the ratio gave alpha of shape {tuple(alpha.shape)}, wanted "
                f"{tuple(context.labels.shape)}: one "
                "number per sample, never broadcast"
            )
        return alpha if context.untrusted is None else torch.where(context.untrusted, 0.0, alpha)

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes"] | Float[Tensor, " batch"],
        teacher_logits: Float[Tensor, "batch classes"] | Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
        sample_id: Int[Tensor, " batch"] | None = None,
    ) -> Output:
        """The loss of a batch.

        Args:
            student_logits: ``(batch, classes)``, with graph; in a binary task also ``(batch,)`` or ``(batch,
                1)``.
            teacher_logits: likewise; used without gradient.
            labels: ``(batch,)`` integers in ``[0, classes)`` or ``ignore_index``.
            sample_id: row numbers in the training set, for the trace and for ``rw``.

        Returns:
            loss, alpha, kl and ce; an empty batch gives a zero loss with gradient.

        Raises:
            ShapeError: shapes that differ.
            DataError: labels out of range or not integers, teacher logits not finite.
            StateError: T-bar is needed and not fitted.
        """
        self._calls += 1
        zs, zt, labels, bad = self._prepare(student_logits, teacher_logits, labels)
        mask = taking_part(labels, self.ignore_index)
        vertices = self._vertices(zs, zt, labels, mask)
        ids = None if sample_id is None else sample_id.to(zs.device)
        context = Context(zs.detach(), zt, labels, mask, vertices, None, None, ids, bad)
        if self.network is not None:
            phi = self._features(vertices, labels, mask)
            prior = None if self.prior == "none" else self._heuristic(self.prior, context)
            context = replace(context, phi=phi, prior=prior)
        alpha = self.alpha_of(context)
        if self.training:
            self._steps += 1
        kl, ce = self.terms(zs, zt, labels)
        weight = alpha.detach() if self.detach_alpha else alpha
        return Output(masked_mean(mix(weight.to(kl.dtype), kl, ce), mask), alpha, kl, ce, context)
