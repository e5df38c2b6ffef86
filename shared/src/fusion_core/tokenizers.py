"""Tokenizers of transformers, which the packages that use them bring."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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

    found: Any = AutoTokenizer.from_pretrained(source, **options)
    if not isinstance(found.model_max_length, int | float):
        raise ValueError(f"model_max_length is {found.model_max_length!r}, wanted a number")
    if (largest := max(found.get_vocab().values(), default=0)) > _LARGEST_ID:
        raise ValueError(f"it gives a token the id {largest}, wanted at most {_LARGEST_ID}")
    processor = found.backend_tokenizer.post_processor if found.is_fast else None
    for template in () if processor is None else _templates(json.loads(processor.__getstate__())):
        pieces = template["single"] + template["pair"]
        wanted = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        if lacking := sorted(wanted - set(template["special_tokens"])):
            raise ValueError(f"its template holds {lacking[0]!r}, which is not among its special_tokens")
        if not any("Sequence" in piece for piece in template["single"]):
            raise ValueError("its template leaves the text out")
    return found


def _templates(processor: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if processor["type"] == "TemplateProcessing":
        yield processor
    for part in processor.get("processors", ()):
        yield from _templates(part)
