"""The ratio network f_omega: from a sample's geometry to the weight of the TEACHER."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fusion_core.checkpoint import KeyMap, load_strict
from fusion_core.errors import CheckpointError, ConfigError, check_range, check_shape

Shape = Literal["tgeo", "cifar", "criteo"]
_SHAPES: dict[str, tuple[tuple[int, ...], str, bool]] = {
    "tgeo": ((32, 16), "leaky_relu", True),
    "cifar": ((128,), "relu", True),
    "criteo": ((8,), "relu", False),
}
_PRIOR_LIMIT = 4.0


class RunningNorm(nn.Module):
    """Standardises each feature by its mean and variance over all training batches so far.

    Unlike batch normalisation it uses the running statistics in training too, so a sample's output does not
    depend on its neighbours.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("m2", torch.zeros(width))

    def forward(self, phi: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Standardise; in training mode the batch is merged into the statistics first (Chan et al. 1979)."""
        if self.training and phi.shape[0]:
            with torch.no_grad():
                n, total = phi.shape[0], self.count + phi.shape[0]
                batch_mean = phi.mean(0)
                delta = batch_mean - self.mean
                self.m2 += (phi - batch_mean).square().sum(0) + delta.square() * (self.count * n / total)
                self.mean += delta * (n / total)
                self.count.copy_(total)
        scale = torch.where(self.m2 > 0, (self.m2 / self.count.clamp_min(1.0)).sqrt(), 1.0)
        return (phi - self.mean.clone()) / scale


class RatioNet(nn.Module):
    """f_omega: ``Linear(D,32) - LeakyReLU - Linear(32,16) - LeakyReLU - Linear(16,1) - sigmoid`` by default.

    Args:
        in_features: D, the width of the geometry.
        shape: ``"tgeo"`` (above), ``"cifar"`` Linear(D,128)-ReLU-Linear(128,1), ``"criteo"``
            Linear(D,8)-ReLU-Linear(8,1, no bias): the three found in the authors' history.
        hidden: other hidden sizes than the shape's.
        init_alpha: start as fixed-alpha distillation: the last layer's weight is zeroed and its bias set so
            that every ratio is this; None keeps PyTorch's initialisation.
        alpha_range: (low, high) inside [0, 1]; the sigmoid is squeezed into it.
        dropout: after each activation.
        input_norm: standardise the features by running statistics.
        seed: of the initialisation; None draws from the global generator, as torch modules do.

    Raises:
        ConfigError: unknown shape, or a number out of range.

    Example:
        >>> net = RatioNet(18, init_alpha=0.5)
        >>> net(torch.zeros(4, 18))
        tensor([0.5000, 0.5000, 0.5000, 0.5000], grad_fn=<...>)
    """

    def __init__(
        self,
        in_features: int,
        shape: Shape = "tgeo",
        *,
        hidden: Sequence[int] | None = None,
        init_alpha: float | None = None,
        alpha_range: tuple[float, float] = (0.0, 1.0),
        dropout: float = 0.0,
        input_norm: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if shape not in _SHAPES:
            raise ConfigError(f"ratio network shape is {shape!r}, wanted one of {sorted(_SHAPES)}")
        default_hidden, activation, last_bias = _SHAPES[shape]
        low, high = alpha_range
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(f"alpha_range is {alpha_range}, wanted 0 <= low < high <= 1")
        check_range("dropout", dropout, 0.0, 1.0)
        self.in_features = in_features
        self.alpha_range = (low, high)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            sizes = [in_features, *(default_hidden if hidden is None else hidden)]
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(sizes):
                act: nn.Module = nn.LeakyReLU(0.01) if activation == "leaky_relu" else nn.ReLU()
                layers += [nn.Linear(a, b), nn.Sequential(act, nn.Dropout(dropout)) if dropout else act]
            last = nn.Linear(sizes[-1], 1, bias=last_bias or init_alpha is not None)
        self.norm = RunningNorm(in_features) if input_norm else nn.Identity()
        self.net = nn.Sequential(*layers, last)
        if init_alpha is not None:
            start = check_range("init_alpha", (init_alpha - low) / (high - low), 0.0, 1.0, open=True)
            with torch.no_grad():
                last.weight.zero_()
                last.bias.fill_(math.log(start / (1.0 - start)))

    def forward(
        self,
        phi: Float[Tensor, "batch features"],
        prior: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The weight of the teacher per sample.

        Args:
            phi: geometry features.
            prior: a ratio per sample whose logit, clipped to [-4, 4], is added before the sigmoid.

        Returns:
            alpha ``(batch,)`` in the open interval ``alpha_range``.

        Raises:
            ShapeError: another number of features.
        """
        check_shape("phi", phi, "batch features", features=self.in_features)
        weight = cast(nn.Linear, self.net[0]).weight
        logit = self.net(self.norm(phi.to(weight.dtype))).squeeze(-1)
        if prior is not None:
            logit = logit + torch.logit(prior.to(logit), eps=1e-6).clamp(-_PRIOR_LIMIT, _PRIOR_LIMIT)
        # Rounding must not make the open interval closed: 1 - sigmoid(20) is below float32's step at 1.
        edge = torch.finfo(logit.dtype).eps
        low, high = self.alpha_range
        return low + (high - low) * torch.sigmoid(logit).clamp(edge, 1.0 - edge)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> RatioNet:
        """Build the network of an official state dict.

        Args:
            state: with keys ``fc1..3`` (HEAD's Controller), ``linear1/2`` (Criteo) or ``reweighting.0/2``
                (CIFAR, where the network lives inside the student's state dict; other keys are ignored
                there).

        Raises:
            CheckpointError: no such keys, or shapes that do not fit together.

        Example:
            >>> source = RatioNet(27)
            >>> names = {"net.0": "fc1", "net.2": "fc2", "net.4": "fc3"}
            >>> state = {names[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]: v
            ...          for k, v in source.state_dict().items()}
            >>> RatioNet.from_official(state).in_features
            27
        """
        for shape, names in (
            ("tgeo", ("fc1", "fc2", "fc3")),
            ("cifar", (r"(?:.*\.)?reweighting\.0", r"(?:.*\.)?reweighting\.2")),
            ("criteo", ("linear1", "linear2")),
        ):
            rules = [(rf"^{name}\.(weight|bias)$", rf"net.{2 * i}.\1") for i, name in enumerate(names)]
            others = "|".join(pattern for pattern, _ in rules)
            mapped = KeyMap([(rf"^(?!{others}).*", None), *rules]).apply(dict(state))
            if f"net.{2 * len(names) - 2}.weight" in mapped and "net.0.weight" in mapped:
                first = mapped["net.0.weight"]
                hidden = [int(mapped[f"net.{2 * i}.weight"].shape[0]) for i in range(len(names) - 1)]
                net = cls(int(first.shape[1]), cast(Shape, shape), hidden=hidden).to(first.dtype)
                load_strict(net, mapped)
                return net
        raise CheckpointError(
            f"no ratio network among the keys {sorted(state)[:6]}; wanted fc1..fc3, linear1..linear2 or "
            "reweighting.0/2 with .weight and .bias"
        )
