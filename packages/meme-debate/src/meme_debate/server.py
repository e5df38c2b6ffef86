"""``meme-debate serve``: cards over HTTP, on the loopback address by default (extra ``serve``)."""

from __future__ import annotations

import asyncio
import base64
import binascii
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fusion_core.errors import FusionError, InputError, check_range, require_extra
from fusion_core.serve import MAX_BODY, secure
from meme_debate import __version__
from meme_debate.debate import Debater
from meme_debate.meme import MAX_PIXELS, Debate, Meme, check_shown
from meme_debate.talking import Session

MAX_MEMES = 32


class DebateIn(BaseModel):
    """The case for each side, where the caller has it already."""

    model_config = ConfigDict(extra="ignore")
    harmful: str
    harmless: str
    verdict: int | None = None


class MemeIn(BaseModel):
    """A meme: its picture as base64 of a file (or a data URL), the words on it."""

    model_config = ConfigDict(extra="ignore")
    id: str = Field(default="meme", min_length=1, max_length=200)
    text: str = ""
    caption: str = ""
    image: str | None = None
    debate: DebateIn | None = None


class DetectRequest(BaseModel):
    """Memes to judge."""

    model_config = ConfigDict(extra="forbid")
    memes: list[MemeIn] = Field(min_length=1)


class Detector:
    """Holds debates side by side, judges one request at a time, and counts.

    Args:
        judge: a :class:`TextJudge` or :class:`Judge`.
        debater: argues about memes that come without a debate; None judges them by words and picture.
        threshold: harmful from this score on; None takes the judge's own.
        max_memes: most memes of one request.
        concurrency: debates at once.
    """

    def __init__(
        self,
        judge: Any,
        debater: Debater | None = None,
        threshold: float | None = None,
        max_memes: int = MAX_MEMES,
        concurrency: int = 16,
    ) -> None:
        self.judge, self.debater = judge, debater
        self.threshold = None if threshold is None else check_range("threshold", threshold, 0.0, 1.0)
        self.max_memes = int(check_range("max_memes", max_memes, 1, 1 << 20))
        self.decisions: dict[str, int] = {"harmful": 0, "harmless": 0, "abstain": 0}
        self.concurrency = concurrency
        self._session: Session | None = None
        self._lock = threading.Lock()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Keep the debater's connections and cache open for all requests."""
        if self.debater is None:
            yield
            return
        async with self.debater.open(self.concurrency) as session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    async def detect(self, memes: Sequence[MemeIn]) -> list[dict[str, Any]]:
        """The cards of some memes, in their order.

        Raises:
            InputError: too many memes, a picture that is none, an id that occurs twice.
            BackendError: the debater's server gave no answer.
        """
        if len(memes) > self.max_memes:
            raise InputError(f"memes holds {len(memes)} entries, wanted at most {self.max_memes}")
        if len({meme.id for meme in memes}) < len(memes):
            raise InputError("memes holds an id that is there twice; ids have to differ")
        wanted = await asyncio.to_thread(lambda: [read_meme(meme) for meme in memes])
        both = list(zip(wanted, memes, strict=True))
        debates = [
            Debate(meme.id, given.debate.harmful, given.debate.harmless, given.debate.verdict)
            for meme, given in both
            if given.debate is not None
        ]
        if self._session is not None:
            hold = self._session.debate
            debates += await asyncio.gather(*(hold(meme) for meme, given in both if given.debate is None))
        return await asyncio.to_thread(self._judge, wanted, debates)

    def _judge(self, memes: list[Meme], debates: list[Debate]) -> list[dict[str, Any]]:
        from meme_debate import detect

        with self._lock:
            cards = [card.to_dict() for card in detect(memes, debates, self.judge, threshold=self.threshold)]
            for card in cards:
                self.decisions[card["decision"]] += 1
        return cards

    def gauges(self) -> dict[str, float]:
        """Numbers of ``/metrics``."""
        found = {f"meme_debate_decisions_{name}": float(count) for name, count in self.decisions.items()}
        if self._session is not None:
            counts = self._session.counts
            found |= {"meme_debate_calls": counts.calls, "meme_debate_calls_cached": counts.cached}
        return found


def read_meme(given: MemeIn) -> Meme:
    """The meme of a request; its picture is decoded, no address in it is ever fetched.

    Raises:
        InputError: the picture is no base64, or no picture.
    """
    return check_shown(Meme(given.id, _image(given), given.text, given.caption))


def _image(given: MemeIn) -> Any:
    if given.image is None:
        return None
    from PIL import Image

    from fusion_core.images import read_image

    head, comma, rest = given.image.partition(",")
    text = rest if comma and head.startswith("data:") else given.image
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"meme {given.id!r}: image is no base64; send the bytes of a file so, no address is fetched"
        ) from error
    try:
        return Image.fromarray(read_image(data, max_pixels=MAX_PIXELS))
    except InputError as error:
        raise InputError(f"meme {given.id!r}: {error}") from error


def create_app(detector: Detector, max_body: int = MAX_BODY) -> Any:
    """The FastAPI application: ``POST /v1/detect``, ``GET /healthz``, ``GET /metrics``.

    Args:
        detector: judges the requests.
        max_body: largest request in bytes.

    Raises:
        MissingExtraError: FastAPI is not installed.
    """
    fastapi: Any = require_extra("fastapi", "serve", "meme-debate")

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncGenerator[None, None]:
        async with detector.open():
            yield

    app = fastapi.FastAPI(
        title="meme-debate", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )

    @app.post("/v1/detect")
    async def answer(request: DetectRequest) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        try:
            return {"cards": await detector.detect(request.memes)}
        except InputError as error:
            raise fastapi.HTTPException(422, " ".join(str(error).split())) from error
        except FusionError as error:
            raise fastapi.HTTPException(502, " ".join(str(error).split())) from error

    return secure(app, max_body, gauges=detector.gauges)
