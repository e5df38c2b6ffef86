"""A vision language model of transformers, in this process."""

from __future__ import annotations

import asyncio
import io
import threading
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import torch

from fusion_core.device import resolve_device, resolve_dtype
from fusion_core.errors import CheckpointError, InputError, reading
from meme_debate.backends import Reply
from meme_debate.meme import mend
from meme_debate.prompts import Call


class LocalBackend:
    """Generates with an image-text-to-text model; one call at a time, in a thread.

    Args:
        model: name or folder; or the model itself, then with ``processor``.
        processor: its processor with a chat template; read from ``model``'s folder where None.
        device: where it runs.
        dtype: of its weights.

    Raises:
        CheckpointError: it cannot be loaded.
    """

    def __init__(
        self, model: Any, processor: Any = None, *, device: str = "auto", dtype: str = "auto"
    ) -> None:
        self._lock = threading.Lock()
        self._device = resolve_device(device)
        if isinstance(model, str):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            self.model = model
            kind = resolve_dtype(dtype, self._device)
            with reading(model, "is no image-text-to-text model that transformers loads", CheckpointError):
                processor = processor or AutoProcessor.from_pretrained(model)
                network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=kind)
        else:
            if processor is None:
                raise InputError("a model that is given as an object needs processor=")
            self.model = str(getattr(model, "name_or_path", "") or type(model).__name__)
            network = model
        self.processor = processor
        self.network = network.to(self._device).eval()

    def open(self, concurrency: int) -> AbstractAsyncContextManager[object]:  # noqa: ARG002
        """Nothing to open."""
        return nullcontext()

    async def ask(self, call: Call) -> Reply:
        """Generate a reply."""
        return await asyncio.to_thread(self._generate, call)

    def counts(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Nothing beside the call."""
        return {}

    def _generate(self, call: Call) -> Reply:
        content: list[dict[str, Any]] = []
        if call.prompt.picture is not None:
            from PIL import Image

            with Image.open(io.BytesIO(call.prompt.picture.content)) as image:
                content.append({"type": "image", "image": image.convert("RGB")})
        content.append({"type": "text", "text": call.prompt.prefix + call.suffix})
        chat = [
            {"role": "system", "content": [{"type": "text", "text": call.prompt.system}]},
            {"role": "user", "content": content},
        ]
        with self._lock, torch.inference_mode(), torch.random.fork_rng(self._forked()):
            torch.manual_seed(call.seed)
            batch = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            batch = {
                name: value.to(self._device, self.network.dtype if value.is_floating_point() else None)
                for name, value in batch.items()
            }
            sampling: dict[str, Any] = (
                {"do_sample": True, "temperature": call.temperature}
                if call.temperature
                else {"do_sample": False}
            )
            ids = self.network.generate(**batch, max_new_tokens=call.max_tokens, **sampling)
        read = batch["input_ids"].shape[1]
        new = ids[0, read:]
        text = self.processor.decode(new, skip_special_tokens=True)
        cut = len(new) >= call.max_tokens and int(new[-1]) not in self._ends()
        return Reply(
            mend(text), "length" if cut else "stop", prompt_tokens=int(read), completion_tokens=len(new)
        )

    def _forked(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []

    def _ends(self) -> set[int]:
        end = self.network.generation_config.eos_token_id
        return set() if end is None else {end} if isinstance(end, int) else set(end)
