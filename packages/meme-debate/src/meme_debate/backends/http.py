"""Any server of the chat-completions schema: vLLM, SGLang, llama.cpp, Ollama, hosted ones."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, cast
from urllib.parse import urlsplit

from fusion_core.errors import ConfigError, InputError
from fusion_core.http import Client, RequestError, Response
from meme_debate.backends import Reply
from meme_debate.errors import BackendError
from meme_debate.meme import mend
from meme_debate.prompts import Call, Prompt

KEY_VARIABLE = "MEME_DEBATE_API_KEY"
_OWN_KEYS = {"api.openai.com": "OPENAI_API_KEY"}
_MALFORMED_TRIES = 3
_HEADERS = {"Content-Type": "application/json"}


class HttpBackend:
    """Calls ``POST url/chat/completions``; the picture travels as a data URL.

    Args:
        url: base address, such as ``"http://localhost:8000/v1"``.
        model: name of the model on that server.
        timeout: seconds of one try.
        retries: after the first, for 429, 5xx, timeouts and cut connections.
        rate: most requests per second, None for no limit.
        key_variable: the environment variable that holds the key; MEME_DEBATE_API_KEY by default, and
            OPENAI_API_KEY for api.openai.com. A key is never sent to a server it was not named for.
        extra: further keys of the request's body; None as a value leaves a key of ours out.

    Raises:
        InputError: no http(s) URL, or no model.
        ConfigError: ``key_variable`` is given and not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        rate: float | None = None,
        key_variable: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not model:
            raise InputError("model is empty; name the model that the server runs")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url is {url[:80]!r}, wanted one such as http://localhost:8000/v1")
        self.model = model
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.key_variable = key_variable or _OWN_KEYS.get(parts.hostname, KEY_VARIABLE)
        if key_variable is not None and not os.environ.get(key_variable):
            raise ConfigError(f"the environment variable {key_variable} is not set; put the key into it")
        self.extra = dict(extra or {})
        self._client_options: dict[str, Any] = {"timeout": timeout, "retries": retries, "rate": rate}
        self._client: Client | None = None
        self._open = self._lent = False
        self._borrower: HttpBackend | None = None
        self._tails: dict[tuple[int, float, int, bool], bytes] = {}

    def for_model(self, model: str) -> HttpBackend:
        """The same server, another model, through the same connections."""
        other = HttpBackend.__new__(HttpBackend)
        other.__dict__.update(self.__dict__)
        other.model, other._lent = model, True
        self._borrower = other
        return other

    @asynccontextmanager
    async def open(self, concurrency: int) -> AsyncGenerator[HttpBackend, None]:
        """Open the connections."""
        if self._lent:
            yield self
            return
        key = os.environ.get(self.key_variable)
        headers = {**_HEADERS, **({"Authorization": f"Bearer {key}"} if key else {})}
        if self._open:
            raise InputError("this debater runs already; make another one for a second run at the same time")
        async with Client(
            concurrency, headers=headers, follow_redirects=False, **self._client_options
        ) as client:
            self._client, self._open = client, True
            if self._borrower is not None:
                self._borrower._client = client
            try:
                yield self
            finally:
                self._open = False

    async def ask(self, call: Call) -> Reply:
        """Send a call until it is answered or given up.

        Raises:
            ConfigError: the server wants another key, or knows neither the path nor the model.
            BackendError: it cannot be reached, or does not answer in the schema.
        """
        if self._client is None:
            raise InputError("the backend is closed; open it first")
        body = self.body(call)
        for turn in range(_MALFORMED_TRIES):
            try:
                answer = await self._client.request("POST", self.url, data=body)
            except RequestError as error:
                raise self._told(error) from error
            try:
                return read_reply(answer)
            except BackendError:
                if turn + 1 == _MALFORMED_TRIES:
                    raise
        raise AssertionError("unreachable")

    def body(self, call: Call) -> bytes:
        """The request's body: what the meme's calls share is made once, the rest is put behind it."""
        head = call.prompt.built.get(self.model)
        if head is None:
            head = call.prompt.built[self.model] = self._head(call.prompt)
        kind = (call.max_tokens, call.temperature, call.seed, call.schema is not None)
        tail = self._tails.get(kind)
        if tail is None:
            tail = self._tails[kind] = self._tail(call)
        return b"".join((*head, _text(call.suffix), b"}]}]", tail))

    def _tail(self, call: Call) -> bytes:
        rest = sampling(call, self.extra)
        return b",%b" % _json(rest)[1:] if rest else b"}"

    def _head(self, prompt: Prompt) -> tuple[bytes, ...]:
        """The pieces of the body before the task; the picture is copied only when a body is put together."""
        start = b'{"model":%b,"messages":[{"role":"system","content":%b},{"role":"user","content":[' % (
            _json(self.model), _json(prompt.system),
        )  # fmt: skip
        words = b'{"type":"text","text":%b},{"type":"text","text":' % _json(prompt.prefix)
        if (shown := prompt.picture) is None:
            return start, words
        url = b'{"type":"image_url","image_url":{"url":"data:%b;base64,' % shown.media.encode()
        return start, url, shown.data, b'"}},', words

    def counts(self) -> dict[str, float]:
        """Requests, tries, retries, bytes, seconds waited."""
        return {} if self._client is None or self._lent else self._client.stats.to_dict()

    def settings(self) -> dict[str, Any]:
        """The extra keys of the body."""
        return self.extra

    def _told(self, error: RequestError) -> Exception:
        if error.status in (401, 403):
            has = "holds a key that it does not take" if os.environ.get(self.key_variable) else "is not set"
            return ConfigError(
                f"the server answered {error.status}: the environment variable {self.key_variable} {has}"
            )
        if error.status in (404, 405):
            return ConfigError(
                f"{error}; check that the URL ends where /chat/completions begins, "
                f"and the model {self.model!r}"
            )
        return BackendError(str(error))


