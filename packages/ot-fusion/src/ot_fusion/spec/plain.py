"""Specifications of plain torch models: stacks of layers, and ResNets with batch norm."""

from typing import Any

from torch import nn

from ot_fusion.errors import SpecError
from ot_fusion.groups import Full
from ot_fusion.spec.builder import SpecBuilder
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["resnet_spec", "sequential_spec"]

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish,
    nn.Mish,    nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
)  # fmt: skip


def _keys(model: nn.Module) -> list[str]:
    return list(model.state_dict())


def _steps(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        found += _steps(child, f"{path}.") if isinstance(child, nn.Sequential) else [(path, child)]
    return found


def sequential_spec(model: nn.Sequential) -> AlignmentSpec:
    """The specification of a stack of layers.

    Linear layers, convolutions, norms, activations, pooling, flatten.

    Args:
        model: a ``Sequential``; nested ones are walked through.

    Raises:
        SpecError: a module that is none of these (it is named), a grouped convolution, or a norm over several
            axes.

    Example:
        >>> spec = sequential_spec(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> list(spec.spaces), [op.kind for op in spec.ops]
        (['0'], ['linear', 'elementwise', 'linear'])
    """
    steps = _steps(model)
    builder = SpecBuilder("sequential", _keys(model))
    layers = [name for name, module in steps if isinstance(module, _LINEAR)]
    if not layers:
        raise SpecError("the model has no linear layer or convolution")
    node: str | None = None
    channels = 0
    for number, (name, module) in enumerate(steps):
        if isinstance(module, _LINEAR):
            groups = getattr(module, "groups", 1)
            size = module.weight.shape[0]
            if groups not in (1, size):
                raise SpecError(
                    f"{name} is a convolution in {groups} groups, which this builder does not describe"
                )
            if groups == size and groups > 1 and node is not None:
                node = _depthwise(builder, name, module, node)
                continue
            if isinstance(module, nn.Linear) and node is not None and module.in_features != channels:
                if module.in_features % channels:
                    raise SpecError(
                        f"{name} reads {module.in_features} inputs, which is no multiple of the {channels} "
                        "channels before it"
                    )
                builder.where[node] = (*builder.where[node][:2], module.in_features // channels)
            space = None if name == layers[-1] else builder.space(name, Full(size))
            node = builder.linear(name, node, name, space, kernel=module.weight.ndim - 2)
            channels = size
        elif isinstance(module, _NORM):
            if node is None or node not in builder.where:
                raise SpecError(
                    f"{name} normalises an axis that is fixed, which this builder does not describe"
                )
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                raise SpecError(f"{name} normalises several axes at once, which mixes positions and channels")
            node = builder.norm(name, node, name, buffers=not isinstance(module, nn.LayerNorm))
        elif isinstance(module, nn.Flatten):
            continue
        elif isinstance(module, _POINTWISE):
            if node is not None and node in builder.where:
                node = builder.step("elementwise", f"{name}.{number}", node)
        else:
            raise SpecError(
                f"{name} is {type(module).__name__}, which this builder does not describe; use infer_spec"
            )
    return builder.build()


def _depthwise(builder: SpecBuilder, name: str, module: Any, node: str) -> str:
    from ot_fusion.spec.types import Axis, Op

    space, view, _ = builder.where[node]
    builder.tensor(f"{name}.weight", Axis(space, view), None, *([None] * (module.weight.ndim - 2)))
    bias = f"{name}.bias" if module.bias is not None else None
    if bias:
        builder.tensor(bias, Axis(space, view))
    builder.ops.append(Op("norm", name, (node,), f"{name}.weight", bias, space=space, view=view))
    builder.where[name] = builder.where[node]
    return name


def resnet_spec(model: nn.Module) -> AlignmentSpec:
    """The specification of a ResNet with the module names of torchvision: ``conv1 bn1 layer1 .. layer4 fc``.

    One space for each stage (all block outputs and shortcuts of it) and one inside each block for each
    convolution.

    Args:
        model: basic or bottleneck blocks; shortcuts named ``downsample`` or ``shortcut``; the head ``fc`` or
            ``linear``.

    Raises:
        SpecError: a module that has another structure.
    """
    parts = dict(model.named_children())
    head = next((name for name in ("fc", "linear") if name in parts), None)
    stages = [name for name in parts if name.startswith("layer")]
    if "conv1" not in parts or head is None or not stages:
        raise SpecError(f"{type(model).__name__} has no conv1, layer1 and fc; use infer_spec")
    builder = SpecBuilder("resnet", _keys(model))
    stem: Any = parts["conv1"]
    space = builder.space("stem", Full(stem.weight.shape[0]))
    node = builder.linear("conv1", None, "conv1", space, kernel=2)
    if "bn1" in parts:
        node = builder.norm("bn1", node, "bn1", buffers=True)
    node = builder.step("elementwise", "stem", node)
    for stage in stages:
        for number, block in parts[stage].named_children():
            node = _block(builder, f"{stage}.{number}", block, node)
    node = builder.step("elementwise", "pool", node)
    builder.linear(head, node, "logits", None)
    return builder.build()


def _block(builder: SpecBuilder, path: str, block: nn.Module, node: str) -> str:
    inner: dict[str, Any] = dict(block.named_children())
    convs = [name for name in ("conv1", "conv2", "conv3") if name in inner]
    short = next(
        (n for n in ("downsample", "shortcut") if n in inner and len(list(inner[n].children()))), None
    )
    if not convs or any(inner[name].groups != 1 for name in convs):
        raise SpecError(f"{path} has no convolutions conv1, conv2, or grouped ones; use infer_spec")
    entry = builder.where[node][0]
    exit_space = (
        entry
        if short is None
        else builder.space(
            path.rpartition(".")[0] if path.endswith(".0") else path, Full(inner[convs[-1]].weight.shape[0])
        )
    )
    branch = node
    for place, name in enumerate(convs):
        last = place == len(convs) - 1
        space = exit_space if last else builder.space(f"{path}.{name}", Full(inner[name].weight.shape[0]))
        branch = builder.linear(f"{path}.{name}", branch, f"{path}.{name}", space, kernel=2)
        if f"bn{place + 1}" in inner:
            branch = builder.norm(f"{path}.bn{place + 1}", branch, f"{path}.bn{place + 1}", buffers=True)
        if not last:
            branch = builder.step("elementwise", f"{path}.act{place + 1}", branch)
    skip = node
    if short is not None:
        children = [name for name, _ in inner[short].named_children()]
        skip = builder.linear(f"{path}.{short}.{children[0]}", node, f"{path}.shortcut", exit_space, kernel=2)
        if len(children) > 1:
            name = f"{path}.{short}.{children[1]}"
            skip = builder.norm(name, skip, f"{path}.bn_shortcut", buffers=True)
    node = builder.step("add", f"{path}.sum", skip, branch)
    return builder.step("elementwise", f"{path}.out", node)
