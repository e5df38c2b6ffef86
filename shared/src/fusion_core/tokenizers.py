"""Tokenizers of transformers, which the packages that use them bring."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LARGEST_ID = 2**31 - 1


def load_tokenizer(source: str | os.PathLike[str], **options: Any) -> Any:
    """The tokenizer of a folder or of a name on the hub, looked through for what fails only in use.

    Args:
        source: what ``from_pretrained`` takes.
        **options: of ``AutoTokenizer.from_pretrained``.

    Raises:
        Exception: what transformers raises where there is none, or a damaged one; ValueError for ids beyond
            int32, a length that is no number, and a template without the text or of unknown tokens.
            :func:`fusion_core.errors.reading` around it names the folder.
    """
    from transformers import AutoTokenizer

    file = Path(source) / "tokenizer.json"
    if file.is_file():
        _check(json.loads(file.read_bytes()))
    found: Any = AutoTokenizer.from_pretrained(source, **options)
    if not isinstance(found.model_max_length, int | float):
        raise ValueError(f"model_max_length is {found.model_max_length!r}, wanted a number")
    for name in ("unk", "bos", "eos", "pad"):
        _ = getattr(found, f"{name}_token_id")  # a name that is no token, such as "", has no end there
    return found


def _check(found: Any) -> None:
    words = found["model"].get("vocab")
    ids = [*(words.values() if isinstance(words, dict) else ())]
    ids += [entry["id"] for entry in found.get("added_tokens") or ()]
    if (largest := max((value for value in ids if isinstance(value, int)), default=0)) > _LARGEST_ID:
        raise ValueError(f"it gives a token the id {largest}, wanted at most {_LARGEST_ID}")
    for template in _templates(found.get("post_processor")):
        pieces = template["single"] + template["pair"]
        wanted = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        if lacking := sorted(wanted - set(template["special_tokens"])):
            raise ValueError(f"its template holds {lacking[0]!r}, which is not among its special_tokens")
        if not any("Sequence" in piece for piece in template["single"]):
            raise ValueError("its template leaves the text out")


def _templates(processor: Any) -> Iterator[dict[str, Any]]:
    if processor and processor["type"] == "TemplateProcessing":
        yield processor
    for part in processor.get("processors", ()) if processor else ():
        yield from _templates(part)
