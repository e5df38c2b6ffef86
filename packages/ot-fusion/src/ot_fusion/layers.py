"""One linear layer and one transformer block, given activations: the paper's algorithm on plain tensors.

Source: section 4 and appendix of the paper; the block follows the authors' ViT and BERT code where the config
asks for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ot_fusion.apply import align_linear, align_vector, map_axis
from ot_fusion.config import FusionConfig
from ot_fusion.cost import ground_cost
from ot_fusion.errors import DataError, InputError, ShapeError
from ot_fusion.plan import Plan
from ot_fusion.policies import merge_maps
from ot_fusion.solvers import gromov, solve

__all__ = ["feature_plan", "fuse_encoder_block", "fuse_linear", "importance_masses", "row_features"]

_TINY = 1e-9


def row_features(weight: Tensor, config: FusionConfig, bias: Tensor | None = None) -> Tensor:
    """Rows of a weight as features, ``(n, rest)``, divided by their norms where the config says so."""
    rows = weight.flatten(1)
    if config.wts_bias and bias is not None:
        rows = torch.cat([rows, bias[:, None]], 1)
    return rows / (rows.norm(dim=1, keepdim=True) + _TINY) if config.row_norm else rows


def importance_masses(weight: Tensor, rule: str) -> Tensor | None:
    """Masses of neurons by the size of their weight rows: ``l1`` or ``l2`` norms; None is uniform."""
    if rule == "none":
        return None
    sizes = weight.flatten(1).norm(p=1 if rule == "l1" else 2, dim=1) + _TINY
    return sizes / sizes.sum()


def feature_plan(
    x: Tensor, y: Tensor, config: FusionConfig, masses: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Plan:
    """The plan between two sets of features, ``(neurons, samples)``, by the config's cost and solver."""
    if config.solver == "gromov":
        return gromov(x, y, epsilon=config.regularization(), normalization=config.map_rule)
    work = torch.promote_types(x.dtype, torch.float32)
    cost = ground_cost(
        x.to(work), y.to(work), config.metric, config.squared, config.normalize, absolute_clip(config)
    )
    return plan_of_cost(cost, config, masses)


