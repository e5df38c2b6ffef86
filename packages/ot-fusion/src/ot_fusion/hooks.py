"""Reading activations of two models on the same inputs, reduced to second moments as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.modules import untouched
from fusion_core.progress import track
from ot_fusion.config import FusionConfig
from ot_fusion.cost import finish_cost
from ot_fusion.errors import DataError, InputError, ShapeError, SpecError
from ot_fusion.forward import call_model
from ot_fusion.layers import absolute_clip, feature_plan, plan_of_cost
from ot_fusion.moments import Moments, Transform
from ot_fusion.plan import Plan
from ot_fusion.spec.types import AlignmentSpec, Op
from ot_fusion.tokens import as_samples, token_mask

__all__ = ["Statistics", "batches", "capture", "collect", "node_size"]


@dataclass
class Statistics:
    """What two models' activations on the same inputs say.

    Attributes:
        moments: by activation name.
        sizes: by sum: mean absolute activation of skip and branch per anchor channel.
        raw: by activation name, transformed features ``(neurons, samples)`` of both, where they had to be
            kept.
        samples: input rows read.
    """

    moments: dict[str, Moments] = field(default_factory=dict[str, Moments])
    sizes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    raw: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    samples: int = 0

    def has(self, names: Iterable[str]) -> bool:
        """Whether all these activations were read."""
        return all(name in self.moments or name in self.raw for name in names)

    def cost(self, names: list[str], config: FusionConfig) -> Tensor:
        """The ground cost of one or more activations, as if their samples stood side by side."""
        found = [self.moments[name] for name in names]
        options: dict[str, Any] = {"normalize": config.normalize, "clip": absolute_clip(config)}
        transform: Transform = config.transform
        if config.metric != "euclidean":
            if len(found) > 1:
                raise InputError(f"metric={config.metric!r} takes one activation at a time, not {names}")
            return found[0].cost(transform, config.metric, **options)
        squared = sum((part.squared_cost(transform) for part in found[1:]), found[0].squared_cost(transform))
        return finish_cost(squared, squared_cost=config.squared, **options)

    def plan(
        self,
        names: list[str],
        config: FusionConfig,
        masses: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Plan:
        """The plan of one or more activations."""
        if all(name in self.raw for name in names):
            sides = [torch.cat([self.raw[name][side] for name in names], 1) for side in (0, 1)]
            return feature_plan(sides[0], sides[1], config, masses)
        return plan_of_cost(self.cost(names, config), config, masses)


def node_size(spec: AlignmentSpec, op: Op) -> int:
    """Neurons of an operation's output.

    Raises:
        SpecError: its output lies on no space.
    """
    if op.space is None:
        raise SpecError(f"{op.output} lies on no space, so it has no neurons to match")
    return spec.spaces[op.space].group.views()[op.view]


def batches(data: Any, batch_size: int, samples: int | None) -> Iterator[Any]:
    """Batches of inputs, at most ``samples`` rows of them.

    Args:
        data: a tensor of inputs, a mapping of tensors (``input_ids``, ``attention_mask``), or an iterable of
            batches: tensors, mappings, or tuples whose first entry is one.
        batch_size: rows a batch, for tensors and mappings.
        samples: most rows in all.

    Raises:
        DataError: no rows, or something else.

    Example:
        >>> [len(part) for part in batches(torch.zeros(5, 2), 2, 3)]
        [2, 1]
    """
    left = float("inf") if samples is None else samples
    whole = data
    if isinstance(whole, Tensor | Mapping):
        rows = _rows(whole)
        parts: Iterable[Any] = (_cut(whole, i, min(i + batch_size, rows)) for i in range(0, rows, batch_size))
    elif isinstance(whole, Iterable):
        parts = whole
    else:
        raise DataError(
            f"data is {type(data).__name__}, wanted a tensor, a mapping of tensors or batches of them"
        )
    for part in parts:
        batch = part[0] if isinstance(part, tuple | list) else part
        if left <= 0:
            return
        found = _rows(batch)
        yield batch if found <= left else _cut(batch, 0, int(left))
        left -= found


def _rows(batch: Any) -> int:
    values = [v for v in batch.values() if isinstance(v, Tensor)] if isinstance(batch, Mapping) else [batch]
    if not values or not isinstance(values[0], Tensor):
        raise DataError(f"a batch is {type(batch).__name__}, wanted a tensor or a mapping of tensors")
    if not values[0].ndim:
        raise DataError("a batch is a single number, wanted a tensor with a row for each input")
    return len(values[0])


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: v[start:stop] if isinstance(v, Tensor) else v for key, v in batch.items()}
    return batch[start:stop]


def _call(model: nn.Module, batch: Any) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        call_model(model, {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
    else:
        kind = next((p.dtype for p in model.parameters()), batch.dtype)
        call_model(model, batch.to(device, kind if batch.is_floating_point() else None))


@contextmanager
def capture(model: nn.Module, names: Iterable[str]) -> Generator[dict[str, Tensor], None, None]:
    """Keep the outputs of some modules of the latest forward pass.

    Raises:
        SpecError: the model has no such module.
    """
    modules, found = dict(model.named_modules()), dict[str, Tensor]()
    wanted = sorted(set(names))
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise SpecError(f"the spec reads the outputs of {', '.join(missing)}, which the model does not have")

    def keeper(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple | list) else output
            found[name] = value if isinstance(value, Tensor) else value[0]

        return keep

    with ExitStack() as stack:
        for name in wanted:
            stack.callback(modules[name].register_forward_hook(keeper(name)).remove)
        yield found


class _Reader:
    """Turns captured outputs into samples by the token rules."""

    def __init__(self, spec: AlignmentSpec, config: FusionConfig) -> None:
        self.spec, self.config = spec, config
        self.ops = {op.output: op for op in spec.ops}
        names = [op.output for op in spec.ops]
        joins = [number for number, op in enumerate(spec.ops) if op.kind == "join"]
        self.without_token = set(names[: joins[0]]) if joins else set[str]()
        self.on_token = set(spec.notes.get("cls_nodes", "").split())
        if config.faithful == "official":
            self.on_token = {f"blocks.6.{part}" for part in ("o", "fc1", "fc2")}
        elif config.last_block_tokens == "same":
            self.on_token = set()

    def keep(self, node: str, output: Tensor, batch: Any, *, alike: bool = False) -> Tensor | None:
        """Which tokens of a ``(batch, tokens, neurons)`` output count.

        ``alike``: the same for all activations.
        """
        if output.ndim != 3 or node in self.without_token:
            return None
        attended = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        rule = "cls" if node in self.on_token and not alike else self.config.tokens
        if rule == "all" and attended is None:
            return None
        mask = token_mask(rule, output.shape[1]).to(output.device)
        if isinstance(attended, Tensor) and attended.shape == output.shape[:2]:
            return mask & attended.to(output.device).bool()
        return mask

    def samples(self, node: str, found: Mapping[str, Tensor], batch: Any, *, alike: bool = False) -> Tensor:
        """Rows of neurons of an activation."""
        op = self.ops[node]
        output = found[str(op.hook)]
        if op.part is not None:  # several layers packed in one
            output = output[..., op.part[0] : op.part[1]]
        if output.ndim == 3 and len(output) == 1:  # positions are looked up once for the whole batch
            output = output.expand(_rows(batch), -1, -1)
        return as_samples(output, node_size(self.spec, op), keep=self.keep(node, output, batch, alike=alike))


def _leaves(spec: AlignmentSpec, node: str) -> list[str]:
    """The activations and tables whose sum a node is."""
    op = next(op for op in spec.ops if op.output == node)
    if op.hook is not None or op.kind == "embed":
        return [node]
    if op.kind == "add":
        return [leaf for part in op.inputs for leaf in _leaves(spec, part)]
    if op.kind in ("elementwise", "join"):
        return _leaves(spec, op.inputs[0])
    raise InputError(f"the size of {node} is not known: the spec names no module whose output it is")


def collect(
    source: nn.Module,
    anchor: nn.Module,
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    data: Any,
    config: FusionConfig,
    *,
    keep: bool = False,
    progress: bool | None = None,
) -> Statistics:
    """Run both models on the same inputs and reduce their activations to what the plans need.

    Args:
        source: model whose neurons are moved.
        anchor: model that gives the coordinates; both come back untouched.
        spec0: the source's specification.
        spec1: the anchor's, with the same operations.
        data: see :func:`batches`.
        config: samples, tokens, transform, residual policy.
        keep: store the transformed activations instead (needed by Gromov-Wasserstein plans).
        progress: show a bar.

    Raises:
        DataError: no samples; NaN or infinite activations (the layer and batch are named).
        ShapeError: activations of different numbers of samples.
    """
    if data is None:
        raise InputError(
            "features='acts' needs data: inputs that both models take; features='wts' needs none"
        )
    stats, store = Statistics(), dict[str, tuple[list[Tensor], list[Tensor]]]()
    consistent = config.strategy == "consistent"
    matched = [op.output for op in spec1.ops if op.hook and op.space and (consistent or op.kind == "linear")]
    weighted = not consistent and config.residual.startswith("weighted")
    sums = [op for op in spec1.ops if op.kind == "add" and op.space] if weighted else []
    leaves = {part: _leaves(spec1, part) for op in sums for part in op.inputs}
    tables = {op.output: op for op in spec1.ops if op.kind == "embed" and op.hook is None}
    hooked = sorted(
        {leaf for names in leaves.values() for leaf in names if leaf not in tables} - set(matched)
    )
    joints = _joint_pairs(spec1) if config.qk == "joint" and not consistent else {}
    readers = _Reader(spec0, config), _Reader(spec1, config)
    two_passes = bool(sums) and config.official_side("residual_weights") and config.transform != "none"
    rows = list(batches(data, config.batch_size, config.samples)) if two_passes else None
    with ExitStack() as stack:
        stack.enter_context(untouched(source, anchor, rng=True))
        stack.enter_context(torch.no_grad())
        names = [[str(reader.ops[node].hook) for node in (*matched, *hooked)] for reader in readers]
        found = [stack.enter_context(capture(m, n)) for m, n in zip((source, anchor), names, strict=True)]
        stream = rows if rows is not None else batches(data, config.batch_size, config.samples)
        sizes = _Sizes(spec1, anchor, readers[1], found[1], leaves)
        for number, batch in enumerate(track(stream, "activations", enabled=progress)):
            _call(source, batch)
            _call(anchor, batch)
            stats.samples += _rows(batch)
            for node in (*matched, *hooked):
                pair = [r.samples(node, f, batch) for r, f in zip(readers, found, strict=True)]
                _check_pair(node, number, pair)
                if keep:
                    for part, value in zip(store.setdefault(node, ([], [])), pair, strict=True):
                        part.append(value.double().cpu())
                else:
                    stats.moments.setdefault(node, Moments()).update(pair[0], pair[1])
            for joint, parts in joints.items():
                pair = [
                    torch.cat([r.samples(part, f, batch) for part in parts], 1)
                    for r, f in zip(readers, found, strict=True)
                ]
                stats.moments.setdefault(joint, Moments()).update(pair[0], pair[1])
            if sums and not two_passes:
                sizes.add(batch)
        if stats.samples == 0:
            raise DataError("data give no samples")
        if two_passes:
            sizes.scales = {leaf: _scale(stats.moments[leaf], config.transform) for leaf in stats.moments}
            for batch in rows or ():
                _call(anchor, batch)
                sizes.add(batch)
        stats.sizes = {op.output: (sizes.mean(op.inputs[0]), sizes.mean(op.inputs[1])) for op in sums}
    for node, (left, right) in store.items():
        stats.raw[node] = (
            _transformed(torch.cat(left), config.transform).T,
            _transformed(torch.cat(right), config.transform).T,
        )
    return stats


def _joint_pairs(spec: AlignmentSpec) -> dict[str, tuple[str, str]]:
    """Queries and keys of each attention, by the name of their common plan."""
    return {f"{op.output}.qk": (op.inputs[0], op.inputs[1]) for op in spec.ops if op.kind == "attention"}


def _check_pair(node: str, number: int, pair: list[Tensor]) -> None:
    if len(pair[0]) != len(pair[1]):
        raise ShapeError(
            f"{node} has {len(pair[0])} samples in the source and {len(pair[1])} in the anchor on the same "
            "inputs"
        )
    for side, value in zip(("source", "anchor"), pair, strict=True):
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"activations of {node} in the {side} are NaN or infinite in batch {number}")


def _scale(moments: Moments, transform: str) -> tuple[Tensor, Tensor]:
    """What the anchor's activations are shifted and divided by."""
    mean, deviation, length = moments.anchor_scale()
    one, none = torch.ones_like(mean), torch.zeros_like(mean)
    if transform == "std":
        return mean, deviation + 1e-9
    return (mean, one) if transform == "center" else (none, torch.where(length > 0, length, one))


