"""The trilateral geometry of a sample: student, teacher, label, and the teacher's mean for the label's class.

A geometry is a list of blocks over the vertices ``s`` (student), ``t`` (teacher), ``g`` (label, one-hot) and
``o`` (the class mean T-bar of the sample's label), all probability vectors of K classes:

=============  =====  ==========================================================
block          width  value
=============  =====  ==========================================================
``a``          K      the vertex
``sq:ab``      K      (a - b)^2
``abs:ab``     K      abs(a - b)
``prod:abc``   K      (a - b) * (c - b), the elementwise "angle" at b
``len:ab``     1      norm(a - b) / sqrt 2, in [0, 1]
``cos:abc``    1      cosine of the angle at b, 0 where an edge has no length
``prob:a``     1      a[y], y the label
``entropy:a``  1      H(a) / log K, in [0, 1]
``margin:a``   1      a[y] - max of a over the other classes, in [-1, 1]
=============  =====  ==========================================================

Source: Hu et al., TGeo-KD, ICLR 2024, and the feature variants in the history of its authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import ConfigError, ShapeError

VERTICES = "stgo"
_LETTERS = {"sq": 2, "abs": 2, "prod": 3, "len": 2, "cos": 3, "prob": 1, "entropy": 1, "margin": 1}
_SCALARS = frozenset({"len", "cos", "prob", "entropy", "margin"})
_TINY = 1e-12

_PRESETS: dict[str, tuple[str, ...]] = {
    "official": ("s", "t", "g", "o", "sq:os", "sq:gs", "sq:ts", "sq:tg", "sq:og"),
    "vertices": ("s", "t", "g", "o"),
    "sq_edges": ("sq:os", "sq:gs", "sq:ts"),
    "vertex_angle": ("s", "t", "g", "o", "prod:osg", "prod:tsg"),
    "edge_angle": ("sq:os", "sq:gs", "sq:ts", "prod:osg", "prod:tsg"),
    "official_v0": ("s", "t", "g", "o", "sq:os", "sq:gs", "sq:ts", "prod:osg", "prod:tsg"),
    "angle": ("prod:osg", "prod:tsg"),
    "cifar": ("s", "t", "o", "g", "abs:sg", "abs:st", "abs:so", "prod:ogs", "prod:tgs"),
    "criteo1": ("s", "t", "g"),
    "criteo2": ("sq:st", "sq:tg", "sq:gs"),
    "criteo3": ("s", "t", "g", "sq:st", "sq:tg", "sq:gs"),
    "compact": (
        *("len:sg", "len:st", "len:tg", "len:so", "len:to", "len:og"),
        *("cos:gst", "cos:gts", "cos:sgt", "cos:gso", "cos:tog"),
        *("prob:s", "prob:t", "prob:o", "entropy:s", "entropy:t", "margin:s", "margin:t"),
    ),
}


def presets() -> dict[str, tuple[str, ...]]:
    """The registered geometries: name -> blocks."""
    return dict(_PRESETS)


def register_geometry(name: str, blocks: Iterable[str]) -> Geometry:
    """Give a list of blocks a name that every ``geometry=`` argument takes.

    Raises:
        ConfigError: a name that is taken by other blocks, or a block that cannot be read.

    Example:
        >>> register_geometry("lengths", ["len:sg", "len:st", "len:tg"]).width(10)
        3
    """
    geometry = Geometry(tuple(blocks))
    if _PRESETS.get(name, geometry.blocks) != geometry.blocks or name == "auto":
        raise ConfigError(f"geometry {name!r} is taken by other blocks; choose another name")
    _PRESETS[name] = geometry.blocks
    return geometry


def _split(block: str) -> tuple[str, str]:
    kind, colon, letters = block.partition(":")
    if not colon:
        kind, letters = "vertex", block
    count = 1 if kind == "vertex" else _LETTERS.get(kind, 0)
    if len(letters) != count or not count or any(letter not in VERTICES for letter in letters):
        raise ConfigError(
            f"geometry block {block!r} is unknown; wanted a vertex (one of s, t, g, o) or "
            + ", ".join(f"{name}:{'abc'[:n]}" for name, n in _LETTERS.items())
            + " with vertices for a, b, c"
        )
    return kind, letters


@dataclass(frozen=True)
class Geometry:
    """A composition of feature blocks, evaluated in the order given.

    Args:
        blocks: block names, see the table above.

    Raises:
        ConfigError: no block, or one that cannot be read.

    Example:
        >>> Geometry(["s", "t", "sq:st", "len:so", "cos:gst"]).width(10)
        32
    """

    blocks: tuple[str, ...]

    def __init__(self, blocks: Sequence[str]) -> None:
        if isinstance(blocks, str) or not blocks:
            raise ConfigError(
                f"geometry blocks are {blocks!r}, wanted a non-empty list such as ['s', 'len:st']"
            )
        for block in blocks:
            _split(block)
        object.__setattr__(self, "blocks", tuple(blocks))

    @classmethod
    def named(cls, name: str | Geometry | Sequence[str], num_classes: int | None = None) -> Geometry:
        """Resolve a preset's name, ``"auto"`` (``official`` up to 4 classes, else ``compact``) or blocks."""
        if isinstance(name, Geometry):
            return name
        if not isinstance(name, str):
            return cls(name)
        if name == "auto" and num_classes is not None:
            name = "official" if num_classes <= 4 else "compact"
        if name not in _PRESETS:
            raise ConfigError(f"geometry is {name!r}, wanted 'auto', a Geometry or one of {sorted(_PRESETS)}")
        return cls(_PRESETS[name])

    @property
    def needs_class_mean(self) -> bool:
        """Whether any block looks at the vertex ``o``."""
        return any("o" in _split(block)[1] for block in self.blocks)

    def width(self, num_classes: int) -> int:
        """Number of features per sample for K classes."""
        return sum(1 if _split(block)[0] in _SCALARS else num_classes for block in self.blocks)

    def __call__(
        self,
        s: Float[Tensor, "batch classes"],
        t: Float[Tensor, "batch classes"],
        g: Float[Tensor, "batch classes"],
        o: Float[Tensor, "batch classes"] | None = None,
    ) -> Float[Tensor, "batch features"]:
        """Evaluate the blocks.

        Args:
            s: student probabilities, rows sum to 1.
            t: teacher probabilities.
            g: one-hot labels.
            o: class mean of each sample's label; needed where a block names it.

        Returns:
            Features in float32 or better, differentiable in all vertices.

        Raises:
            ShapeError: the vertices differ in shape.
            ConfigError: a block needs ``o`` and it is None.
        """
        given = {"s": s, "t": t, "g": g} | ({} if o is None else {"o": o})
        if o is None and self.needs_class_mean:
            raise ConfigError(f"geometry {list(self.blocks)} needs the class mean o, got None")
        for name, vertex in given.items():
            if vertex.shape != s.shape or vertex.dim() != 2:
                raise ShapeError(
                    f"{name} has shape {tuple(vertex.shape)}, wanted (batch, classes) = {tuple(s.shape)} "
                    "like s"
                )
        dtype = torch.promote_types(s.dtype, torch.float32)
        return _evaluate(self.blocks, {name: vertex.to(dtype) for name, vertex in given.items()})


