"""Where replies come from: an HTTP server, a model in this process, a file, or any asynchronous function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol, cast

from fusion_core.errors import InputError
from meme_debate.meme import mend
from meme_debate.prompts import Call, messages

Ask = Callable[[list[dict[str, Any]]], Awaitable[str]]


class Reply(NamedTuple):
    """What a model said.

    Attributes:
        text: its words, empty where it said nothing.
        finish_reason: ``"stop"``, ``"length"``, ``"content_filter"`` ...
        refusal: the server's own word for a refusal.
        prompt_tokens: that were read.
        completion_tokens: that were written.
        cached_tokens: of the prompt's, found in the server's prefix cache.
        pictures: the reply held images, which are not kept.
    """

    text: str
    finish_reason: str = "stop"
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    pictures: int = 0


class Backend(Protocol):
    """Answers calls; entered once for each run."""

    model: str

    def open(self, concurrency: int) -> AbstractAsyncContextManager[object]:
        """Get ready for a run with so many calls at once."""
        ...

    async def ask(self, call: Call) -> Reply:
        """Answer one call."""
        ...

    def counts(self) -> dict[str, float]:
        """What the transport did since it was opened."""
        ...

    def settings(self) -> dict[str, Any]:
        """What changes the replies beside the call: part of the cache's key."""
        ...


class FunctionBackend:
    """Any ``async (messages) -> str``; messages are in the chat-completions schema.

    Args:
        function: gets ``[{"role": "system", ...}, {"role": "user", "content": [parts]}]``.
        model: its name in records and in the cache's key.
    """

    def __init__(self, function: Ask, model: str = "") -> None:
        if not callable(function):
            raise InputError(
                f"backend is a {type(function).__name__}, wanted a URL, 'transformers:MODEL', "
                "'recorded:FILE' or an async function of messages"
            )
        self.function = function
        self.model = model or getattr(function, "__name__", type(function).__name__)

    def open(self, concurrency: int) -> AbstractAsyncContextManager[object]:  # noqa: ARG002
        """Nothing to open."""
        return _Nothing()

    async def ask(self, call: Call) -> Reply:
        """Await the function.

        Raises:
            InputError: it gave something else than text.
        """
        said = cast("object", await self.function(messages(call)))
        if not isinstance(said, str):
            raise InputError(f"the backend function gave a {type(said).__name__}, wanted text")
        return Reply(mend(said))

    def counts(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Nothing beside the call."""
        return {}


class _Nothing(AbstractAsyncContextManager[object]):
    async def __aexit__(self, *_: object) -> None:
        return None
