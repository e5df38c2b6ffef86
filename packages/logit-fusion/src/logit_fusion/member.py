"""The members of a fusion: where they come from, what they read, and which of them share weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_core import tokenizers
from fusion_core.checkpoint import check_config
from fusion_core.device import resolve_device, resolve_dtype
from fusion_core.errors import CheckpointError, InputError, reading, require_extra
from logit_fusion.config import MemberConfig, ViewConfig
from logit_fusion.errors import ContextLengthError, UnpairedExpertWarning

__all__ = ["Expert", "Member", "load_members"]

_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
BASE_ROWS = "__base__"  # PEFT's name for rows without an adapter
_MARK = "\u241eprompt\u241e"


@dataclass(frozen=True)
class Expert:
    r"""One member, when a name alone does not say enough.

    Args:
        source: a folder, a hub name, or a model of transformers; None is the small base's own weights,
            shared.
        adapter: folder or hub name of a LoRA adapter on ``source`` (extra ``peft``); members with one source
            share its weights, whatever their adapters.
        prefix: text that this member alone reads before every prompt: few-shot examples, retrieved context.
        suffix: text that it alone reads after the prompt.
        chat: put the prompt into the member's chat template, as the user's message.
        system: the system message of that chat.
        dtype: of the weights; None takes the model's.
        device: None takes the model's; a name such as ``"cuda:1"``, or ``"auto"`` to spread it (accelerate).
        tokenizer: of the member, where ``source`` is a model; needed for texts, and compared.
        options: further keyword arguments of ``from_pretrained``.

    Example:
        >>> Expert(None, prefix="Q: what is 1 plus 1? A: 2\n").view.prefix
        'Q: what is 1 plus 1? A: 2\n'
    """

    source: Any = None
    adapter: str | os.PathLike[str] | None = None
    prefix: str = ""
    suffix: str = ""
    chat: bool = False
    system: str | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    tokenizer: Any = None
    options: Mapping[str, Any] | None = None

    @property
    def view(self) -> ViewConfig | None:
        """What it reads in place of the shared prompt, None for the prompt itself."""
        found = ViewConfig(self.prefix, self.suffix, self.chat, self.system)
        return None if found == ViewConfig() else found


class Member:
    """A loaded member.

    Attributes:
        name: ``"large"``, ``"base"`` or the expert's.
        module: the model; adapters of one base share it.
        adapter: name of its adapter inside ``module``; ``BASE_ROWS`` for none in a module that has some.
        tokenizer: its own, if known.
        view: what it reads in place of the shared prompt.
        prefix_ids: the view's tokens before the prompt.
        suffix_ids: the view's tokens after it.
        source: where it came from, None for a model from memory.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        *,
        adapter: str | None = None,
        tokenizer: Any = None,
        view: ViewConfig | None = None,
        source: MemberConfig | None = None,
    ) -> None:
        self.name, self.module, self.adapter = name, module, adapter
        self.tokenizer, self.view, self.source = tokenizer, view, source
        self.prefix_ids, self.suffix_ids = _view_tokens(name, view, tokenizer)

    @property
    def config(self) -> Any:
        """The configuration of its text model."""
        return self.module.config.get_text_config(decoder=True)

    @property
    def width(self) -> int:
        """Width of its logits."""
        head = self.module.get_output_embeddings()
        weight = getattr(head, "weight", None)
        return (
            int(weight.shape[0]) if weight is not None and weight.ndim == 2 else int(self.config.vocab_size)
        )

    @property
    def device(self) -> torch.device:
        """Where it takes ids."""
        return self.module.get_input_embeddings().weight.device

    @property
    def reads_prompt(self) -> bool:
        """Whether it reads the shared prompt as it is."""
        return not self.prefix_ids and not self.suffix_ids

    @property
    def bytes(self) -> int:
        """Memory of its module's parameters."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    def check_length(self, tokens: int) -> None:
        """Raise where ``tokens`` are more than the member can read.

        Raises:
            ContextLengthError: they are.
        """
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise ContextLengthError(
                f"member {self.name!r} would read {tokens} tokens, it takes at most {most}; shorten the "
                "prompt "
                "or its view, or lower max_new_tokens"
            )


def _view_tokens(name: str, view: ViewConfig | None, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and after the prompt; the prompt's own ids are never decoded."""
    if view is None:
        return [], []
    if tokenizer is None:
        raise InputError(f"member {name!r} has a view but no tokenizer; give Expert(tokenizer=...)")
    before, after = view.prefix, view.suffix
    special = True
    if view.chat:
        messages = [{"role": "system", "content": view.system}] if view.system is not None else []
        try:
            text = tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": f"{before}{_MARK}{after}"}],
                tokenize=False,
                add_generation_prompt=True,
            )
        except ValueError as error:
            raise InputError(f"member {name!r} has chat=True but no chat template: {error}") from error
        before, mark, after = text.partition(_MARK)
        if not mark:
            raise InputError(f"member {name!r}: its chat template leaves the user's message out")
        special = False  # the template writes them itself
    # Without a prefix the prompt's own first token stays the first.
    first = tokenizer(before, add_special_tokens=special)["input_ids"] if before else []
    end = getattr(tokenizer, "eos_token_id", None)
    if special and len(first) > 1 and first[-1] == end:
        first = first[:-1]
    return list(first), list(tokenizer(after, add_special_tokens=False)["input_ids"]) if after else []


