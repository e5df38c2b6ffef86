"""Networks as folders and on the Hugging Face hub (extra ``hub``): how several packages keep their models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from fusion_core.errors import CheckpointError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_model(model: Any, folder: str | os.PathLike[str], options: dict[str, Any]) -> str | None:
    """What ``save_pretrained`` does beside writing the weights: the card, and the way to the hub.

    Args:
        model: a ``PyTorchModelHubMixin`` whose ``_save_pretrained`` writes each file whole or not at all.
        folder: made if it is not there.
        options: ``push_to_hub`` and what it takes, ``model_card_kwargs``; as in huggingface_hub.

    Returns:
        The hub's address, where the model was pushed.
    """
    place, left = Path(folder), dict(options)
    model._save_pretrained(place)
    card, words = place / "README.md", left.pop("model_card_kwargs", None) or {}
    if not card.exists():
        model.generate_model_card(**words).save(card)
    if left.pop("push_to_hub", False):
        left.pop("config", None)
        return model.push_to_hub(repo_id=left.pop("repo_id", None) or place.name, **left)
    return None


def model_file(name: str | os.PathLike[str], file: str, **options: Any) -> Path:
    """A file of a model: in its folder, or from the hub.

    Args:
        name: a folder, or ``owner/name`` on the hub.
        file: such as :data:`WEIGHTS`.
        **options: of ``hf_hub_download``: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` ...

    Raises:
        CheckpointError: neither has it.
    """
    text = os.fspath(name)
    if Path(text).is_dir():
        return Path(text) / file
    try:
        return Path(hf_hub_download(text, file, **options))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{text!r} is neither a folder with {CONFIG} and {WEIGHTS} nor a model that the hub gives out "
            f"({reason})"
        ) from error
