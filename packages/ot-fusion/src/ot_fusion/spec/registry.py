"""Which specification belongs to which model."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ot_fusion.errors import SpecError
from ot_fusion.spec.decoders import gpt2_spec, llama_spec
from ot_fusion.spec.encoders import bert_spec, distilbert_spec
from ot_fusion.spec.plain import resnet_spec, sequential_spec
from ot_fusion.spec.types import AlignmentSpec
from ot_fusion.spec.vit import vit_spec

__all__ = ["MODEL_TYPES", "spec_for"]

Builder = Callable[[Any, Sequence[str]], AlignmentSpec]
MODEL_TYPES: dict[str, Builder] = {
    "bert": bert_spec,
    "deit": vit_spec,
    "distilbert": distilbert_spec,
    "gemma": llama_spec,
    "gpt2": gpt2_spec,
    "llama": llama_spec,
    "mistral": llama_spec,
    "qwen2": llama_spec,
    "qwen3": llama_spec,
    "roberta": bert_spec,
    "vit": vit_spec,
}


def spec_for(model: Any, keys: Sequence[str] | None = None) -> AlignmentSpec:
    """The specification that is written for an architecture.

    Args:
        model: a module; or a Hugging Face configuration, with ``keys``.
        keys: names of the model's tensors, where only the configuration is at hand.

    Raises:
        SpecError: there is none; ``infer_spec(model, example_inputs)`` derives one.

    Example:
        >>> spec_for(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).name
        'sequential'
    """
    config = getattr(model, "config", model)
    kind = getattr(config, "model_type", None)
    if kind in MODEL_TYPES:
        names = (
            keys if keys is not None else (list(model.state_dict()) if isinstance(model, nn.Module) else None)
        )
        if names is None:
            raise SpecError(f"the configuration of {kind} alone does not tell the tensors; give keys")
        return MODEL_TYPES[kind](config, names)
    if isinstance(model, nn.Sequential):
        return sequential_spec(model)
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    if "conv1" in children and any(name.startswith("layer") for name in children):
        return resnet_spec(model)
    what = kind or type(model).__name__
    raise SpecError(
        f"there is no written spec for {what} (there are sequential, resnet, "
        f"{', '.join(sorted(MODEL_TYPES))}); "
        "derive one by ot_fusion.spec.infer_spec(model, example_inputs)"
    )
