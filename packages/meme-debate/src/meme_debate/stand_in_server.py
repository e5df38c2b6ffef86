"""A scripted debater behind a local server of the chat-completions schema; the standard library only.

It looks a picture up by the digest of the bytes it was sent and takes the words from the fence. It errs: it
sees the wrong kind of thing in a fifth of the pictures, and its own verdict is noisy. All it says follows
from picture, words and the model's name, whose number is the seed, so no order and no concurrency changes a
reply.

Started by the demo as ``python -m meme_debate.stand_in_server PICTURES.json``; prints its port.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .loopback import answer, serve

LARGE = ("rocket", "galaxy", "motorcycle")
SMALL = ("cat", "coffee", "clock")
BIG_WORDS = ("giant", "colossus", "titan", "mountain", "mammoth", "huge")
WRONG_KIND, SAME_FORM, REFUSES, BUSY = 0.2, 0.2, 0.01, 0.02
NOISE = 0.7
PHRASES = ("obviously,", "clearly,", "of course,", "as anyone can see,")
REFUSAL = "I'm sorry, but I can't help with that."
FENCE = re.compile(r"===([0-9a-f]{12})===\n(.*?)\n===\1===", re.DOTALL)


@dataclass(frozen=True)
class View:
    """What the debater makes of one meme.

    Args:
        statements: by side.
        better: the side it finds more convincing.
        refuses: the side that it will not speak for, or None.
    """

    statements: Mapping[str, str]
    better: str
    refuses: str | None


@lru_cache(maxsize=4096)
def view(thing: str, words: str, picture: str, seed: int) -> View:
    """What the debater says about a meme, drawn from the seed and the meme alone.

    Args:
        thing: what the picture shows.
        words: on the meme.
        picture: digest of its bytes.
        seed: of the debater.
    """
    key = hashlib.sha256(f"{seed}\n{picture}\n{words}".encode()).digest()
    draws = random.Random(int.from_bytes(key[:8], "big"))  # noqa: S311 - a script, no secret
    large = thing in LARGE or thing == "moon"
    if draws.random() < WRONG_KIND:
        large = not large
        thing = draws.choice(LARGE if large else SMALL)
    says_large = any(word in words.lower() for word in BIG_WORDS)
    said, kind = ("large" if says_large else "small"), ("large" if large else "small")
    believed = "harmful" if says_large != large else "harmless"
    seen = f"the words say {said}, the {thing} is {kind}:"
    evidence = {
        "harmful": f"{seen} praise turned into a jibe.",
        "harmless": f"{seen} a plain line that fits, no jibe.",
    }
    vague = {
        "harmful": f"somebody may feel teased by the line about the {thing}.",
        "harmless": f"only a playful line about the {thing}, nobody is hurt.",
    }
    same = draws.random() < SAME_FORM
    form = draws.random() < 0.5
    statements: dict[str, str] = {}
    strength: dict[str, float] = {}
    for side in ("harmful", "harmless"):
        shown = form if same else side == believed
        count = draws.randrange(3)
        opening = " ".join(draws.choice(PHRASES) for _ in range(count))
        statements[side] = f"{opening} {(evidence if shown else vague)[side]}".strip()
        strength[side] = count + (side == believed) + draws.gauss(0, NOISE)
    better = max(strength, key=strength.__getitem__)
    refuses = "harmful" if draws.random() < REFUSES else None
    return View(statements, better, refuses)


class Script:
    """Answers chat completions; see the module.

    Args:
        pictures: digest of a picture's bytes -> what it shows.
    """

    def __init__(self, pictures: Mapping[str, str]) -> None:
        self.pictures = dict(pictures)
        self.calls = 0
        self._digests: dict[str, str] = {}

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The document that answers one request's."""
        self.calls += 1
        seed = int(str(body.get("model", "0")).rpartition("-")[2] or 0)
        user = next(m for m in body["messages"] if m["role"] == "user")["content"]
        texts = [part["text"] for part in user if part["type"] == "text"]
        url = next((p["image_url"]["url"] for p in user if p["type"] == "image_url"), "")
        digest = self._digest(url)
        said = view(self.pictures.get(digest, "thing"), self._words(texts), digest, seed)
        reply = self._reply("\n".join(texts[1:]) or texts[0], said)
        tokens = {"prompt_tokens": 576 + sum(map(len, texts)) // 4, "completion_tokens": len(reply) // 4}
        return {
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            ],
            "usage": tokens,
        }

    def _digest(self, url: str) -> str:
        found = self._digests.get(url)
        if found is None:
            data = base64.b64decode(url.partition("base64,")[2])
            found = self._digests[url] = hashlib.sha256(data).hexdigest()
        return found

    @staticmethod
    def _words(texts: list[str]) -> str:
        found = FENCE.search(texts[0])
        return found[2] if found else ""

    @staticmethod
    def _reply(task: str, said: View) -> str:
        if "Statement A:" in task:
            quoted = [found[2] for found in FENCE.finditer(task)]
            a_is_better = quoted[0].strip() == said.statements[said.better]
            return json.dumps({"better": "A" if a_is_better else "B"})
        side = "harmless" if "does not fall under the policy" in task else "harmful"
        return REFUSAL if side == said.refuses else said.statements[side]

    def reply(self, body: bytes) -> bytes:
        """A whole HTTP answer to a request's body; now and then the server is busy."""
        if self.calls and self.calls % round(1 / BUSY) == 0:
            self.calls += 1
            return answer(b'{"error": {"message": "busy"}}', 503, "Retry-After: 0\r\n")
        return answer(json.dumps(self.answer(json.loads(body))).encode())


def main() -> None:
    """Serve until standard input ends."""
    serve(Script(json.loads(Path(sys.argv[1]).read_text("utf-8"))).reply)


if __name__ == "__main__":
    main()