_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _json(value: Any) -> bytes:
    return _ENCODE(value).encode()


@lru_cache(maxsize=256)
def _text(suffix: str) -> bytes:
    """A task as JSON; those of the first round are the same for all memes."""
    return _ENCODE(suffix).encode()


def sampling(call: Call, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a request beside model and messages.

    Args:
        call: its sampling and schema.
        extra: further keys, which win; None as a value leaves a key out (some servers refuse ``max_tokens``).
    """
    found: dict[str, Any] = {
        "max_tokens": call.max_tokens, "temperature": call.temperature, "seed": call.seed,
    }  # fmt: skip
    if call.schema is not None:
        found["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": call.schema},
        }
    return {name: value for name, value in (found | dict(extra)).items() if value is not None}


def read_reply(answer: Response) -> Reply:
    """The reply in an answer.

    Raises:
        BackendError: no JSON, or none of the chat-completions schema.
    """
    try:
        data = answer.json()
    except RequestError as error:
        raise BackendError(f"the server's answer is malformed: {error}") from error
    return reply_of(data)


def reply_of(data: Any) -> Reply:
    """The reply in a document of the chat-completions schema.

    Raises:
        BackendError: it is none.
    """
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content = message.get("content")
        parts = cast("list[Any]", content) if isinstance(content, list) else []
        text = content if isinstance(content, str) else ""
        if parts:
            text = "".join(part["text"] for part in parts if part.get("type") == "text")
        usage = data.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        return Reply(
            mend(text),
            str(choice.get("finish_reason") or "stop"),
            mend(str(refusal)) if (refusal := message.get("refusal")) else "",
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            int(details.get("cached_tokens") or 0),
            sum(part.get("type") != "text" for part in parts) if parts else 0,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        shown = json.dumps(data, default=str)[:120]
        raise BackendError(f"the server's answer has not the chat-completions schema: {shown!r}") from error
