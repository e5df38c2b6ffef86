"""A conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["converse"]


def converse(
    fused: Any, lines: Iterable[str], max_new_tokens: int, system: str | None, sampling: dict[str, Any]
) -> list[dict[str, str]]:
    """Answer line by line until an empty one.

    Args:
        fused: a fusion with a tokenizer.
        lines: what the user says.
        max_new_tokens: most tokens of an answer.
        system: the system message.
        sampling: options of ``generate``.

    Returns:
        The messages.
    """
    from transformers import TextStreamer

    tokenizer = fused.tokenizer
    templated = getattr(tokenizer, "chat_template", None) is not None
    messages = [{"role": "system", "content": system}] if system is not None else []
    for line in lines:
        said = line.strip()
        if not said:
            break
        messages.append({"role": "user", "content": said})
        if templated:
            found = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:  # a base model: the conversation as plain text
            text = (
                "\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\nassistant:"
            )
            found = tokenizer(text, return_tensors="pt")
        ids = found["input_ids"].to(fused.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = fused.generate(ids, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        sys.stdout.flush()
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return messages
