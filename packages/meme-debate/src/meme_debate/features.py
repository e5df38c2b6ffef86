"""States of the frozen tower, computed once a picture and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.batching import map_batches
from fusion_core.checkpoint import digest, digest_state
from fusion_core.store import ShardStore

from .encoding import stack_pixels
from .judge import Judge
from .pictures import picture_digest

__all__ = ["Features", "image_features"]

KIND = "meme-debate image features"


class Features:
    """States of the pictures of memes: ``features[rows]`` gives (len(rows), P + 1, Dv).

    Args:
        states: (U, P + 1, Dv) of the distinct pictures, or a store of them.
        place: (N,) which picture each meme has.
    """

    def __init__(self, states: NDArray[np.float32] | ShardStore, place: NDArray[np.int64]) -> None:
        self.states, self.place = states, place

    def __len__(self) -> int:
        return len(self.place)

    def part(self, rows: Sequence[int]) -> Features:
        """The states of some memes' pictures, not copied."""
        return Features(self.states, self.place[np.asarray(rows, np.int64)])

    def __getitem__(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        wanted = self.place[np.asarray(rows, np.int64)]
        if isinstance(self.states, ShardStore):
            return torch.from_numpy(self.states[wanted]["states"])
        return torch.from_numpy(self.states[wanted])


def image_features(
    judge: Judge,
    images: Sequence[Any],
    folder: str | Path | None = None,
    *,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Features:
    """The tower's states of pictures, each distinct one computed once.

    Args:
        judge: its tower and its settings make the states.
        images: N pictures, as :func:`fusion_core.images.read_image` takes them; None = no picture (plain
            gray).
        folder: a store on disk, made or used again; None keeps the states in memory.
        batch_size: pictures a forward pass.
        progress: True shows a bar.

    Raises:
        StoreError: the store there is of another tower, other preprocessing or other pictures; named.
        InputError: a picture cannot be read.
    """
    names = [picture_digest(image) for image in images]
    distinct = list(dict.fromkeys(names))
    source = dict(zip(names, images, strict=True))
    number = {name: i for i, name in enumerate(distinct)}
    place = np.array([number[name] for name in names], np.int64)
    config = judge.vision_config
    side, width = int(config.image_size), int(config.hidden_size)
    patches = (side // int(config.patch_size)) ** 2 + 1
    weight = next(judge.image_transformer.parameters())

    @torch.no_grad()
    def states(part: Sequence[str]) -> NDArray[np.float32]:
        pixels = stack_pixels([source[name] for name in part], side, judge.settings.normalize)
        found = judge.image_states(pixels.to(weight.device, weight.dtype))
        return found.float().cpu().numpy()

    if folder is None:
        made = list(map_batches(states, distinct, batch_size, progress=progress))
        return Features(np.concatenate(made) if made else np.zeros((0, patches, width), np.float32), place)
    fingerprint = {
        "tower": digest_state(judge.image_transformer.state_dict()),
        "preprocessing": {"size": side, "normalize": judge.settings.normalize, "resize": "bicubic"},
        "images": digest(distinct),
    }
    store = ShardStore.create(folder, fingerprint, {"states": ("float32", (patches, width))}, kind=KIND)
    for start, stop in store.missing(len(distinct)):
        at = start
        for found in map_batches(states, distinct[start:stop], batch_size, progress=progress):
            store.append({"states": found}, (at, at + len(found)))
            at += len(found)
    if distinct:
        store.finish(len(distinct))
    return Features(store, place)