def lead(member: Member, ids: Tensor, mask: Tensor | None, bos: int | None) -> tuple[Tensor, Tensor]:
    """What a member reads in place of a prompt, and its mask, each (rows, tokens).

    Args:
        member: with a view.
        ids: (rows, tokens) the shared prompt, padded on the left.
        mask: 1 for tokens, 0 for padding; None for no padding.
        bos: the prompt's beginning-of-sequence token; it is hidden where it would stand behind a prefix.
    """
    rows = ids.shape[0]
    mask = torch.ones_like(ids) if mask is None else mask
    if member.prefix_ids and bos is not None:
        first = (mask.cumsum(-1) == 1) & (mask > 0)
        mask = mask.masked_fill(first & (ids == bos), 0)
    before = ids.new_tensor(member.prefix_ids).expand(rows, -1)
    after = ids.new_tensor(member.suffix_ids).expand(rows, -1)
    whole = torch.cat([before, ids, after], 1)
    return whole, torch.cat([torch.ones_like(before), mask.to(ids.dtype), torch.ones_like(after)], 1)


def _load(source: Any, name: str, dtype: torch.dtype, device: Any, options: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    place: Any
    spread = isinstance(device, dict) or device in ("auto", "balanced", "sequential")
    place = {"device_map": device} if spread else {}
    single: Any = device
    with reading(f"member {name!r}: {source}", "cannot be loaded", CheckpointError):
        check_config(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **place, **options)
    return model.eval() if spread else model.to(resolve_device(single)).eval()


def load_tokenizer(source: Any, name: str) -> Any:
    """A member's tokenizer, or None where its folder has none.

    Raises:
        CheckpointError: it is damaged, or there is no such name on the hub.
    """
    folder = Path(str(source))
    if folder.is_dir() and not any(file.name.startswith(_TOKENIZER_FILES) for file in folder.iterdir()):
        return None  # transformers 5.0 makes up an empty one
    with reading(f"member {name!r}: {source}", "has no tokenizer that can be read", CheckpointError):
        return tokenizers.load_tokenizer(source)


def load_members(
    named: Mapping[str, Expert],
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
) -> list[Member]:
    """Load members; equal sources share one module, adapters of it too.

    Args:
        named: ``"large"``, ``"base"``, then the experts, in order.
        dtype: of the weights, where a member names none.
        device: of all members, where neither ``device_map`` nor the member names one; ``"auto"`` is the best
            single device here.
        device_map: member -> device, or one word for all; ``"auto"`` spreads a member by accelerate.

    Raises:
        CheckpointError: a member cannot be loaded.
        InputError: an unknown name in ``device_map``, a wrong device, or an adapter of a shared model from
            memory.
        MissingExtraError: an adapter without PEFT.
    """
    places = (
        dict(device_map) if isinstance(device_map, Mapping) else dict.fromkeys(named, device_map or device)
    )
    if unknown := sorted(set(places) - set(named)):
        raise InputError(f"device_map names {unknown}, the members are {list(named)}")
    loaded: dict[Any, Any] = {}
    tokenizers: dict[Any, Any] = {}
    members: list[Member] = []
    for name, asked in named.items():
        expert = named["base"] if asked.source is None and name != "base" else asked
        source = expert.source
        from_memory = isinstance(source, torch.nn.Module)
        place = asked.device or expert.device or places.get("base" if expert is not asked else name, device)
        # "auto" of this package is one device; accelerate's spreading is asked for by device_map.
        where: Any = place
        if place == "auto" and not device_map:
            where = resolve_device("auto")
        kind = asked.dtype or expert.dtype or dtype
        key: Any = id(source) if from_memory else (str(source), str(kind), str(where))
        if key not in loaded:
            if from_memory:
                loaded[key] = source.eval()
            else:
                wanted = resolve_dtype(kind, None if isinstance(where, dict) or where == "auto" else where)
                loaded[key] = _load(source, name, wanted, where, asked.options or {})
            tokenizers[key] = expert.tokenizer if from_memory else load_tokenizer(source, name)
        adapter = None
        if asked.adapter is not None:
            loaded[key] = _with_adapter(loaded[key], str(asked.adapter), name)
            adapter = name
        place_of = None
        if not from_memory:
            place_of = MemberConfig(
                str(source), None if asked.adapter is None else str(asked.adapter), _word(kind), str(place)
            )
        view_tokenizer = asked.tokenizer or tokenizers[key]
        members.append(
            Member(name, key, adapter=adapter, tokenizer=view_tokenizer, view=asked.view, source=place_of)
        )
    for member in members:  # an adapter wraps the module that earlier members hold
        member.module = loaded[member.module]
        if member.adapter is None and hasattr(member.module, "peft_config"):
            member.adapter = BASE_ROWS
    return members


def _word(kind: str | torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _with_adapter(module: Any, adapter: str, name: str) -> Any:
    peft: Any = require_extra("peft", "peft", "logit-fusion")
    with reading(f"member {name!r}: adapter {adapter}", "cannot be loaded", CheckpointError):
        if isinstance(module, peft.PeftModel):
            module.load_adapter(adapter, adapter_name=name)
            return module.eval()
        return peft.PeftModel.from_pretrained(module, adapter, adapter_name=name).eval()


def check_pairing(base: Member, experts: Sequence[Member], large: Member | None = None) -> None:
    """Warn of experts that do not look like fine-tunes of the base.

    Args:
        base: the small base.
        experts: of it.
        large: an expert that is the large model itself (contrastive decoding) is none of the base's.

    Warns:
        UnpairedExpertWarning: another model type, width, depth or number of heads.
    """
    for expert in experts:
        if expert.module is base.module or (large is not None and expert.module is large.module):
            continue
        differ = [
            f"{key} {ours} / {theirs}"
            for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
            if (ours := getattr(base.config, key, None)) != (theirs := getattr(expert.config, key, None))
        ]
        if differ:
            warnings.warn(
                f"expert {expert.name!r} does not look like a fine-tune of the base: {', '.join(differ)}",
                UnpairedExpertWarning,
                stacklevel=4,
            )
