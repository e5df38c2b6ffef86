"""Running a model on a caller's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fusion_core.batching import is_out_of_memory
from fusion_core.errors import FusionError
from ot_fusion.errors import DataError

__all__ = ["call_model"]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """What a model returns for inputs: a tensor, or keyword arguments by name.

    Raises:
        DataError: it cannot take them; what the model raised is the cause, but for running out of memory.
    """
    try:
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    except FusionError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        has = ", ".join(f"{key} {tuple(v.shape)}" for key, v in named.items() if isinstance(v, Tensor))
        words = " ".join(str(error).split())[:300]
        raise DataError(f"data do not fit the model, which was given {has}: {words}") from error
