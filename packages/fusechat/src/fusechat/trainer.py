"""transformers' Trainer with the fusion objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from fusechat.collate import FusionCollator
from fusechat.objective import FusionLoss
from fusion_core.errors import DataError, FusionWarning, InputError
from fusion_core.modules import logits_of


class FusionTrainer(Trainer):
    """A ``transformers.Trainer`` that fuses the sources into the model; PEFT models are trained as they are.

    The loss is divided by the supervised and fused positions of all ranks and accumulated batches together,
    so that neither changes it.

    Args:
        model: the pivot, a causal language model.
        args: ``TrainingArguments``.
        train_dataset: dialogues that the stores hold.
        sources: stores or their folders.
        processing_class: the pivot's tokenizer.
        fusion_loss: a :class:`FusionLoss`; the published settings by default.
        collator: a :class:`FusionCollator` instead of ``sources`` and ``collator_options``.
        collator_options: keywords of :class:`FusionCollator`.
        eval_dataset: dialogues for the evaluation, also in the stores.
        **options: of ``transformers.Trainer``.

    Raises:
        InputError: neither sources nor a collator, or no tokenizer.
        DataError: no dialogue has anything to learn.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Sequence[Any] | None = None,
        sources: Sequence[Any] = (),
        *,
        processing_class: Any = None,
        fusion_loss: FusionLoss | None = None,
        collator: FusionCollator | None = None,
        collator_options: dict[str, Any] | None = None,
        eval_dataset: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        if collator is None:
            if processing_class is None or not len(sources):
                raise InputError(
                    f"processing_class is {type(processing_class).__name__} "
                    f"with {len(sources)} sources, wanted "
                    "the pivot's tokenizer and at least one store, or a collator"
                )
            given: dict[str, Any] = {
                "pivot_size": int(model.config.get_text_config().vocab_size),
                **(collator_options or {}),
            }
            collator = FusionCollator(processing_class, sources, **given)
        self.fusion_loss = fusion_loss if fusion_loss is not None else FusionLoss()
        self.fusion_collator = collator
        self._items: tuple[Any, Any] | None = None
        self._logged: dict[str, list[Tensor]] = {}
        args.remove_unused_columns = False  # the columns are the dialogues themselves
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=self._kept(train_dataset),  # pyright: ignore[reportArgumentType]
            eval_dataset=self._kept(eval_dataset),  # pyright: ignore[reportArgumentType]
            processing_class=processing_class,
            **options,
        )
        self.loss_is_scaled_for_ga = True

    def _kept(self, dialogues: Sequence[Any] | None) -> list[Any] | None:
        if dialogues is None:
            return None
        kept = [dialogue for dialogue in dialogues if self.fusion_collator.learnable(dialogue)]
        if not kept:
            raise DataError(f"none of {len(dialogues)} dialogues has an assistant's token to learn")
        if len(kept) < len(dialogues):
            import warnings

            warnings.warn(
                f"{len(dialogues) - len(kept)} of {len(dialogues)} dialogues have nothing to learn "
                "and are left out",
                FusionWarning,
                stacklevel=3,
            )
        return kept

    def _collate(self, dialogues: Sequence[Any]) -> dict[str, Any]:
        batch = self.fusion_collator(dialogues)
        return {**batch.inputs, "labels": batch.labels, "fusion": batch}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the batches of one step and count what the loss averages over in all of them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [torch.stack(self.fusion_loss.counts(batch["fusion"])) for batch in batches]
        if counts:
            total = torch.stack([count.to(device) for count in counts]).sum(0)
            if self.args.world_size > 1:
                total = self.accelerator.reduce(total, "sum")
            self._items = (total[0], total[1])
        return batches, items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The fusion objective on one batch."""
        batch = inputs["fusion"].to(inputs["input_ids"].device)
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        training = num_items_in_batch is not None or model.training
        found = self.fusion_loss(
            logits_of(outputs),
            batch,
            step=min(self.state.global_step, self.state.max_steps) if training else 0,
            max_steps=max(self.state.max_steps, 1),
            items=self._items if training else None,
        )
        loss = found.total
        if training:
            for name, value in (("sft", found.sft), ("fusion", found.fusion)):
                self._logged.setdefault(name, []).append(value.detach())
            if self._items is not None and self.args.world_size > 1:
                loss = loss * self.accelerator.num_processes  # ranks average their gradients
        return (loss, {"logits": logits_of(outputs)}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two parts of the loss to what is logged (this rank's share of them)."""
        if "loss" in logs and self._logged:
            steps = max(1, len(self._logged["sft"]) // max(1, self.args.gradient_accumulation_steps))
            logs = {**logs, **{name: float(torch.stack(v).sum() / steps) for name, v in self._logged.items()}}
            self._logged = {}
        super().log(logs, start_time)
