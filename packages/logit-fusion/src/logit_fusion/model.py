"""A fusion as one causal language model of transformers: ``generate``, scoring and saving work unchanged."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput  # pyright: ignore[reportPrivateImportUsage]

from fusion_core.errors import FusionError, InputError
from logit_fusion.arguments import check_experts
from logit_fusion.cache import FusedCache
from logit_fusion.config import CONFIG_NAME, FusionConfig
from logit_fusion.engine import Engine, Prompts
from logit_fusion.fuse import FusionStep
from logit_fusion.member import Expert, Member, check_pairing, load_members
from logit_fusion.presets import PRESETS, preset_settings
from logit_fusion.recording import Recorder
from logit_fusion.saving import load_folder, save_folder
from logit_fusion.trace import FusionTrace
from logit_fusion.vocab import check_vocabulary

__all__ = ["FusedModel", "FusedOutput", "GenerateOutput"]


class FusedModelConfig(PretrainedConfig):
    """What ``generate`` asks a model's configuration for; the fusion's own settings are ``fusion.json``."""

    model_type = "logit_fusion"


@dataclass
class FusedOutput(CausalLMOutputWithPast):
    """Fused log-probabilities as ``logits``, the cache, and the fused step behind them."""

    step: FusionStep | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """What ``generate`` returns with ``trace=True`` or ``return_dict_in_generate=True``.

    Attributes:
        sequences: (rows, tokens) prompt and output.
        scores: per step, as transformers defines them, if asked for.
        logits: per step fused log-probabilities, if asked for.
        sequences_scores: of beams.
        beam_indices: of beams.
        past_key_values: the cache.
        trace: what the fusion did at every token, if asked for.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
    past_key_values: Any = None
    trace: FusionTrace | None = None


