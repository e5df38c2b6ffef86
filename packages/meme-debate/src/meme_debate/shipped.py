"""The trained judges of the quick demo that ship with the package: one file a seed, in half precision.

``python -m meme_debate.train_checkpoints`` makes them; ``checkpoints/MODEL_CARD.md`` says what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import CheckpointError

from .judge import Fusion, Judge
from .tokens import vocabulary_tokenizer

FOLDER = Path(__file__).parent / "checkpoints"
_TOWER = "image_transformer."
_SPECIAL = 3  # tokens before the words


def checkpoint(seed: int) -> Path:
    """Where a seed's judges are, or would be."""
    return FOLDER / f"stand-in-{seed}.safetensors"


def save_judges(judges: Mapping[Fusion, Judge], path: Path) -> None:
    """Write judges that share vision tower and words: the tower once, tied weights once, float16.

    Args:
        judges: by their fusion.
        path: of the file.
    """
    state: dict[str, Tensor] = {}
    for fusion, judge in judges.items():
        seen: set[int] = set()
        for key, value in judge.state_dict().items():
            name = key if key.startswith(_TOWER) else f"{fusion}.{key}"
            if value.data_ptr() not in seen and name not in state:
                state[name] = value.detach().to(torch.float16, copy=True)
            seen.add(value.data_ptr())
    numbers: dict[str, int] = next(iter(judges.values())).tokenizer.get_vocab()
    words = sorted((word for word in numbers if numbers[word] >= _SPECIAL), key=numbers.__getitem__)
    save_tensors(path, state, {"words": json.dumps(words)})


def shipped_tokenizer(path: Path) -> Any:
    """The tokenizer of a file's judges; its words are in the file, as their numbers belong to the weights.

    Raises:
        CheckpointError: the file has none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            words = json.loads(file.metadata()["words"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} holds no judges of the demo: {error}") from error
    return vocabulary_tokenizer(words)


def load_judges(judges: Mapping[Fusion, Judge], path: Path) -> None:
    """Fill judges of the same shapes with what :func:`save_judges` wrote.

    Raises:
        CheckpointError: a weight is missing or there is one too many.
    """
    state = {key: value.float() for key, value in load_tensors(path).items()}
    for fusion, judge in judges.items():
        mine = {key: value for key, value in state.items() if key.startswith(_TOWER)}
        mine |= {key.removeprefix(f"{fusion}."): state[key] for key in state if key.startswith(f"{fusion}.")}
        own = judge.state_dict()
        filled = {own[key].data_ptr() for key in mine if key in own}
        lost = [key for key, value in own.items() if key not in mine and value.data_ptr() not in filled]
        if lost or not mine.keys() <= own.keys():
            wrong = lost or sorted(mine.keys() - own.keys())
            raise CheckpointError(f"{path.name} does not fit the {fusion} judge: {', '.join(wrong[:5])}")
        judge.load_state_dict(mine, strict=False)
        judge.image_transformer.requires_grad_(False)
        judge.eval()
