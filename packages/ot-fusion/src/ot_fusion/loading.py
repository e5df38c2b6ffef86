"""Models and data by words on a command line: folders, ``module:function``, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.checkpoint import check_config, load_tensors
from fusion_core.errors import check_finite, naming, reading, require_extra
from fusion_core.modules import load_object
from fusion_core.tokenizers import load_tokenizer
from ot_fusion.errors import DataError, InputError

_IGNORED = -100  # torch's own word for a label that does not count
__all__ = ["load_data", "load_evaluation", "load_model", "split_labels"]


def load_model(
    word: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """A model by its word.

    Args:
        word: a Hugging Face folder, or ``module:function`` whose result is a module.
        device: where it goes.
        dtype: of its parameters; None keeps what is stored.

    Raises:
        InputError: neither, or a folder whose class transformers does not have.
        NonFiniteError: weights of a folder that are NaN or infinite.
        MissingExtraError: transformers is not installed.
    """
    place = Path(word)
    if place.is_dir():
        model = _folder(place)
        with naming(place):
            for name, value in model.named_parameters():
                check_finite(name, value)
    elif ":" in word:
        found = load_object(word)
        model = found() if callable(found) and not isinstance(found, nn.Module) else found
        if not isinstance(model, nn.Module):
            raise InputError(f"{word} gives {type(model).__name__}, wanted a module")
    else:
        raise InputError(f"{word} is no folder of a model and no module:function")
    return model.to(device=device, dtype=dtype).eval()


def _folder(place: Path) -> nn.Module:
    with reading(place, "has no readable config.json; give the folder of a Hugging Face model"):
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or []]
    transformers = require_extra("transformers", "hf", "ot-fusion")
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise InputError(
            f"{place} has the architecture {names}, which transformers {transformers.__version__} has not"
        )
    log = transformers.utils.logging
    bars = log.is_progress_bar_enabled()
    try:
        log.disable_progress_bar()  # a command's stderr has one line on bad input
        with reading(place, "cannot be loaded"):
            check_config(place)
            return kind.from_pretrained(place, local_files_only=True)
    finally:
        if bars:
            log.enable_progress_bar()


def load_data(word: str, *, tokenizer: str | None = None, length: int = 128) -> Any:
    """Inputs by their word.

    Args:
        word: ``.npy`` (one array), ``.npz`` or ``.safetensors`` (keyword arguments by name; one array called
            ``inputs`` or ``x`` is given by position), ``.txt`` (one text a line, by the tokenizer of a
            folder), or ``module:function`` whose result is data.
        tokenizer: folder of a tokenizer, for texts.
        length: most tokens of a text.

    Raises:
        DataError: a file that cannot be read.
    """
    place = Path(word)
    if not place.exists() and ":" in word:
        found = load_object(word)
        return found() if callable(found) else found
    with reading(word, error=DataError):
        if place.suffix == ".npy":
            return _real({"it": torch.from_numpy(np.load(place, allow_pickle=False))})["it"]
        if place.suffix == ".npz":
            with np.load(place, allow_pickle=False) as arrays:
                return _one_or_all(_real({key: torch.from_numpy(arrays[key]) for key in arrays.files}))
        if place.suffix == ".safetensors":
            return _one_or_all(_real(dict(load_tensors(place))))
        if place.suffix == ".txt":
            return _texts(place, tokenizer, length)
    raise DataError(f"{word} is no .npy, .npz, .safetensors or .txt file and no module:function")


def _real(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for key, value in tensors.items():
        if value.is_complex():
            raise DataError(f"{key} holds complex numbers, which no model here takes")
    return tensors


def _one_or_all(tensors: dict[str, Tensor]) -> Any:
    named = {key: value for key, value in tensors.items() if key not in ("inputs", "x")}
    alone = [value for key, value in tensors.items() if key in ("inputs", "x")]
    if alone and set(named) <= {"labels", "y"}:
        return {"inputs": alone[0], **named} if named else alone[0]
    return tensors


def _texts(place: Path, tokenizer: str | None, length: int) -> dict[str, Tensor]:
    if tokenizer is None:
        raise DataError(f"{place} holds texts, which need the tokenizer of a model's folder")
    require_extra("transformers", "hf", "ot-fusion")
    with reading(tokenizer, "has no tokenizer", DataError):
        tokens = load_tokenizer(tokenizer, local_files_only=True)
    if tokens.pad_token is None:
        tokens.pad_token = tokens.eos_token
    lines = [line for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{place} holds no text")
    found = tokens(lines, return_tensors="pt", padding=True, truncation=True, max_length=length)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def split_labels(data: Any) -> tuple[Any, Tensor | None]:
    """Inputs without labels, and the labels of ``labels`` or ``y``."""
    if not isinstance(data, dict):
        return data, None
    labels = next((data[key] for key in ("labels", "y") if key in data), None)
    rest = {key: value for key, value in data.items() if key not in ("labels", "y")}
    return (rest["inputs"] if set(rest) == {"inputs"} else rest), labels


def load_evaluation(word: str | None, data: Any) -> tuple[Any, str]:
    """What to measure along a line: ``module:function`` of a model, or the loss on data with labels.

    Returns:
        The function, and its label.

    Raises:
        InputError: neither.
    """
    if word is not None:
        return load_object(word), word
    inputs, labels = split_labels(data)
    if labels is None:
        raise InputError("give --evaluate module:function, or --data with labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise DataError(f"labels are {labels.dtype}, wanted class indices of an integer type")
    classes = labels.long()

    def loss(model: nn.Module) -> float:
        from ot_fusion.spec.verify import outputs_of

        logits = outputs_of(model, inputs)[0]
        rows, outputs = logits[..., 0].numel(), logits.shape[-1]
        if classes.numel() != rows:
            raise DataError(f"labels are {classes.numel()} classes, wanted {rows}: one for each output")
        wrong = classes[(classes != _IGNORED) & ((classes < 0) | (classes >= outputs))]
        if len(wrong):
            raise DataError(f"labels hold {int(wrong[0])}, wanted 0 to {outputs - 1} ({_IGNORED}: left out)")
        return float(nn.functional.cross_entropy(logits.flatten(0, -2).float(), classes.flatten()))

    return loss, "cross-entropy"
