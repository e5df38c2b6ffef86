"""The border between ``FusedModel.generate`` and the ``generate`` of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList

from fusion_core.errors import InputError
from logit_fusion.engine import Prompts
from logit_fusion.recording import Chosen, Guard, Recorder

if TYPE_CHECKING:
    from logit_fusion.model import FusedModel

__all__ = ["generate", "left_padded", "own_prompts"]


def left_padded(input_ids: Tensor, mask: Tensor | None) -> None:
    """Raise where padding stands on the right.

    Raises:
        InputError: it does, or there are no tokens, or the shapes differ.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}, wanted (rows, tokens) with tokens")
    if mask is None:
        return
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
    if bool((mask[:, -1] == 0).any()):
        raise InputError(
            "input_ids is padded on the right; pad on the left (tokenizer.padding_side = 'left')"
        )


def own_prompts(
    model: FusedModel, prompts: Mapping[str, Mapping[str, Tensor]] | None, rows: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Checked prompts of single members: name -> ids and mask.

    Raises:
        InputError: an unknown member, another number of rows, or padding on the right.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, batch in (prompts or {}).items():
        if name not in model.engine.names:
            raise InputError(f"prompts names {name!r}, the members are {model.engine.names}")
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        left_padded(ids, mask)
        if ids.shape[0] != rows:
            raise InputError(f"prompts[{name!r}] has {ids.shape[0]} rows, input_ids has {rows}")
        found[name] = (ids, mask)
    return found


def generate(
    model: FusedModel,
    inputs: Tensor | None,
    args: Sequence[Any],
    trace: bool,
    prompts: Mapping[str, Mapping[str, Tensor]] | None,
    kwargs: dict[str, Any],
) -> Any:
    """See :meth:`FusedModel.generate`."""
    from logit_fusion.model import GenerateOutput, warn_without_end

    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if ids is None:
        raise InputError("input_ids is missing: the prompts' ids, (rows, tokens)")
    kwargs.pop("token_type_ids", None)
    left_padded(ids, kwargs.get("attention_mask"))
    if (kind := kwargs.get("cache_implementation")) not in (None, "dynamic"):
        raise InputError(f"cache_implementation is {kind!r}; the members' caches are dynamic")
    if kwargs.get("assistant_model") is not None:
        raise InputError("assistant_model is not for a fusion; speculative_generate drafts with an expert")
    warn_without_end(kwargs.get("generation_config") or model.generation_config, kwargs)
    shared = Prompts(ids.shape[1], own_prompts(model, prompts, ids.shape[0]))
    cached = kwargs.get("use_cache", getattr(kwargs.get("generation_config"), "use_cache", True)) is not False
    if kwargs.get("past_key_values") is None and cached:
        kwargs["past_key_values"] = model.engine.cache(shared)
    elif kwargs.get("past_key_values") is None:
        kwargs.pop("past_key_values", None)
    beams = kwargs.get("num_beams", getattr(kwargs.get("generation_config"), "num_beams", 1)) or 1
    as_dict = bool(kwargs.get("return_dict_in_generate"))
    wanted_scores = bool(kwargs.get("output_scores"))
    guard = Guard(model.engine.names)
    recorder = Recorder(model.engine.names, guard, full=trace)
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    if trace:
        kwargs["return_dict_in_generate"] = True
        if beams > 1:
            kwargs["output_scores"] = True
        else:
            criteria.append(Chosen(recorder))
    try:
        plain: Any = GenerationMixin
        found = plain.generate(
            model, ids, *args, stopping_criteria=criteria, prompts=shared, recorder=recorder,
            **{key: value for key, value in kwargs.items() if key != "input_ids"},
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise model._no_memory(error) from error  # pyright: ignore[reportPrivateUsage]
    guard.check()
    if not trace and not as_dict:
        return found
    scores, indices = getattr(found, "scores", None), getattr(found, "beam_indices", None)
    record = None
    if trace:
        record = recorder.trace(model, found.sequences, ids.shape[1], scores, indices, kwargs)
    return GenerateOutput(
        sequences=found.sequences,
        scores=scores if wanted_scores else None,
        logits=getattr(found, "logits", None),
        sequences_scores=getattr(found, "sequences_scores", None),
        beam_indices=indices,
        past_key_values=getattr(found, "past_key_values", None),
        trace=record,
    )
