"""Modules as ONNX files that carry their settings (extra ``onnx``)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import CheckpointError, FusionError, InputError, require_extra

METADATA_KEY = "fusion"
"""Under this key of the model's metadata :func:`export_onnx` writes its ``metadata`` as JSON."""


def export_onnx(
    module: nn.Module,
    args: Sequence[Tensor],
    path: PathLike,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: Mapping[str, Mapping[int, Any]] | None = None,
    opset: int = 20,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a module as one ONNX file, by torch's dynamo exporter; the file appears whole or not at all.

    Args:
        module: in eval mode; it is traced with ``args``.
        args: example inputs.
        path: the file.
        input_names: one for each input.
        output_names: one for each output.
        dynamic: input name -> {dimension: a name or ``torch.export.Dim``}; the other sizes are fixed.
        opset: the ONNX operator set.
        metadata: what JSON can say, stored in the file under the key ``fusion``; see :func:`read_metadata`.

    Returns:
        The path.

    Raises:
        InputError: the module is in training mode, the names do not fit, or ``metadata`` is no JSON.
        FusionError: the exporter cannot express the module; its own words are in the message.
    """
    require_extra("onnxscript", "onnx", "fusion-core")
    onnx = require_extra("onnx", "onnx", "fusion-core")
    if module.training:
        raise InputError("module is in training mode; call .eval() before it is exported")
    if len(input_names) != len(args):
        raise InputError(f"input_names has {len(input_names)} names for {len(args)} args")
    unknown = sorted(set(dynamic or {}) - set(input_names))
    if unknown:
        raise InputError(f"dynamic names {unknown}, which are not among the inputs {list(input_names)}")
    try:
        text = json.dumps(dict(metadata or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata takes what JSON can say: {error}") from error
    shapes = None if dynamic is None else tuple(dict(dynamic.get(name, {})) for name in input_names)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tuple(args),
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise FusionError(f"this module cannot be exported to ONNX: {_first_line(error)}") from error
    finally:
        logger.setLevel(level)
    if program is None:
        raise FusionError("this module cannot be exported to ONNX: the exporter returned nothing")
    model = program.model_proto
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    with atomic_write(path) as file:
        file.write(model.SerializeToString())
    return Path(path)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def read_metadata(path: PathLike) -> dict[str, Any]:
    """The settings that :func:`export_onnx` wrote into a file.

    Raises:
        CheckpointError: no ONNX file, or one without such settings.
    """
    onnx = require_extra("onnx", "onnx", "fusion-core")
    try:
        props = onnx.load(str(path), load_external_data=False).metadata_props
        return json.loads({entry.key: entry.value for entry in props}[METADATA_KEY])
    except KeyError as error:
        raise CheckpointError(f"{path} holds no settings under {METADATA_KEY!r}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is no ONNX file that can be read: {_first_line(error)}") from error


def onnx_difference(path: PathLike, module: nn.Module, args: Sequence[Tensor]) -> float:
    """The largest absolute difference between a file run by onnxruntime on the CPU and the module itself.

    Args:
        path: a file of :func:`export_onnx`.
        module: the module that it was made of.
        args: inputs, in the file's order; sizes may differ from those of the export where it is dynamic.

    Returns:
        The maximum over all outputs; infinity where one is not finite in only one of the two.
    """
    runtime = require_extra("onnxruntime", "onnx", "fusion-core")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {node.name: arg.cpu().numpy() for node, arg in zip(session.get_inputs(), args, strict=True)}
    theirs = session.run(None, feed)
    with torch.no_grad():
        ours = module(*args)
    several = [ours] if isinstance(ours, Tensor) else list(ours)
    worst = 0.0
    for a, b in zip(several, theirs, strict=True):
        left, right = a.double().cpu().numpy(), np.asarray(b, np.float64)
        if left.shape != right.shape:
            raise FusionError(f"an output has shape {right.shape} in {path}, {left.shape} in the module")
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.nan_to_num(np.abs(left - right), nan=np.inf))
        worst = max(worst, float(apart.max(initial=0.0)))
    return worst
