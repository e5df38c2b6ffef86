"""The declaration of a model's symmetries.

Spaces, the tensors that live on them, and the order of operations.

Source: the transportation-map flow graph of "Transformer Fusion with Optimal Transport" (ICLR 2024), section
4, with the axis spaces of Git Re-Basin (arXiv 2209.04836) generalised to heads, rotary pairs and packed
tensors.
"""

from dataclasses import dataclass, field
from typing import Literal

from ot_fusion.groups import Group

__all__ = ["AlignmentSpec", "Axis", "Concat", "Op", "OpKind", "Space", "TensorSpec"]

OpKind = Literal["embed", "linear", "norm", "elementwise", "add", "gate", "attention", "flatten", "join"]


@dataclass(frozen=True, slots=True)
class Space:
    """One set of interchangeable coordinates, such as a residual stream or a hidden layer.

    Attributes:
        name: the space's name, unique in a spec.
        group: the relabellings of its coordinates that keep the function.
    """

    name: str
    group: Group


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a tensor that lives on a space.

    Attributes:
        space: the space's name.
        view: which of the group's views the axis shows ("" for a plain space; "q", "k", "v", "o" and
            "qk_norm" for attention heads).
        inner: how many fixed positions follow one another for each coordinate (a convolution's ``h * w``
            pixels when it is flattened before a linear layer).
        side: "out" where the axis holds the coordinates themselves (rows of a weight, norms, columns of an
            embedding), "in" where it reads them (columns of a weight). It matters for unequal widths only.
    """

    space: str
    view: str = ""
    inner: int = 1
    side: Literal["out", "in"] = "out"


@dataclass(frozen=True, slots=True)
class Concat:
    """An axis on which several spaces or views follow one another, as in a packed ``c_attn``."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter or buffer and the space of each of its axes; None is an axis that stays as it is."""

    key: str
    axes: tuple[Axis | Concat | None, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """A step of the flow graph, in execution order.

    Reads the maps of its inputs, gives the map of its output.

    Attributes:
        kind: "embed" (table whose columns are the coordinates; no input), "linear" (linear layers and
            convolutions, also a patch embedding), "norm", "elementwise" (nothing to fuse: copy the map),
            "add" (inputs: skip, branch), "gate" (inputs: gate, up; they share one plan), "attention" (inputs:
            q, k, v; the output has v's map in the order of the query heads), "flatten", "join" (tokens put
            beside the
            stream, such as a class token: inputs: stream, token).
        output: name of the activation that the step makes.
        inputs: names of the activations that it reads.
        weight: key of its weight, if it has one; where the weight holds the layers of several steps (a packed
            ``c_attn``), ``part`` is this step's range on the output axis.
        bias: key of its bias.
        part: ``(start, stop)`` on the packed output axis, or None for all of it.
        buffers: keys of vectors that move with the weight (running mean and variance).
        hook: name of the module whose output is this activation (before the nonlinearity for a layer); None
            where there is none, as for tables and most sums.
        space: name of the output's space; None where the output is fixed (classes, vocabulary).
        view: the space's view, as in Axis.
    """

    kind: OpKind
    output: str
    inputs: tuple[str, ...] = ()
    weight: str | None = None
    bias: str | None = None
    part: tuple[int, int] | None = None
    buffers: tuple[str, ...] = ()
    hook: str | None = None
    space: str | None = None
    view: str = ""


@dataclass(frozen=True)
class AlignmentSpec:
    """Everything that alignment has to know about an architecture.

    Attributes:
        spaces: the spaces by name.
        tensors: every parameter and every buffer that is not copied from the anchor, by key.
        ops: the flow graph in execution order.
        tied: groups of keys that are one tensor (input and output embeddings).
        copied: keys taken from the anchor as they are (``num_batches_tracked``, rotary frequencies, masks).
        name: the architecture, for messages.
    """

    spaces: dict[str, Space]
    tensors: dict[str, TensorSpec]
    ops: tuple[Op, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    copied: tuple[str, ...] = ()
    name: str = ""
    notes: dict[str, str] = field(default_factory=dict[str, str])