def _transformed(z: Tensor, transform: str) -> Tensor:
    if transform in ("std", "center"):
        z = z - z.mean(0)
    if transform == "std":
        if len(z) < 2:
            raise DataError(f"data give {len(z)} samples, standardising takes at least 2")
        return z / (z.std(0) + 1e-9)
    if transform == "norm":
        length = z.norm(dim=0)
        return z / torch.where(length > 0, length, 1.0)
    return z


class _Sizes:
    """Mean absolute activations of the parts of sums, per anchor channel."""

    def __init__(
        self,
        spec: AlignmentSpec,
        anchor: nn.Module,
        reader: _Reader,
        found: Mapping[str, Tensor],
        leaves: Mapping[str, list[str]],
    ) -> None:
        self.reader, self.found, self.leaves = reader, found, leaves
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        parameters = dict(anchor.named_parameters())
        self.tables = {
            op.output: parameters[str(op.weight)].detach().double().cpu().flatten(0, -2)
            for op in spec.ops
            if op.kind == "embed" and op.hook is None
        }

    def _leaf(self, leaf: str, batch: Any) -> Tensor:
        if leaf in self.tables:
            return self.tables[leaf]
        z = self.reader.samples(leaf, self.found, batch, alike=True).double().cpu()
        shift, scale = self.scales.get(leaf, (0.0, 1.0))
        return (z - shift) / scale

    def add(self, batch: Any) -> None:
        """Count the latest forward pass."""
        for part, names in self.leaves.items():
            values = [self._leaf(name, batch) for name in names]
            whole = values[0] if len(values) == 1 else sum(values[1:], values[0])
            total = whole.abs().sum(0)
            self.total[part] = self.total[part] + total if part in self.total else total
            self.count[part] = self.count.get(part, 0) + len(whole)

    def mean(self, part: str) -> Tensor:
        """Per channel."""
        return self.total[part] / max(self.count[part], 1)
