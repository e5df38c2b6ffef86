"""One meme's debate: what is asked in which order, what is kept of the replies, the record that comes out."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from meme_debate import guards, prompts
from meme_debate.backends import Backend, Reply
from meme_debate.cache import ReplyCache, cache_key, prefixed
from meme_debate.meme import DEBATE_SCHEMA, Debate, Meme, check_shown, debate_of
from meme_debate.neighbors import Neighbors, words_of
from meme_debate.pictures import Picture, as_it_is, picture, read_small
from meme_debate.policy import Policy
from meme_debate.prompts import Call, Prompt, Side
from meme_debate.verdict import Vote, decide, first_side, other, parse_verdict

STANCE_TOKENS, REPLY_TOKENS, VERDICT_TOKENS = 256, 160, 32
_WARMER = 0.7  # of the one further try where the same words would come again


@dataclass(frozen=True, slots=True)
class Settings:
    """How debates are held; the fields are :class:`meme_debate.Debater`'s arguments."""

    policy: Policy
    rounds: int
    swap: bool
    verdict: bool
    stances: Literal["serial", "parallel"]
    on_label: Literal["keep", "mask", "retry"]
    structured: bool
    temperature: float
    seed: int
    max_side: int
    on_refusal: Literal["empty", "keep"] = "empty"
    neighbors: Neighbors | None = None


@dataclass(slots=True)
class Counts:
    """What a run asked and got; ``paid`` tokens are those of replies that did not come from the cache."""

    calls: int = 0
    cached: int = 0
    paid_prompt_tokens: int = 0
    paid_completion_tokens: int = 0
    prefix_tokens: int = 0
    flags: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True)