class FusedModel(PreTrainedModel, GenerationMixin):
    """A large model, steered while it decodes by what small experts learned over their small base.

    Its logits are the fused log-probabilities, so greedy search, sampling, beams, stopping criteria, logits
    processors and streamers of ``generate`` work as for any model. Batches are padded on the left.

    Args:
        large: a model of transformers, or an :class:`Expert` that says more.
        base: the small model that the experts were tuned from.
        experts: by name.
        settings: of the fusion; keyword arguments change single ones.
        tokenizer: of the large model; needed for texts and for views, and compared with the members'.
        preset: ``"proxy-tuning"``, ``"eft"``, ``"dexperts"`` or ``"contrastive"``; see :mod:`.presets`.
        **changes: fields of :class:`FusionConfig`.

    Raises:
        InputError: no expert, or a reserved name.
        VocabularyMismatchError: the members' vocabularies differ.

    Warns:
        UnpairedExpertWarning: an expert does not look like a fine-tune of the base.
    """

    config_class = FusedModelConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        large: Any,
        base: Any,
        experts: Mapping[str, Any] | None = None,
        settings: FusionConfig | None = None,
        *,
        tokenizer: Any = None,
        preset: str | None = None,
        **changes: Any,
    ) -> None:
        named = _named(large, base, experts, preset, tokenizer)
        self._set_up(load_members(named, device_map={}), settings, preset, tokenizer, changes)

    def _set_up(
        self,
        members: list[Member],
        settings: FusionConfig | None,
        preset: str | None,
        tokenizer: Any,
        changes: Mapping[str, Any],
    ) -> None:
        large = members[0]
        settings = preset_settings(preset, settings or FusionConfig())
        settings = settings.replace(**changes) if changes else settings
        check_pairing(members[1], members[2:], large)
        check_experts(settings, len(members) - 2)
        known = {member.name: member.tokenizer for member in members if member.tokenizer is not None}
        vocabulary = check_vocabulary(
            known if "large" in known else {},
            {member.name: member.width for member in members},
            align=settings.align,
            padded=settings.padded,
            min_overlap=settings.min_overlap,
        )
        known_as = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        fields: dict[str, Any] = {key: getattr(large.config, key, None) for key in known_as}
        fields |= {"vocab_size": large.width, "num_hidden_layers": large.config.num_hidden_layers}
        config: Any = FusedModelConfig(**fields)
        super().__init__(config)
        self.members = nn.ModuleDict()
        for member in members:
            if not any(member.module is module for module in self.members.values()):
                self.members[member.name] = member.module
        self.settings = settings
        self.tokenizer: Any = tokenizer if tokenizer is not None else large.tokenizer
        bos = getattr(self.tokenizer, "bos_token_id", None)
        bos = large.config.bos_token_id if bos is None else bos
        self.engine = Engine(members, vocabulary, bos)
        generation = getattr(large.module, "generation_config", None)
        self.generation_config = copy.deepcopy(generation) if generation is not None else GenerationConfig()
        if self.tokenizer is not None and getattr(self.tokenizer, "padding_side", "left") != "left":
            self.tokenizer.padding_side = "left"  # generation reads the last position of every row
        self.eval()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        large: str | os.PathLike[str] | nn.Module | Expert,
        base: Any = None,
        experts: Mapping[str, Any] | None = None,
        *,
        settings: FusionConfig | None = None,
        tokenizer: Any = None,
        preset: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> FusedModel:
        """Load the members, or what :meth:`save_pretrained` wrote.

        Args:
            large: folder, hub name, model or :class:`Expert`; with ``base=None`` and no preset a folder that
                holds ``fusion.json``.
            base: the same for the small base.
            experts: the same, by name; members of one source share its weights.
            settings: of the fusion.
            tokenizer: of the large model, if not in its folder.
            preset: see the class.
            dtype: of the weights: ``"auto"`` (bfloat16 on a GPU that has it, else float32), a name or a
                dtype.
            device: for all members.
            device_map: member -> device; ``"auto"`` lets accelerate spread a member.
            **changes: fields of :class:`FusionConfig`.

        Raises:
            CheckpointError: a member cannot be loaded.
            InputError: as in the class, or no base.
        """
        if base is None and not isinstance(large, nn.Module | Expert):
            folder = Path(large)
            if not (folder / CONFIG_NAME).is_file():
                raise InputError(f"base is missing, and {large} holds no {CONFIG_NAME}; name the small base")
            found, named = load_folder(folder)
            settings = settings or found
        else:
            named = _named(large, base, experts, preset, tokenizer)
        members = load_members(named, dtype=dtype, device=device, device_map=device_map)
        made = cls.__new__(cls)
        made._set_up(members, settings, preset, tokenizer, changes)
        return made

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | os.PathLike[str], *, weights: bool | None = None, **_: Any
    ) -> None:
        """Write ``fusion.json``, and the weights of members that came from memory.

        Args:
            save_directory: a new or empty folder.
            weights: True writes every member's weights, False none; None those that no name leads to.

        Raises:
            InputError: the folder holds something, or ``weights=False`` with a member from memory.
        """
        save_folder(self.engine.members, self.settings, save_directory, weights, self.tokenizer)

    @property
    def vocabulary(self) -> Any:
        """What the members' vocabularies share."""
        return self.engine.vocabulary

    def get_input_embeddings(self) -> nn.Module:
        """The large model's."""
        return self.engine.members[0].module.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The large model's."""
        return self.engine.members[0].module.get_output_embeddings()

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Where the large model takes ids."""
        return self.engine.members[0].device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        prompts: Prompts | None = None,
        recorder: Recorder | None = None,
        **_: Any,
    ) -> FusedOutput:
        """Fused log-probabilities of the next token.

        Args:
            input_ids: (rows, tokens) new ids.
            attention_mask: (rows, past + tokens), 0 for padding on the left.
            position_ids: (rows, tokens) of the shared prompt.
            past_key_values: what was read before; it is brought up to date.
            use_cache: False reads without a cache.
            logits_to_keep: the last positions only; 0 for all.
            prompts: what differs between the members' prompts.
            recorder: takes down what the fusion does.

        Returns:
            Log-probabilities (rows, kept, vocab) as ``logits``, with the cache.
        """
        cache = past_key_values
        if cache is None and use_cache is not False:
            cache = self.engine.cache(prompts)
        keep = logits_to_keep or input_ids.shape[1]
        passed = self.engine.step(
            self.settings, input_ids, attention_mask, position_ids, cache, keep, prompts
        )
        step = passed.step
        if recorder is not None:
            recorder.add(passed)
        log_probs = self.engine.vocabulary.widen(step.log_probs)
        return FusedOutput(logits=log_probs, past_key_values=cast(Any, cache), step=step)

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Tensor | None = None,
        *args: Any,
        trace: bool = False,
        prompts: Mapping[str, Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``generate`` of transformers on the fused distribution.

        Args:
            inputs: (rows, tokens) ids, padded on the left; also as ``input_ids``.
            *args: as in transformers.
            trace: record at every token what the fusion did; costs no synchronization.
            prompts: member -> ``{"input_ids", "attention_mask"}``, read by it in place of the shared prompt,
                padded on the left, one row per prompt.
            **kwargs: as in transformers: ``max_new_tokens``, ``do_sample``, ``num_beams``,
                ``stop_strings`` ...

        Returns:
            Ids (rows, tokens), or a :class:`GenerateOutput` with ``trace=True`` or
            ``return_dict_in_generate=True``.

        Raises:
            InputError: padding on the right, or prompts that do not fit.
            ContextLengthError: a member cannot read as much.
            NonFiniteLogitsError, EmptySupportError: a member's logits cannot be used.
        """
        from logit_fusion.generating import generate

        return generate(self, inputs, args, trace, prompts, kwargs)

    def _no_memory(self, error: BaseException) -> FusionError:
        rows = [
            f"{member.name} {member.bytes / 2**30:.2f} GiB on {member.device}"
            for member in self.engine.members
        ]
        return FusionError(
            f"out of memory ({' '.join(str(error).split())[:160]}); weights: {', '.join(rows)}. Spread the "
            "members "
            "by device_map, take a half dtype, or fewer rows"
        )

    @torch.no_grad()
    def speculative_generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """Lossless speculative decoding; see :func:`logit_fusion.speculative.speculative_generate`."""
        from logit_fusion.speculative import speculative_generate

        return speculative_generate(self, input_ids, attention_mask, **options)

    def score(self, texts: Any, **options: Any) -> Any:
        """Log-likelihoods of texts; see :func:`logit_fusion.score.score`."""
        from logit_fusion.score import score

        return score(self, texts, **options)

    def sweep(self, texts: Any, alphas: Any = (0.0, 0.5, 1.0, 1.5, 2.0), **options: Any) -> Any:
        """Static strengths side by side; see :func:`logit_fusion.calibrate.sweep`."""
        from logit_fusion.calibrate import sweep

        return sweep(self, texts, alphas, **options)

    def calibrate(self, texts: Any, **options: Any) -> Any:
        """Does fusion help on these texts? See :func:`logit_fusion.calibrate.calibrate`."""
        from logit_fusion.calibrate import calibrate

        return calibrate(self, texts, **options)


