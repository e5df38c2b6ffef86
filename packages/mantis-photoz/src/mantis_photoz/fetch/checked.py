"""The core's HTTP client, for which an answer that is not what was asked for counts as a failed try."""

from __future__ import annotations

from typing import Any

from fusion_core.http import Client, Response
from mantis_photoz.errors import CutoutError


class CheckedClient(Client):
    """A client whose requests take ``check``: a function of the body that raises :class:`CutoutError`.

    A page in place of an image is a server's passing fault, like a 502: it is tried again, within the same
    number of tries and with the same waits.
    """

    async def __aenter__(self) -> CheckedClient:
        """Open the session."""
        await super().__aenter__()
        # aiohttp silently sends a GET again where a kept connection was closed; tries are counted here.
        self._session._retry_connection = False
        return self

    async def _once(self, method: str, url: str, kw: dict[str, Any], tries: int) -> Response:
        rest = {name: value for name, value in kw.items() if name != "check"}
        answer = await super()._once(method, url, rest, tries)
        check = kw.get("check")
        if check is not None and 200 <= answer.status < 300:
            try:
                check(answer.body)
            except CutoutError as error:
                return Response(502, {}, " ".join(str(error).split()).encode(), tries)
        return answer
