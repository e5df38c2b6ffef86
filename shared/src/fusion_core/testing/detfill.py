"""Arrays that follow from a name: equal on every machine, so golden cases need no file of weights.

A recorded case that says "detfill" set every entry of the model's state dict with
:func:`fill_state_dict` and drew its inputs with :func:`array`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


def array(name: str, shape: Sequence[int], scale: float = 1.0, shift: float = 0.0) -> NDArray[np.float64]:
    """Normal numbers that follow from a name.

    Args:
        name: its CRC-32 seeds the PCG64 stream.
        shape: of the result; ``()`` gives a 0-d array.
        scale: standard deviation.
        shift: mean, added after scaling.

    Returns:
        float64 array of that shape.

    Example:
        >>> array("x", (2,)).round(3).tolist()
        [-0.907, -0.428]
    """
    stream = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    drawn = np.asarray(stream.standard_normal(tuple(shape)))
    drawn *= scale  # in place: a large network has hundreds of millions of these
    drawn += shift
    return drawn


def parameter(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """The value of the state-dict entry called ``name``.

    The last word of the name decides: counters are 0, running variances lie above 1, biases and running
    means near 0, other vectors near 1, and weights have the standard deviation 1/sqrt(fan in).

    Returns:
        float64 array of that shape.

    Example:
        >>> float(parameter("bn.num_batches_tracked", ()))
        0.0
    """
    match name.rpartition(".")[2]:
        case "num_batches_tracked":
            return np.zeros(tuple(shape))
        case "running_var":
            return 1.0 + 0.1 * np.abs(array(name, shape))
        case "running_mean" | "bias":
            return array(name, shape, 0.1)
        case _ if len(shape) < 2:
            return array(name, shape, 0.1, 1.0)
        case _:
            return array(name, shape, (math.prod(shape[1:]) or 1) ** -0.5)


def fill_state_dict(module: nn.Module) -> None:
    """Overwrite every entry of a module's state dict, in place, with :func:`parameter` of its own key.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1)
        >>> fill_state_dict(layer)
        >>> abs(layer.bias.item() - parameter("bias", (1,)).item()) < 1e-7
        True
    """
    import torch

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(torch.from_numpy(parameter(name, tensor.shape)).to(tensor.dtype))
