"""Dialogues as one text: the chat template rendered, with the characters that the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from fusion_core.errors import InputError, check_text

Dialogue = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Text:
    """A rendered dialogue.

    Attributes:
        text: what every tokenizer sees.
        spans: (start, stop) of the characters to learn, in order; empty where none could be found.
        whole: True for plain text, whose end token is learned too.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    whole: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def render(dialogue: Dialogue, tokenizer: Any = None, *, template: str | None = None) -> Text:
    """Render a dialogue by a chat template and find the assistant's turns in it.

    Args:
        dialogue: messages with ``role`` and ``content``, a mapping with them under ``messages`` (or
            ``conversations``, or a text under ``text``), or a plain text, all of which is learned.
        tokenizer: whose chat template renders messages; the pivot's, whatever the source.
        template: a Jinja chat template instead of the tokenizer's own.

    Returns:
        The text and its spans. Where the template marks ``{% generation %}`` the spans are those blocks;
        else a turn is what the template adds to its generation prompt, end-of-turn token included. A turn
        that cannot be found has no span.

    Raises:
        InputError: neither text nor messages, or no template for messages.

    Example:
        >>> render("plain text")
        Text(text='plain text', spans=((0, 10),), whole=True)
    """
    messages = messages_of(dialogue)
    if isinstance(messages, str):
        return Text(messages, ((0, len(messages)),) if messages else (), whole=True)
    chosen = template or getattr(tokenizer, "chat_template", None)
    if not chosen:
        raise InputError("dialogue holds messages, but the tokenizer has no chat template; give template=")
    if isinstance(chosen, Mapping):
        chosen = chosen.get("default", next(iter(chosen.values())))
    words: dict[str, Any] = dict(getattr(tokenizer, "special_tokens_map", None) or {})
    text, blocks = _jinja(messages, chosen, words)
    if blocks:
        return Text(text, tuple((int(start), int(stop)) for start, stop in blocks))
    return Text(text, _turns(messages, text, chosen, words))


def messages_of(dialogue: Dialogue) -> str | list[dict[str, Any]]:
    """A dialogue's text, or its messages with ``role`` and ``content``.

    Raises:
        InputError: it has neither, or half a surrogate pair, which no tokenizer takes.

    Example:
        >>> messages_of({"conversations": [{"role": "user", "content": "Hello"}]})
        [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(dialogue, Mapping):
        found = next(
            (dialogue[key] for key in ("messages", "conversations", "text") if key in dialogue), None
        )
        if found is None:
            raise InputError(
                f"dialogue is a mapping with {sorted(map(str, dialogue))}, wanted 'messages' or 'text' in it"
            )
        dialogue = found
    if isinstance(dialogue, str):
        return check_text("a text", dialogue)
    return [_message(entry, number) for number, entry in enumerate(_listed(dialogue))]


def _listed(dialogue: Any) -> Sequence[Any]:
    if not isinstance(dialogue, Sequence) or not dialogue:
        raise InputError(
            f"dialogue is {type(dialogue).__name__} of no messages, "
            "wanted text or messages with role and content"
        )
    return dialogue  # pyright: ignore[reportUnknownVariableType]


def _message(entry: Any, number: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "role" not in entry or not isinstance(entry.get("content"), str):
        raise InputError(
            f"message {number} is {entry!r:.80}, wanted a mapping with 'role' and a text 'content'"
        )
    return {
        key: check_text("a text", value) if isinstance(value, str) else value for key, value in entry.items()
    }


def _jinja(
    messages: list[dict[str, Any]], template: str, words: dict[str, Any], *, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, blocks = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask="{% generation" in template or "{%- generation" in template,
            add_generation_prompt=prompt,
            **words,
        )
    except TemplateError as error:
        raise InputError(f"the chat template refuses the dialogue: {error}") from error
    spans: Any = blocks[0] if blocks else []
    return texts[0], list(spans)


def _turns(
    messages: list[dict[str, Any]], text: str, template: str, words: dict[str, Any]
) -> tuple[tuple[int, int], ...]:
    """Spans of the assistant's turns by rendering the dialogue up to each of them."""
    spans: list[tuple[int, int]] = []
    after = 0
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant" or not content:
            at = text.find(content, after)
            after = at + len(content) if at >= 0 else after
            continue
        span = _turn(messages, number, text, content, template, words, after)
        if span is not None:
            spans.append(span)
            after = span[1]
    return tuple(spans)


def _turn(
    messages: list[dict[str, Any]],
    number: int,
    text: str,
    content: str,
    template: str,
    words: dict[str, Any],
    after: int,
) -> tuple[int, int] | None:
    try:
        prompt = _jinja(messages[:number], template, words, prompt=True)[0] if number else ""
        if number and prompt == _jinja(messages[:number], template, words)[0]:
            prompt = ""  # a template without a generation prompt: the turn's header would count as the turn
        until = _jinja(messages[: number + 1], template, words)[0]
    except InputError:  # a template that wants the turns to alternate, or a user first
        prompt, until = "", ""
    shared = len(prompt) > 0 and text.startswith(prompt) and until.startswith(prompt)
    begin = text.find(content, len(prompt) if shared else after)
    if begin < 0:
        return None
    stop = begin + len(content)
    if until and text.startswith(until.rstrip()):  # what closes the turn, without the blank after it
        return (len(prompt) if shared else begin), max(len(until.rstrip()), stop)
    closing = str(words.get("eos_token") or "")
    if closing and text.startswith(closing, stop):
        stop += len(closing)
    return (len(prompt) if shared else begin), stop