class _Talk:
    """The state of one meme's debate."""

    meme: Meme
    prompt: Prompt
    decided: tuple[str, ...] = ()
    decided_digest: str = ""
    key_head: bytes = b""
    flags: set[str] = field(default_factory=set[str])
    raw: dict[str, str] = field(default_factory=dict[str, str])
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Session:
    """Holds debates with an open backend and cache; made by :meth:`meme_debate.Debater.open`.

    Attributes:
        counts: what was asked so far.
    """

    def __init__(
        self, settings: Settings, backend: Backend, verdict_backend: Backend, cache: ReplyCache | None
    ) -> None:
        self.counts = Counts()
        self._settings = settings
        self._backend, self._verdict_backend = backend, verdict_backend
        self._cache = cache
        self._system = prompts.system(settings.policy)
        self._temperature = number(settings.temperature)
        self._digest = settings.policy.digest()
        self._stances = {side: prompts.stance(side, settings.policy) for side in ("harmful", "harmless")}
        self._key_tails: dict[tuple[int, float, int, int, bool], bytes] = {}
        self._waiting: dict[bytes, asyncio.Future[Reply]] = {}

    async def debate(self, meme: Meme) -> Debate:
        """Hold the debate about one meme.

        Raises:
            DataError: the meme has neither picture nor words.
            InputError: its picture cannot be read.
            BackendError: the model cannot be asked.
        """
        check_shown(meme)
        settings = self._settings
        shown = await self._picture(meme)
        talk = await self._talk(meme, shown)
        rounds: list[dict[str, str]] = []
        for number in range(1, settings.rounds + 1):
            rounds.append(await self._round(talk, number, rounds[-1] if rounds else None))
        last = rounds[-1]
        votes: list[Vote] = []
        if last["harmful"] and last["harmful"] == last["harmless"]:
            talk.flags.add("same_statement")
        elif settings.verdict and all(last.values()):
            first = first_side(meme.id)
            orders = (first, other(first)) if settings.swap else (first,)
            votes = [await self._vote(talk, side, last) for side in orders]
        return self._finished(talk, rounds, votes)

    async def _talk(self, meme: Meme, picture: Picture | None) -> _Talk:
        near = self._settings.neighbors
        found = [] if near is None else await asyncio.to_thread(near.find, meme)
        decided = [(words_of(each), int(each.label or 0)) for each in found]
        words = prompts.prefix(meme.text, meme.caption, picture=picture is not None, decided=decided)
        talk = _Talk(meme, Prompt(self._system, picture, words))
        if found:
            talk.decided = tuple(each.id for each in found)
            talk.decided_digest = _digest(*(f"{label}{text}" for text, label in decided))
        return talk

    async def _picture(self, meme: Meme) -> Picture | None:
        if meme.image is None:
            return None
        name, source, side = f"meme {meme.id!r}: image", meme.image, self._settings.max_side
        if isinstance(source, str | os.PathLike) and (data := read_small(source)) is not None:
            found = as_it_is(data, side, f"{name} {str(source)!r}")
            if found is not None:
                return found
        return await asyncio.to_thread(picture, source, side, name)

    async def _round(self, talk: _Talk, number: int, before: dict[str, str] | None) -> dict[str, str]:
        async def say(side: Side) -> str:
            if before is None:
                return await self._say(talk, side, number, self._stances[side], STANCE_TOKENS)
            suffix = prompts.reply(side, before["harmful"], before["harmless"])
            quoted = _digest(before["harmful"], before["harmless"])
            return await self._say(talk, side, number, suffix, REPLY_TOKENS, quoted)

        if self._settings.stances == "parallel":
            harmful, harmless = await asyncio.gather(say("harmful"), say("harmless"))
        else:  # the second call finds the prefix of the first in the server's cache
            harmful, harmless = await say("harmful"), await say("harmless")
        return {"harmful": harmful, "harmless": harmless}

    async def _say(
        self, talk: _Talk, side: Side, number: int, suffix: str, max_tokens: int, quoted: str = ""
    ) -> str:
        settings = self._settings
        name = f"{side}/{number}"
        reply = await self._ask(self._backend, talk, name, suffix, max_tokens, quoted)
        text = guards.strip_thinking(reply.text)
        if _refused(reply, text):
            talk.raw[name] = reply.text or reply.refusal
            name += "/retry"
            reply = await self._ask(self._backend, talk, name, prompts.retry(suffix), max_tokens, quoted)
            text = guards.strip_thinking(reply.text)
            if _refused(reply, text):
                talk.raw[name] = reply.text or reply.refusal
                talk.flags.add(f"refused_{side}")
                return (text or reply.refusal) if settings.on_refusal == "keep" else ""
        if settings.on_label == "retry" and guards.names_label(text, settings.policy):
            again = await self._ask(
                self._backend, talk, name + "/label", suffix, max_tokens, quoted, warm=True
            )
            new = guards.strip_thinking(again.text)
            if not _refused(again, new) and not guards.names_label(new, settings.policy):
                talk.raw[name] = reply.text
                name, reply, text = name + "/label", again, new
        return self._kept(talk, side, name, reply, text)

    def _kept(self, talk: _Talk, side: Side, name: str, reply: Reply, text: str) -> str:
        settings = self._settings
        if text != reply.text.strip():
            talk.flags.add("thinking")
            talk.raw[name] = reply.text
        if reply.finish_reason == "length":
            talk.flags.add(f"length_{side}")
        if reply.pictures:
            talk.flags.add("picture_in_reply")
        if guards.echoes_order(text, talk.meme.text):
            talk.flags.add("injection_echo")
        if guards.names_label(text, settings.policy):
            talk.flags.add("names_label")
            if settings.on_label == "mask":
                talk.raw[name] = reply.text
                text = guards.mask_labels(text, settings.policy)
        return text

    async def _vote(self, talk: _Talk, a: Side, said: dict[str, str]) -> Vote:
        first, second = said[a], said[other(a)]
        name, suffix, quoted = f"verdict/{a}", prompts.verdict(first, second), _digest(first, second)
        backend = self._verdict_backend
        schema = prompts.VERDICT_SCHEMA if self._settings.structured else None
        reply = await self._ask(backend, talk, name, suffix, VERDICT_TOKENS, quoted, schema=schema)
        better = parse_verdict(reply.text)
        if better is None:
            talk.raw[name] = reply.text or reply.refusal
            name += "/retry"
            reply = await self._ask(
                backend, talk, name, suffix, VERDICT_TOKENS, quoted, schema=schema, warm=True
            )
            better = parse_verdict(reply.text)
        if better is None:
            talk.raw[name] = reply.text or reply.refusal
            talk.flags.add("verdict_unparsed")
        return Vote(a, better)

    async def _ask(
        self, backend: Backend, talk: _Talk, name: str, suffix: str, max_tokens: int, quoted: str = "",
        *, schema: dict[str, Any] | None = None, warm: bool = False,
    ) -> Reply:  # fmt: skip
        settings = self._settings
        temperature = max(self._temperature, _WARMER) if warm else self._temperature
        call = Call(name, talk.prompt, suffix, max_tokens, temperature, settings.seed + int(warm), schema)
        reply = await self._reply(backend, talk, call, quoted)
        talk.calls += 1
        talk.prompt_tokens += reply.prompt_tokens
        talk.completion_tokens += reply.completion_tokens
        self.counts.calls += 1
        return reply

    async def _reply(self, backend: Backend, talk: _Talk, call: Call, quoted: str) -> Reply:
        if self._cache is None:
            return self._paid(await backend.ask(call))
        key = self._key(backend, talk, call, quoted)
        if (running := self._waiting.get(key)) is not None:  # the same meme under another id
            self.counts.cached += 1
            return await asyncio.shield(running)
        if (known := self._cache.get(key)) is not None:
            self.counts.cached += 1
            return known
        promise = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._cache.commit(key, call.name, self._paid(await backend.ask(call)))
            promise.set_result(reply)
        except BaseException as error:
            promise.set_exception(error)
            promise.exception()  # nobody may be waiting
            raise
        finally:
            del self._waiting[key]
        return reply

    def _paid(self, reply: Reply) -> Reply:
        self.counts.paid_prompt_tokens += reply.prompt_tokens
        self.counts.paid_completion_tokens += reply.completion_tokens
        self.counts.prefix_tokens += reply.cached_tokens
        return reply

    def _key(self, backend: Backend, talk: _Talk, call: Call, quoted: str) -> bytes:
        """Sha256 of picture, words, caption, policy, call, version, model and sampling."""
        if not talk.key_head:
            meme, shown = talk.meme, talk.prompt.picture
            talk.key_head = prefixed(
                ("" if shown is None else shown.digest, meme.text, meme.caption, self._digest)
            )
        asked = f"{call.name}:{quoted}{talk.decided_digest}".encode()
        length = len(asked).to_bytes(8, "little")  # as prefixed does
        return sha256(b"".join((talk.key_head, length, asked, self._key_tail(backend, call)))).digest()

    def _key_tail(self, backend: Backend, call: Call) -> bytes:
        kind = (id(backend), call.temperature, call.seed, call.max_tokens, call.schema is not None)
        known = self._key_tails.get(kind)
        if known is None:
            fields = {
                "temperature": call.temperature, "seed": call.seed, "max_tokens": call.max_tokens,
                "structured": call.schema is not None, **backend.settings(),
            }  # fmt: skip
            sampling = json.dumps(fields, sort_keys=True)
            known = self._key_tails[kind] = prefixed((prompts.VERSION, backend.model, sampling))
        return known

    def _finished(self, talk: _Talk, rounds: list[dict[str, str]], votes: list[Vote]) -> Debate:
        settings, last = self._settings, rounds[-1]
        outcome, agreement = decide(votes)
        for flag in talk.flags:
            self.counts.flags[flag] = self.counts.flags.get(flag, 0) + 1
        return debate_of(
            {
                "schema": DEBATE_SCHEMA,
                "id": talk.meme.id,
                "harmful": last["harmful"],
                "harmless": last["harmless"],
                "verdict": outcome,
                "agreement": agreement,
                "votes": [{"a": vote.a, "better": vote.better} for vote in votes],
                "rounds": rounds,
                "flags": sorted(talk.flags),
                "raw": dict(sorted(talk.raw.items())),
                "policy": {"name": settings.policy.name, "digest": self._digest},
                "prompts": prompts.VERSION,
                **({"neighbors": list(talk.decided)} if settings.neighbors is not None else {}),
                "model": self._backend.model,
                "verdict_model": self._verdict_backend.model,
                "sampling": {
                    "temperature": self._temperature,
                    "seed": settings.seed,
                    "max_tokens": STANCE_TOKENS,
                },
                "usage": {
                    "calls": talk.calls,
                    "prompt_tokens": talk.prompt_tokens,
                    "completion_tokens": talk.completion_tokens,
                },
            }
        )


def _refused(reply: Reply, text: str) -> bool:
    return reply.finish_reason == "content_filter" or bool(reply.refusal) or guards.is_refusal(text)


def _digest(*statements: str) -> str:
    return cache_key(statements).hex()


def number(value: float) -> float:
    """0.0 as 0: the same bytes, however it was written."""
    return int(value) if float(value).is_integer() else value
