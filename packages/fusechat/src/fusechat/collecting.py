"""Run a source over dialogues once and keep its top-k distributions (section 2.1)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from fusechat.spans import Encoded, check_tokenizer, encode, load_tokenizer
from fusechat.store import StoredRow, TopKStore
from fusechat.texts import Dialogue, Text, render
from fusion_core.atomic import PathLike
from fusion_core.checkpoint import check_config, digest
from fusion_core.device import resolve_device, resolve_dtype
from fusion_core.errors import DataError, InputError, NonFiniteError, naming, reading
from fusion_core.modules import logits_of, untouched
from fusion_core.progress import track


def collect(
    model: Any,
    dialogues: Sequence[Dialogue],
    *,
    out: PathLike,
    k: int = 10,
    tokenizer: Any = None,
    pivot_tokenizer: Any = None,
    template: str | None = None,
    max_length: int = 2048,
    batch_tokens: int = 8192,
    logits_dtype: Literal["float16", "float32"] = "float16",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    shard_rows: int = 256,
    progress: bool | None = None,
) -> TopKStore:
    """Store a model's top-k distributions on dialogues; an interrupted run goes on where it stopped.

    Under ``torchrun`` every rank writes its own shards; the store is the same as from one process.

    Args:
        model: name or path for transformers, or a causal language model.
        dialogues: messages or texts, see :func:`fusechat.texts.render`.
        out: folder of the store.
        k: entries to keep per token.
        tokenizer: the model's; loaded from the same place where ``model`` is a name.
        pivot_tokenizer: whose chat template renders the dialogues, the same for all sources; the model's own
            by default.
        template: a chat template instead.
        max_length: most tokens of a dialogue, the rest is cut.
        batch_tokens: most tokens of a forward pass, padding included.
        logits_dtype: how logits are stored.
        device: where to compute; a model that was given stays where it is.
        dtype: of the weights; a model that was given keeps its own.
        shard_rows: dialogues per shard.
        progress: None shows a bar on a terminal only.

    Returns:
        The store. Dialogues without an assistant's turn are kept as rows without tokens.

    Raises:
        InputError: no dialogues, numbers out of range, or a model object without tokenizer.
        DataError: no dialogue has anything to learn.
        UnsupportedTokenizer: a slow tokenizer.
        NonFiniteError: the model gives NaN or +inf; the row is named.
        StoreError: ``out`` holds a store of something else.
    """
    if not len(dialogues):
        raise InputError("dialogues is empty, wanted at least one")
    for name, value in (("k", k), ("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise InputError(f"{name} is {value}, wanted at least 1")
    net, tokenizer, name = _loaded(model, tokenizer, device, dtype)
    check_tokenizer(tokenizer)
    writer = pivot_tokenizer if pivot_tokenizer is not None else tokenizer
    texts = [render(dialogue, writer, template=template) for dialogue in dialogues]
    if not any(text.spans for text in texts):
        raise DataError(
            f"none of {len(texts)} dialogues has an assistant's turn that the template shows; "
            "check roles and template"
        )
    size = int(net.config.get_text_config().vocab_size)
    if k > size:
        raise InputError(f"k is {k}, wanted at most the model's vocabulary of {size}")
    fingerprint = {
        "model": name,
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "texts": digest([[text.digest, text.spans, text.whole] for text in texts]),
        "max_length": max_length,
    }
    store = TopKStore.create(
        out,
        fingerprint,
        rows=len(texts),
        k=k,
        vocab_size=size,
        logits_dtype=logits_dtype,
        shard_rows=shard_rows,
    )
    if store.complete:
        return store
    rank, world = _rank()
    mine = [number for number in store.missing() if number % world == rank]
    with untouched(net), torch.inference_mode():
        for number in track(mine, "collecting", enabled=progress):
            rows = store.shard_range(number)
            encoded = [_encode(tokenizer, texts[row], max_length) for row in rows]
            with naming(model if isinstance(model, str | os.PathLike) else None):
                kept = _shard(net, encoded, rows, k, batch_tokens)
            store.write(
                number,
                [StoredRow(texts[r], e, *part) for r, e, part in zip(rows, encoded, kept, strict=True)],
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    store.finish()
    return TopKStore(out)


def _encode(tokenizer: Any, text: Text, max_length: int) -> Encoded:
    if not text.spans:
        return Encoded(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_))
    return encode(tokenizer, text, max_length=max_length)


def _loaded(model: Any, tokenizer: Any, device: Any, dtype: Any) -> tuple[Any, Any, str]:
    if not isinstance(model, str | os.PathLike):
        if tokenizer is None:
            raise InputError("tokenizer is None, wanted the model's tokenizer beside a model object")
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise InputError(
                f"model is {type(model).__name__}, wanted a causal model of transformers or its name"
            )
        from fusion_core.checkpoint import digest_state

        return model, tokenizer, digest_state(dict(model.state_dict()))
    from transformers import AutoModelForCausalLM

    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    with reading(f"model {str(model)!r}", "cannot be loaded"):
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(model))
        check_config(model)
        net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    net.to(device=place)
    return net, tokenizer, str(model)


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), max(int(os.environ.get("WORLD_SIZE", 1)), 1)


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Items of like length together, as many as the budget of padded tokens holds; empty ones left out."""
    batch: list[int] = []
    for item in sorted((n for n in range(len(lengths)) if lengths[n]), key=lambda n: (-lengths[n], n)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _shard(net: Any, encoded: list[Encoded], rows: range, k: int, budget: int) -> list[tuple[Any, ...]]:
    nothing = np.zeros((0, k), np.float32)
    kept: list[tuple[Any, ...]] = [
        (nothing, nothing.astype(np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)) for _ in encoded
    ]
    device = next(net.parameters()).device
    for batch in _batches([len(e) for e in encoded], budget):
        width = max(len(encoded[n]) for n in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for place, n in enumerate(batch):
            ids[place, : len(encoded[n])] = torch.from_numpy(encoded[n].ids.astype(np.int64))
            seen[place, : len(encoded[n])] = 1
        ids, seen = ids.to(device), seen.to(device)
        logits = logits_of(net(input_ids=ids, attention_mask=seen, use_cache=False))
        for place, n in enumerate(batch):
            kept[n] = _top(logits[place, : len(encoded[n])], ids[place, : len(encoded[n])], k, rows[n])
    return kept


def _top(logits: torch.Tensor, ids: torch.Tensor, k: int, row: int) -> tuple[Any, ...]:
    values, indices = logits.topk(k, -1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    lse = logits.to(wide).logsumexp(-1)
    if not bool(torch.isfinite(lse).all()):
        at = int((~torch.isfinite(lse)).nonzero()[0])
        raise NonFiniteError(f"the model's logits hold NaN or infinity in row {row} at token {at}")
    own = logits[:-1].gather(-1, ids[1:, None])[:, 0].to(wide)
    ce = torch.full_like(lse, torch.nan)
    ce[:-1] = lse[:-1] - own
    return (
        values.float().cpu().numpy(),
        indices.to(torch.int32).cpu().numpy(),
        lse.float().cpu().numpy(),
        ce.float().cpu().numpy(),
    )