def _evaluate(blocks: tuple[str, ...], vertices: dict[str, Tensor]) -> Tensor:
    edges: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def edge(tail: str, head: str) -> Tensor:
        """Head - tail; computed once per unordered pair (a sign flip is exact)."""
        key = tail + head if tail < head else head + tail
        if key not in edges:
            edges[key] = vertices[key[1]] - vertices[key[0]]
        return edges[key] if key == tail + head else -edges[key]

    def norm(one: str, two: str) -> Tensor:
        key = one + two if one < two else two + one
        if key not in norms:
            norms[key] = torch.linalg.vector_norm(edge(key[0], key[1]), dim=-1)
        return norms[key]

    def block(name: str) -> Tensor:
        kind, at = _split(name)
        if kind == "vertex":
            return vertices[at]
        if kind == "sq":
            return edge(*at).square()
        if kind == "abs":
            return edge(*at).abs()
        if kind == "prod":
            return edge(at[1], at[0]) * edge(at[1], at[2])
        if kind == "len":
            value = norm(*at) / math.sqrt(2.0)
        elif kind == "cos":
            scale = norm(at[1], at[0]) * norm(at[1], at[2])
            dot = (edge(at[1], at[0]) * edge(at[1], at[2])).sum(-1)
            flat = scale <= _TINY
            value = torch.where(flat, 0.0, dot / torch.where(flat, 1.0, scale)).clamp(-1.0, 1.0)
        elif kind == "prob":
            value = (vertices["g"] * vertices[at]).sum(-1)
        elif kind == "entropy":
            p = vertices[at]
            value = -(p * p.clamp_min(_TINY).log()).sum(-1) / math.log(p.shape[-1])
        else:  # the label's own entry is lowered by 2, so that the maximum runs over the others
            p, g = vertices[at], vertices["g"]
            value = (g * p).sum(-1) - (p - 2.0 * g).amax(-1)
        return value.unsqueeze(-1)

    return torch.cat([block(name) for name in blocks], dim=-1)


def features(
    s: Float[Tensor, "batch classes"],
    t: Float[Tensor, "batch classes"],
    g: Float[Tensor, "batch classes"],
    o: Float[Tensor, "batch classes"] | None = None,
    preset: str | Geometry | Sequence[str] = "auto",
) -> Float[Tensor, "batch features"]:
    """The geometry features phi of each sample (TGeo-KD, inputs of f_omega).

    Args:
        s: student probabilities ``(batch, classes)``, at temperature 1 in the paper.
        t: teacher probabilities.
        g: one-hot labels.
        o: teacher's class mean of each sample's label; None for a geometry without it.
        preset: a name (see :func:`presets`), a :class:`Geometry` or a list of blocks.

    Returns:
        ``(batch, features)``, float32 or better.

    Raises:
        ConfigError: unknown preset or block, or ``o`` missing.
        ShapeError: vertices of different shape.

    Example:
        >>> import torch
        >>> s = t = g = torch.eye(3)
        >>> features(s, t, g, g, "compact").shape
        torch.Size([3, 18])
    """
    return Geometry.named(preset, s.shape[-1])(s, t, g, o)
