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
            int32, a length that is no number, and a template without the text, of unknown tokens or of ids
            that no token has.
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
    ids = {*(words.values() if isinstance(words, dict) else range(len(words or ())))}
    ids |= {entry["id"] for entry in found.get("added_tokens") or ()}
    if (largest := max((value for value in ids if isinstance(value, int)), default=0)) > _LARGEST_ID:
        raise ValueError(f"it gives a token the id {largest}, wanted at most {_LARGEST_ID}")
    if prefix := found["model"].get("continuing_subword_prefix"):
        for merge in found["model"].get("merges") or ():
            # The library cuts as many bytes off the second token, whatever they are, or ends the process.
            second = merge.split(" ")[-1] if isinstance(merge, str) else merge[1]
            if not second.startswith(prefix):
                raise ValueError(f"its merges lead to {second!r}, which does not start with {prefix!r}")
    for name, number in _placed(found.get("post_processor")):
        if number not in ids:
            raise ValueError(f"its post-processor gives {name!r} the id {number!r}, which no token has")
    for template in _templates(found.get("post_processor")):
        pieces = template["single"] + template["pair"]
        wanted = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        if lacking := sorted(wanted - set(template["special_tokens"])):
            raise ValueError(f"its template holds {lacking[0]!r}, which is not among its special_tokens")
        if not any("Sequence" in piece for piece in template["single"]):
            raise ValueError("its template leaves the text out")


def _placed(processor: Any) -> Iterator[tuple[str, Any]]:
    """The tokens that are put around a text, with each of their ids."""
    for template in _templates(processor):
        for name, token in template["special_tokens"].items():
            yield from ((name, number) for number in token["ids"])
    for part in _parts(processor):
        yield from (part[name] for name in ("sep", "cls") if name in part)


def _parts(processor: Any) -> Iterator[dict[str, Any]]:
    if processor:
        yield processor
        for part in processor.get("processors", ()):
            yield from _parts(part)


def _templates(processor: Any) -> Iterator[dict[str, Any]]:
    return (part for part in _parts(processor) if part["type"] == "TemplateProcessing")
