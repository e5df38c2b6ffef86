"""A fusion on disk: ``fusion.json``, and a folder per member whose weights no name leads to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_core.atomic import atomic_directory
from fusion_core.errors import InputError
from logit_fusion.config import CONFIG_NAME, FusionConfig, MemberConfig, ViewConfig
from logit_fusion.member import BASE_ROWS, Expert, Member

__all__ = ["load_folder", "save_folder"]


def save_folder(
    members: Sequence[Member],
    settings: FusionConfig,
    out: str | os.PathLike[str],
    weights: bool | None,
    tokenizer: Any,
) -> None:
    """Write a fusion; it appears whole or not at all.

    Args:
        members: large, base, experts.
        settings: of the fusion.
        out: a new or empty folder.
        weights: True writes every member, False none, None those from memory.
        tokenizer: of the large model, written beside its weights.

    Raises:
        InputError: the folder is not empty, ``weights=False`` with a member from memory.
    """
    written: dict[int, str] = {}
    places: dict[str, MemberConfig] = {}
    with atomic_directory(out) as folder:
        for member in members:
            keep = weights if weights is not None else member.source is None
            if not keep:
                if member.source is None:
                    raise InputError(f"weights is False, but member {member.name!r} came from memory")
                places[member.name] = member.source
                continue
            adapter = None
            module = member.module
            peft = hasattr(module, "peft_config")
            if peft and member.adapter not in (None, BASE_ROWS):
                module.save_pretrained(folder / "adapters", selected_adapters=[member.adapter])
                adapter = f"adapters/{member.adapter}"
            if id(module) not in written:
                written[id(module)] = member.name
                _save_weights(module, folder / member.name)
                own = tokenizer if member.name == "large" and tokenizer is not None else member.tokenizer
                if own is not None:
                    own.save_pretrained(folder / member.name)
            kind = str(next(module.parameters()).dtype).removeprefix("torch.")
            places[member.name] = MemberConfig(written[id(module)], adapter, kind)
        views = {member.name: member.view for member in members if member.view is not None}
        large, base, *experts = (places[member.name] for member in members)
        names = [member.name for member in members[2:]]
        found = settings.replace(
            large=large, base=base, experts=dict(zip(names, experts, strict=True)), views=views
        )
        found.save(folder / CONFIG_NAME)


def _save_weights(module: Any, folder: Path) -> None:
    if not hasattr(module, "peft_config"):
        module.save_pretrained(folder)
        return
    inner = module.get_base_model()
    # The adapters' layers hold the base's weights under longer names.
    state = {
        key.replace(".base_layer", ""): value
        for key, value in inner.state_dict().items()
        if "lora_" not in key
    }
    inner.save_pretrained(folder, state_dict=state)


def load_folder(folder: Path) -> tuple[FusionConfig, dict[str, Expert]]:
    """The settings and members of a folder that :func:`save_folder` wrote.

    Raises:
        InputError: ``fusion.json`` names no members.
        ConfigError: it cannot be read.
    """
    settings = FusionConfig.load(folder / CONFIG_NAME)
    if settings.large is None or settings.base is None or not settings.experts:
        raise InputError(f"{folder / CONFIG_NAME} names no large model, base and experts")
    named = {"large": settings.large, "base": settings.base, **settings.experts}
    return settings, {
        name: _expert(place, folder, settings.views.get(name, ViewConfig())) for name, place in named.items()
    }


def _expert(place: MemberConfig, folder: Path, view: ViewConfig) -> Expert:
    def found(text: str) -> str:
        return str(folder / text) if (folder / text).exists() else text

    return Expert(
        found(place.source),
        None if place.adapter is None else found(place.adapter),
        view.prefix,
        view.suffix,
        view.chat,
        view.system,
        None if place.dtype == "auto" else place.dtype,
        None if place.device == "auto" else place.device,
    )