def plan_of_cost(
    cost: Tensor, config: FusionConfig, masses: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Plan:
    """The plan of a cost by the config's solver."""
    if config.solver == "gromov":
        raise InputError("solver='gromov' compares features within each model and takes no cost; use flow")
    return solve(
        cost,
        *masses,
        solver=config.solver,
        reg=config.regularization(),
        reg_m=config.reg_m,
        max_iter=config.max_iter,
        tol=config.tol,
        normalization=config.map_rule,
    )


def absolute_clip(config: FusionConfig) -> tuple[float, float] | None:
    """The clip in units of the cost; the config counts in multiples of ``reg``."""
    if config.clip is None:
        return None
    return config.clip[0] * config.regularization(), config.clip[1] * config.regularization()


def fuse_linear(
    w0: Tensor,
    b0: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    t_in: Tensor | None = None,
    acts: tuple[Tensor | None, Tensor | None] = (None, None),
    config: FusionConfig | None = None,
    last_layer: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fuse one linear layer: align its inputs, match its outputs, align them, average (section 4.1).

    Args:
        w0: the source's weight ``(n0, p0)``; convolutions ``(n0, p0, *kernel)`` too.
        b0: its bias or None.
        w1: the anchor's weight ``(n1, p1)``.
        b1: its bias or None.
        t_in: map of the inputs, ``(p0, p1)``; None where they agree.
        acts: activations ``(samples, n0)`` and ``(samples, n1)`` on the same samples, for features ``acts``.
        config: cost, solver, alpha (the anchor's weight, 0.5 by default).
        last_layer: the outputs are fixed (classes): only the inputs are aligned.

    Returns:
        Weight and bias of the fused layer and the map of its outputs (None for the last layer).

    Raises:
        ShapeError: activations of different sample counts.
        InputError: features ``acts`` without activations.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> exact = FusionConfig(features="wts", solver="emd")
        >>> fused, _, t = fuse_linear(w[[1, 0]], None, w, None, config=exact)
        >>> torch.equal(fused, w), t.argmax(0)
        (True, tensor([1, 0]))
    """
    config = config or FusionConfig()
    alpha = 0.5 if config.alpha is None else config.alpha
    aligned, bias = align_linear(w0, b0, t_in)
    t_out: Tensor | None = None
    if not last_layer:
        if config.features == "acts":
            a0, a1 = acts
            if a0 is None or a1 is None:
                raise InputError("features='acts' needs acts=(source, anchor); features='wts' needs none")
            if a0.shape[0] != a1.shape[0]:
                raise ShapeError(f"acts have {a0.shape[0]} and {a1.shape[0]} samples, wanted the same inputs")
            for side, part in (("source", a0), ("anchor", a1)):
                if not bool(torch.isfinite(part).all()):
                    raise DataError(f"the activations of the {side} have NaN or infinite entries")
            features = a0.T, a1.T
        else:
            features = row_features(aligned, config, b0), row_features(w1, config, b1)
        masses = importance_masses(w0, config.importance), importance_masses(w1, config.importance)
        t_out = feature_plan(*features, config, masses).out_map()
        aligned, bias = align_linear(aligned, bias, None, t_out)
    return _mix(aligned, w1, alpha), None if bias is None or b1 is None else _mix(bias, b1, alpha), t_out


def _mix(aligned: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) aligned + alpha anchor``; alpha is the weight of the anchor."""
    return torch.lerp(aligned.to(anchor.dtype), anchor, alpha)


def fuse_encoder_block(
    params0: Mapping[str, Tensor],
    params1: Mapping[str, Tensor],
    acts0: Mapping[str, Tensor] | None,
    acts1: Mapping[str, Tensor] | None,
    t_in: Tensor | None,
    config: FusionConfig | None = None,
    previous: Tensor | None = None,
    last_block: bool = False,
    post_norm: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
    """Fuse one encoder block in the order of the authors' ViT (pre-norm) or BERT (post-norm).

    Args:
        params0: the source's parameters by the names of transformers 4: ``layernorm_before``,
            ``layernorm_after``, ``attention.attention.{query,key,value}``, ``attention.output.dense``,
            ``intermediate.dense``, ``output.dense``, each ``.weight`` and ``.bias``.
        params1: the anchor's.
        acts0: the source's activations ``(samples, features)`` by the names of the six linear layers.
        acts1: the anchor's, and ``attention`` (output of the attention branch), for weighted policies.
        t_in: map of the stream on entry.
        config: settings; ``alpha`` is the anchor's weight, 0.5 by default.
        previous: the anchor's block input ``(samples, features)``, for weighted policies.
        last_block: nothing comes after: the last layer's output is fixed and there is no outgoing map.
        post_norm: norms follow the sums.

    Returns:
        Fused parameters, the map of the stream on exit, and the maps by layer name.
    """
    config = config or FusionConfig()
    alpha = 0.5 if config.alpha is None else config.alpha
    attention = "attention.attention."
    maps: dict[str, Tensor] = {}
    out: dict[str, Tensor] = {}

    def norm(name: str, t: Tensor | None) -> None:
        for part in ("weight", "bias"):
            key = f"{name}.{part}"
            out[key] = _mix(align_vector(params0[key], t), params1[key], alpha)

    def acts_of(name: str) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if acts0 is None or acts1 is None else (acts0[name], acts1[name])

    def linear(name: str, t: Tensor | None, last: bool = False) -> Tensor | None:
        weight, bias = f"{name}.weight", f"{name}.bias"
        out[weight], fused_bias, t_out = fuse_linear(
            params0[weight],
            params0.get(bias),
            params1[weight],
            params1.get(bias),
            t,
            acts_of(name),
            config,
            last,
        )
        if fused_bias is not None:
            out[bias] = fused_bias
        if t_out is not None:
            maps[name] = t_out
        return t_out

    def queries_and_keys(t: Tensor | None) -> None:
        names = (f"{attention}query", f"{attention}key")
        if config.qk == "separate":
            for name in names:
                linear(name, t)
            return
        features: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            weight = align_linear(params0[f"{name}.weight"], None, t)[0]
            pair = acts_of(name)
            if config.features == "acts":
                if pair[0] is None or pair[1] is None:
                    raise InputError("features='acts' needs acts0 and acts1")
                features[name] = (pair[0].T, pair[1].T)
            else:
                features[name] = (weight.flatten(1), params1[f"{name}.weight"].flatten(1))
        whole = query_key_plan(features, config, names).out_map()
        for kind in ("weight", "bias"):
            keys = [f"{name}.{kind}" for name in names]
            if not all(key in params0 and key in params1 for key in keys):
                continue
            parts = [
                params0[key] if kind == "bias" else align_linear(params0[key], None, t)[0] for key in keys
            ]
            for key, aligned in zip(keys, apply_query_key(parts, whole, config), strict=True):
                out[key] = _mix(aligned, params1[key], alpha)
        maps.update(dict.fromkeys(names, whole) if config.qk == "shared" else {"joint": whole})

    def merged(resid: Tensor | None, branch: Tensor | None, sizes: tuple[Any, Any]) -> Tensor | None:
        if resid is None and config.official_side("identity_skip"):
            return branch
        return merge_maps(config.residual, resid, branch, *sizes)

    weighted = config.residual.startswith("weighted")
    branch1 = None if acts1 is None else acts1.get("attention", acts1.get("attention.output.dense"))
    if weighted and (previous is None or branch1 is None or acts1 is None):
        raise InputError(f"residual={config.residual!r} needs acts1 and previous")
    first = (previous, branch1) if weighted else (None, None)
    second: tuple[Any, Any] = (None, None)
    if weighted and branch1 is not None and previous is not None and acts1 is not None:
        second = (branch1 + previous, acts1["output.dense"])

    if not post_norm:
        norm("layernorm_before", t_in)
    queries_and_keys(t_in)
    t_value = linear(f"{attention}value", t_in)
    t_branch = linear("attention.output.dense", t_value)
    t_mid = merged(t_in, t_branch, first)
    norm("layernorm_before" if post_norm else "layernorm_after", t_mid)
    t_hidden = linear("intermediate.dense", t_mid)
    t_branch = linear("output.dense", t_hidden, last_block)
    t_out = None if last_block else merged(t_mid, t_branch, second)
    if post_norm:
        norm("layernorm_after", t_branch if config.official_side("post_norm") else t_out)
    return out, t_out, maps


def query_key_plan(
    features: Mapping[str, tuple[Tensor, Tensor]], config: FusionConfig, names: tuple[str, str]
) -> Plan:
    """One plan for queries and keys: the same for both (``shared``), or one of both stacked (``joint``).

    Args:
        features: per name the source's and anchor's ``(neurons, samples)``, not yet divided by row norms.
        config: ``qk`` says which; the joint map of activations stacks them as queries, keys, the authors'
            code as keys, queries.
        names: of queries and keys, in this order.

    Returns:
        ``(n0, n1)`` for ``shared``, ``(2 n0, 2 n1)`` for ``joint``.
    """

    def scaled(rows: Tensor) -> Tensor:
        divide = config.features == "wts" and config.row_norm
        return rows / (rows.norm(dim=1, keepdim=True) + _TINY) if divide else rows

    if config.qk == "shared":
        both = [scaled(torch.cat([features[name][side] for name in names], 1)) for side in (0, 1)]
        return feature_plan(both[0], both[1], config)
    swapped = config.features == "acts" and config.official_side("joint_order")
    order = names[::-1] if swapped else names
    stacked = [torch.cat([scaled(features[name][side]) for name in order]) for side in (0, 1)]
    return feature_plan(stacked[0], stacked[1], config)


def apply_query_key(parts: list[Tensor], whole: Tensor, config: FusionConfig) -> list[Tensor]:
    """Weights or biases of queries and keys (in this order) through the map of :func:`query_key_plan`."""
    if config.qk == "shared":
        return [map_axis(part, whole, 0) for part in parts]
    return list(map_axis(torch.cat(parts), whole, 0).chunk(2))