def _named(
    large: Any, base: Any, experts: Mapping[str, Any] | None, preset: str | None, tokenizer: Any
) -> dict[str, Expert]:
    """Every member as an Expert, by name, in order."""
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset is {preset!r}, wanted one of {', '.join(PRESETS)}")
    if base is None:
        raise InputError("base is missing: the small model that the experts were tuned from")
    if not experts and preset == "contrastive":
        experts = {"itself": large}
    if not experts:
        raise InputError("experts is empty, wanted at least one by name, such as {'math': 'path'}")
    for name in experts:
        if name in ("large", "base") or not name.isidentifier():
            raise InputError(f"experts names {name!r}; wanted an identifier other than 'large' and 'base'")
    found = {"large": large, "base": base, **experts}
    made = {name: x if isinstance(x, Expert) else Expert(x) for name, x in found.items()}
    if made["large"].source is None or made["base"].source is None:
        raise InputError("large and base need a source: a folder, a hub name or a model")
    if tokenizer is not None:
        warm = {
            name: Expert(**{**vars(x), "tokenizer": tokenizer})
            for name, x in made.items()
            if x.tokenizer is None and isinstance(x.source, nn.Module)
        }
        made |= warm
    return made


def warn_without_end(generation: Any, kwargs: Mapping[str, Any]) -> None:
    """Warn where nothing but the budget ends the output."""
    ends = kwargs.get("eos_token_id", getattr(generation, "eos_token_id", None))
    if ends is None and not kwargs.get("stop_strings") and not kwargs.get("stopping_criteria"):
        warnings.warn(
            "no end-of-sequence token is known; only the budget ends the output", UserWarning, stacklevel=4
        )
