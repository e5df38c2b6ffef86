"""Proof of a specification by numbers: random legal relabellings must not change what the model says.

Source: ours; it finds a mistyped specification in a second.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.modules import untouched
from fusion_core.seeding import generator
from ot_fusion.errors import SpecError
from ot_fusion.forward import call_model
from ot_fusion.relabel import check_states, relabel
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["Verification", "outputs_of", "relabelled_model", "verify_spec"]


class Verification(dict[str, float]):
    """Largest relative change of the outputs by space, ``"all"`` for all spaces at once."""

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.values())


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns for some inputs: its logits where it names them."""
    found = call_model(model, inputs)
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    parts: Any = found if isinstance(found, tuple | list) else [found]
    parts = parts.values() if isinstance(parts, Mapping) else parts
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    if not tensors and isinstance(found, Mapping):
        tensors = [part for part in found.values() if isinstance(part, Tensor)]
    return tensors


def relabelled_model(
    model: nn.Module, spec: AlignmentSpec, elements: Mapping[str, Mapping[str, Tensor]]
) -> nn.Module:
    """A copy of a model with its neurons in another order."""
    changed = copy.deepcopy(model)
    state = relabel(model.state_dict(), spec, elements)
    tied = {key: group[0] for group in spec.tied for key in group}
    changed.load_state_dict({key: state.get(tied.get(key, key), value) for key, value in state.items()})
    return changed


def verify_spec(
    model: nn.Module,
    spec: AlignmentSpec,
    example_inputs: Any,
    *,
    trials: int = 2,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Verification:
    """Prove a specification: relabel each space, then all at once, at random, and compare outputs.

    The work is done on a copy in float64, so that the differences of a right specification are rounding.

    Args:
        model: any module; it comes back untouched.
        spec: of it.
        example_inputs: a tensor or keyword arguments.
        trials: random relabellings of all spaces at once.
        tolerance: largest change of an output, relative to the largest output.
        seed: of the draws.

    Returns:
        The changes by space.

    Raises:
        SpecError: an output changes; the spaces that change it and their tensors are named. Also where the
            spec does not cover the model.

    Example:
        >>> from ot_fusion.spec.plain import sequential_spec
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> verify_spec(net, sequential_spec(net), torch.randn(3, 4)).worst < 1e-12
        True
    """
    with untouched(model, rng=True), torch.no_grad():
        exact = copy.deepcopy(model).double().eval()
    inputs = _double(example_inputs)
    check_states(spec, exact.state_dict())
    draws = generator(seed, "verify")
    with torch.no_grad():
        before = outputs_of(exact, inputs)
        if not before:
            raise SpecError("the model returns no tensor of floating-point numbers to compare")
        size = max(float(part.abs().max()) for part in before) or 1.0

        def change(elements: Mapping[str, Mapping[str, Tensor]]) -> float:
            after = outputs_of(relabelled_model(exact, spec, elements), inputs)
            return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) / size

        found = Verification(
            {name: change({name: space.group.random(draws)}) for name, space in spec.spaces.items()}
        )
        found["all"] = max(
            change({name: space.group.random(draws) for name, space in spec.spaces.items()})
            for _ in range(trials)
        )
    wrong = {name: value for name, value in found.items() if not value <= tolerance}
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        names = [name for name in wrong if name != "all"] or ["all"]
        keys = [
            key for key, tensor in spec.tensors.items() if any(name in str(tensor.axes) for name in names[:1])
        ]
        raise SpecError(
            f"relabelling {', '.join(names)} changes the outputs by {wrong[worst]:.3g} of their size; the "
            "spec declares "
            f"these tensors on {names[0]}: {', '.join(keys) or 'none'}"
        )
    return found


def _double(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _double(value) for key, value in inputs.items()}
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
