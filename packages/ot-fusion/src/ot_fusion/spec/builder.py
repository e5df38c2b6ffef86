"""Writing a specification step by step, in execution order."""

from collections.abc import Sequence

from ot_fusion.errors import SpecError
from ot_fusion.groups import Full, Group
from ot_fusion.spec.types import AlignmentSpec, Axis, Concat, Op, OpKind, Space, TensorSpec

__all__ = ["SpecBuilder"]


class SpecBuilder:
    """Collects spaces, tensors and operations; every activation remembers the space it lies on.

    Args:
        name: the architecture.
        keys: the model's tensors, so that biases are declared only where they are.

    Example:
        >>> b = SpecBuilder("mlp", ["a.weight", "a.bias", "b.weight"])
        >>> b.linear("a", None, "hidden", b.space("hidden", Full(4)), hook="a")
        'hidden'
        >>> b.linear("b", "hidden", "logits", None)
        'logits'
        >>> b.build().tensors["b.weight"].axes
        (None, Axis(space='hidden', view='', inner=1, side='in'))
    """

    def __init__(self, name: str, keys: Sequence[str]) -> None:
        self.name, self.keys = name, set(keys)
        self.spaces: dict[str, Space] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.ops: list[Op] = []
        self.where: dict[str, tuple[str, str, int]] = {}
        self.tied: list[tuple[str, ...]] = []
        self.copied: list[str] = []
        self.notes: dict[str, str] = {}

    def space(self, name: str, group: Group) -> str:
        """Declare a space and return its name."""
        self.spaces[name] = Space(name, group)
        return name

    def _axis(self, node: str | None) -> Axis | None:
        if node is None or node not in self.where:
            return None
        space, view, inner = self.where[node]
        return Axis(space, view, inner, "in")

    def _place(self, op: Op, inner: int = 1) -> str:
        self.ops.append(op)
        if op.space is not None:
            self.where[op.output] = (op.space, op.view, inner)
        return op.output

    def tensor(self, key: str, *axes: Axis | Concat | None) -> None:
        """Declare a tensor's axes.

        Raises:
            SpecError: it was declared before with others.
        """
        spec = TensorSpec(key, tuple(axes))
        if self.tensors.setdefault(key, spec) != spec:
            raise SpecError(f"{key} is declared twice, with axes {self.tensors[key].axes} and {axes}")

    def linear(
        self,
        prefix: str,
        source: str | None,
        output: str,
        space: str | None,
        *,
        view: str = "",
        kernel: int = 0,
        hook: str | None = None,
    ) -> str:
        """A linear layer or, with ``kernel`` spatial axes, a convolution.

        ``space`` None is a fixed output.
        """
        weight, bias = f"{prefix}.weight", f"{prefix}.bias"
        out = None if space is None else Axis(space, view)
        self.tensor(weight, out, self._axis(source), *([None] * kernel))
        if bias in self.keys:
            self.tensor(bias, out)
        return self._place(
            Op(
                "linear",
                output,
                () if source is None or source not in self.where else (source,),
                weight,
                bias if bias in self.keys else None,
                hook=hook if hook is not None else (prefix if space is not None else None),
                space=space,
                view=view,
            )
        )

    def packed(
        self,
        prefix: str,
        source: str,
        outputs: Sequence[tuple[str, str, str, int]],
        *,
        hook: str | None = None,
    ) -> None:
        """A transposed layer (GPT-2's Conv1D) that holds several: ``(output, space, view, size)`` each."""
        weight, bias = f"{prefix}.weight", f"{prefix}.bias"
        parts = tuple(Axis(space, view) for _, space, view, _ in outputs)
        out = parts[0] if len(parts) == 1 else Concat(parts)
        self.tensor(weight, self._axis(source), out)
        if bias in self.keys:
            self.tensor(bias, out)
        start = 0
        for output, space, view, size in outputs:
            part = None if len(outputs) == 1 else (start, start + size)
            start += size
            self._place(
                Op(
                    "linear",
                    output,
                    (source,),
                    weight,
                    bias if bias in self.keys else None,
                    part,
                    hook=hook or prefix,
                    space=space,
                    view=view,
                )
            )

    def norm(
        self,
        prefix: str,
        source: str,
        output: str,
        *,
        buffers: bool = False,
        hook: str | None = None,
        view: str | None = None,
    ) -> str:
        """A norm on the space of its input; ``buffers`` adds running statistics."""
        space, where, inner = self.where[source]
        axis = Axis(space, where if view is None else view)
        keys = [f"{prefix}.{name}" for name in ("weight", "bias")]
        running = tuple(f"{prefix}.{name}" for name in ("running_mean", "running_var")) if buffers else ()
        for key in (*keys, *running):
            if key in self.keys:
                self.tensor(key, axis)
        if f"{prefix}.num_batches_tracked" in self.keys:
            self.copied.append(f"{prefix}.num_batches_tracked")
        weight, bias = (key if key in self.keys else None for key in keys)
        op = Op(
            "norm", output, (source,), weight, bias, buffers=running, hook=hook, space=space, view=axis.view
        )
        self.ops.append(op)
        self.where[output] = (space, where, inner)
        return output

    def embed(self, key: str, output: str, space: str, *, rows: int = 1, hook: str | None = None) -> str:
        """A table whose last axis lies on a space; ``rows`` axes stand before it."""
        self.tensor(key, *([None] * rows), Axis(space))
        return self._place(Op("embed", output, (), key, hook=hook, space=space))

    def step(
        self,
        kind: OpKind,
        output: str,
        *inputs: str,
        hook: str | None = None,
        space: str | None = None,
        view: str = "",
    ) -> str:
        """An operation without parameters; its space is its first input's where none is given."""
        where = self.where.get(inputs[0])
        named = space if space is not None else (where[0] if where else None)
        seen = view if space is not None or where is None else where[1]
        inner = where[2] if where else 1
        return self._place(Op(kind, output, inputs, hook=hook, space=named, view=seen), inner)

    def flatten(self, source: str, output: str, inner: int) -> str:
        """Positions laid behind each channel."""
        space, view, _ = self.where[source]
        return self._place(Op("flatten", output, (source,), space=space, view=view), inner)

    def build(self) -> AlignmentSpec:
        """The specification."""
        return AlignmentSpec(
            dict(self.spaces),
            dict(self.tensors),
            tuple(self.ops),
            tuple(self.tied),
            tuple(self.copied),
            self.name,
            dict(self.notes),
        )


def hidden(size: int) -> Group:
    """The group of a hidden layer with an element-wise activation."""
    return Full(size)
