"""The ``openai`` client (extra ``openai``), for deployments that need its ways to authenticate."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fusion_core.errors import ConfigError, InputError, require_extra
from meme_debate.backends import Reply
from meme_debate.backends.http import reply_of, sampling
from meme_debate.errors import BackendError
from meme_debate.prompts import Call, messages


class OpenAIBackend:
    """Calls ``client.chat.completions.create``.

    The package's own transport, which a URL gets, is several times faster; this is for Azure and other
    deployments that the client knows how to reach.

    Args:
        model: name of the model, or of the deployment.
        client: an ``openai.AsyncOpenAI`` or one of its relatives, which stays open; None makes one for each
            run, from OPENAI_API_KEY, OPENAI_BASE_URL and what else the client reads.
        timeout: seconds of one try.
        retries: after the first.
        extra: further keys of the request's body; None as a value leaves a key of ours out.

    Raises:
        InputError: no model.
        MissingExtraError: the client is not installed.
    """

    def __init__(
        self,
        model: str,
        client: Any = None,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not model:
            raise InputError("model is empty; name the model or the deployment")
        self.model = model
        self.extra = dict(extra or {})
        self._openai: Any = require_extra("openai", "openai", "meme-debate")
        self._given, self._client = client, client
        self._options = {"timeout": timeout, "max_retries": retries}

    @asynccontextmanager
    async def open(self, concurrency: int) -> AsyncGenerator[OpenAIBackend, None]:  # noqa: ARG002
        """Open a client, unless one was given.

        Raises:
            ConfigError: the client finds no key.
        """
        if self._given is not None:
            yield self
            return
        try:
            client = self._openai.AsyncOpenAI(**self._options)
        except self._openai.OpenAIError as error:
            raise ConfigError(f"the openai client does not start: {error}") from error
        async with client:
            self._client = client
            try:
                yield self
            finally:
                self._client = None

    async def ask(self, call: Call) -> Reply:
        """Send a call; the client itself repeats what failed.

        Raises:
            ConfigError: the server wants another key, or knows no such model.
            BackendError: it cannot be reached, or does not answer in the schema.
        """
        if self._client is None:
            raise InputError("the backend is closed; open it first")
        unwanted = {name: value for name, value in self.extra.items() if value is None}
        further = {name: value for name, value in self.extra.items() if value is not None}
        try:
            answer = await self._client.chat.completions.create(
                model=self.model, messages=messages(call), extra_body=further, **sampling(call, unwanted)
            )
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
            raise ConfigError(
                f"the server answered {error.status_code}: check OPENAI_API_KEY, or the client that was given"
            ) from error
        except self._openai.NotFoundError as error:
            raise ConfigError(f"the server knows no model {self.model!r}: {error}") from error
        except self._openai.OpenAIError as error:
            raise BackendError(f"the openai client gave up: {error}") from error
        return reply_of(answer.model_dump())

    def counts(self) -> dict[str, float]:
        """Nothing is counted: the client's tries are its own."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The extra keys of the body."""
        return self.extra

    def for_model(self, model: str) -> OpenAIBackend:
        """The same client, another model."""
        return OpenAIBackend(
            model, self._given, timeout=self._options["timeout"], retries=int(self._options["max_retries"]),
            extra=self.extra,
        )  # fmt: skip
