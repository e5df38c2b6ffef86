"""Are these members fit for a fusion? Read from tokenizers and configurations, without any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion_core.errors import CheckpointError, InputError, reading
from fusion_core.report import Report
from logit_fusion.config import CONFIG_NAME
from logit_fusion.member import load_tokenizer
from logit_fusion.vocab import check_vocabulary

__all__ = ["check_members"]


def check_members(large: str, base: str | None, experts: dict[str, Any], *, align: str = "id") -> Report:
    """A table of the members: tokens, widths, family.

    Args:
        large: folder or hub name, or a folder with ``fusion.json``.
        base: the same of the small base.
        experts: by name, :class:`Expert`.
        align: ``"id"`` or ``"string"``.

    Raises:
        InputError: no base or experts, or another ``align``.
        CheckpointError: a member cannot be read.
        VocabularyMismatchError: the vocabularies differ.
    """
    from transformers import AutoConfig

    from logit_fusion.saving import load_folder

    if align not in ("id", "string"):
        raise InputError(f"--align is {align!r}, wanted id or string")
    if base is None:
        if not (Path(large) / CONFIG_NAME).is_file():
            raise InputError(f"--base is missing, and {large} holds no {CONFIG_NAME}")
        named = {name: member.source for name, member in load_folder(Path(large))[1].items()}
    else:
        named = {"large": large, "base": base, **{name: x.source or base for name, x in experts.items()}}
    if len(named) < 3:
        raise InputError("--expert is missing: name=path, once for each")
    configs: dict[str, Any] = {}
    for name, source in named.items():
        with reading(f"member {name!r}: {source}", error=CheckpointError):
            configs[name] = AutoConfig.from_pretrained(source).get_text_config(decoder=True)
    tokenizers = {name: load_tokenizer(source, name) for name, source in named.items()}
    widths = {name: int(config.vocab_size) for name, config in configs.items()}
    found = check_vocabulary(tokenizers, widths, align=align)  # pyright: ignore[reportArgumentType]
    rows: list[dict[str, Any]] = []
    for row in found.rows:
        config = configs[row["member"]]
        shape = f"{config.model_type} {config.hidden_size} x {config.num_hidden_layers}"
        like_base = [
            getattr(config, key, None) == getattr(configs["base"], key, None)
            for key in ("model_type", "hidden_size", "num_hidden_layers")
        ]
        rows.append(
            {**row, "model": shape, "longest": getattr(config, "max_position_embeddings", None)}
            | ({} if row["member"] == "large" else {"pairs with base": all(like_base)})
        )
    return Report(title=f"{found.size} shared tokens", rows=rows)
