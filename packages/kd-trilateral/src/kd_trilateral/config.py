"""All settings of a distillation run as plain values, for files, command lines and trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fusion_core.config import Config as BaseConfig
from fusion_core.errors import LARGEST, LARGEST_SEED, ConfigError, check_range

_LOSS = (
    "temperature",
    "task",
    "preset",
    "geometry",
    "geometry_temperature",
    "alpha",
    "alpha_range",
    "prior",
    "network",
    "dropout",
    "input_norm",
    "tbar",
    "ce_on",
    "ignore_index",
    "label_smoothing",
    "standardize_logits",
    "on_bad_teacher",
    "validate",
)
_BILEVEL = (
    "hypergradient",
    "every",
    "warmup_steps",
    "order",
    "subsample",
    "outer_loss",
    "normalize",
    "center",
    "precondition",
    "outer_lr",
    "max_grad_norm",
    "epsilon",
    "neumann_terms",
    "damping",
    "implicit_steps",
    "stochastic",
    "head",
)


@dataclass(frozen=True)
class Config(BaseConfig):
    """Settings of :class:`~kd_trilateral.TrilateralKD`, :class:`~kd_trilateral.Bilevel` and :func:`fit`.

    The loss's and the engine's fields mean what their classes say; the others:

    Attributes:
        student: ``"module:callable"`` that makes the student (command line only).
        data: ``"module:callable"`` that makes a :class:`~kd_trilateral.training.Splits` from a seed (command
            line only).
        teacher: ``"module:callable"`` that makes the teacher, or the path of a cache; "" = the data bring the
            teacher's logits.
        init_alpha: ratio to start at; ``"preset"`` as the preset has it, ``"none"`` plain initialisation.
        ratio: ``tgeo`` or a heuristic.
        epochs: passes over the training rows.
        steps: student steps instead, if above 0.
        batch_size: training rows per step.
        val_batch_size: held-out rows per outer step; 0 = batch_size.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9, Nesterov off).
        lr: of the student.
        weight_decay: of the student.
        schedule: ``cosine`` to 0 or ``constant``.
        val_share: of the training rows, drawn by class, where no held-out rows are given.
        balance: ``oversample`` draws every class equally often in training.
        refit: train a fresh student on training and held-out rows with the learned ratio network.
        trace_capacity: rows of the trace.
        device: where to train.
        seed: of everything that is drawn.

    Example:
        >>> Config(temperature=2.0).override(["every=8", "geometry=compact"]).every
        8
    """

    student: str = ""
    data: str = ""
    teacher: str = ""
    # the loss
    task: Literal["multiclass", "binary"] = "multiclass"
    preset: Literal["robust", "paper"] = "robust"
    ratio: Literal["tgeo", "const", "anl", "ada", "wls", "rw"] = "tgeo"
    temperature: float | None = None
    geometry: str | tuple[str, ...] | None = None
    geometry_temperature: float = 1.0
    alpha: float = 0.5
    init_alpha: float | Literal["preset", "none"] = "preset"
    alpha_range: tuple[float, float] = (0.0, 1.0)
    prior: Literal["none", "ada", "wls", "const"] = "none"
    network: Literal["tgeo", "cifar", "criteo"] = "tgeo"
    dropout: float = 0.0
    input_norm: bool = False
    tbar: Literal["train", "batch", "none"] = "train"
    ce_on: Literal["logits", "probs"] = "logits"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    standardize_logits: bool = False
    on_bad_teacher: Literal["error", "zero_alpha"] = "error"
    validate: Literal["auto", "always", "never"] = "auto"
    # the engine
    hypergradient: Literal[
        "jvp", "fd", "fd1", "head", "unrolled", "neumann", "implicit", "joint", "val_mix", "frozen"
    ] = "jvp"
    every: int = 4
    warmup_steps: int = 0
    order: Literal["inner_first", "outer_first"] = "inner_first"
    subsample: float | int = 1.0
    outer_loss: Literal["ce", "gce"] | None = None
    normalize: bool = True
    center: bool = False
    precondition: bool = True
    outer_lr: float = 1e-2
    max_grad_norm: float | None = 1.0
    epsilon: float | None = None
    neumann_terms: int = 3
    damping: float = 0.1
    implicit_steps: int = 50
    stochastic: Literal["replay", "off"] = "replay"
    head: str | None = None
    # the loop
    epochs: int = 30
    steps: int = 0
    batch_size: int = 128
    val_batch_size: int = 0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    val_share: float = 0.1
    balance: Literal["none", "oversample"] = "none"
    refit: bool = False
    trace_capacity: int = 200_000
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.geometry, tuple):  # a name may be registered later
            from kd_trilateral.geometry import Geometry  # which loads PyTorch

            Geometry(self.geometry)
        self.check_fields("epochs", "batch_size", "neumann_terms", "implicit_steps", "trace_capacity", low=1)
        self.check_fields("steps", "val_batch_size", "every", "warmup_steps")
        self.check_fields("lr", "outer_lr", "weight_decay")
        self.check_fields("temperature", "geometry_temperature", "max_grad_norm", open=True)
        self.check_fields("epsilon", "damping", "subsample", open=True)
        self.check_fields("alpha", "label_smoothing", high=1.0)
        check_range("val_share", self.val_share, 0.0, 1.0, open=True)
        self.check_fields("dropout", high=0.99)
        self.check_fields("ignore_index", low=-LARGEST)
        self.check_fields("seed", high=LARGEST_SEED)
        low, high = self.alpha_range
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(f"alpha_range is {self.alpha_range}, wanted 0 <= low < high <= 1")
        if not isinstance(self.init_alpha, str):
            check_range("init_alpha", self.init_alpha, low, high)
        elif self.init_alpha not in ("preset", "none"):
            raise ConfigError(f"init_alpha is {self.init_alpha!r}, wanted a number, 'preset' or 'none'")

    def loss_kwargs(self, num_classes: int) -> dict[str, Any]:
        """Keyword arguments of ``TrilateralKD(...)`` for K classes."""
        start = None if self.init_alpha == "none" else self.init_alpha
        named = {name: getattr(self, name) for name in _LOSS}
        named |= {"num_classes": num_classes, "ratio": self.ratio, "init_alpha": start, "seed": self.seed}
        return named

    def bilevel_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``Bilevel(...)``."""
        return {name: getattr(self, name) for name in _BILEVEL}
