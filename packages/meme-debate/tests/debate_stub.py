"""A chat-completions server for tests: it reads the task, answers in kind, and fails where it is told to."""

import base64
import hashlib
import io
import json
import re
from collections import Counter

from PIL import Image

from fusion_core.testing.server import FaultServer, Reply
from meme_debate import Meme

WORDS = {
    "harmful": "The picture shows a rocket and the words call it small, which turns praise into mockery.",
    "harmless": "The picture shows a rocket and the words are a mild joke about its size. Nobody is hurt.",
}


def completion(content, finish="stop", refusal=None, **more):
    message = {"role": "assistant", "content": content, "refusal": refusal}
    usage = {"prompt_tokens": 700, "completion_tokens": 40, "prompt_tokens_details": {"cached_tokens": 600}}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage, **more}


def task(request):
    """Which call a request is: harmful/1, harmless/2, verdict ..., from its last text part."""
    suffix = request.json()["messages"][1]["content"][-1]["text"]
    if "Statement A:" in suffix:
        return "verdict"
    side = "harmless" if "does not fall under the policy. " in suffix.split("Task:")[-1] else "harmful"
    return f"{side}/{2 if 'Their last statements' in suffix else 1}"


def answer(request, wins="harmful"):
    """The stub's usual answer; the verdict follows the statements, whichever comes first."""
    kind = task(request)
    body = request.json()
    if kind != "verdict":
        side, _ = kind.split("/")
        mark = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:6]
        return completion(f"{WORDS[side]} Mark {mark}.")
    suffix = body["messages"][1]["content"][-1]["text"]
    first, second = re.findall(r"Statement [AB]:\n===\w+===\n(.*?)\n===", suffix, re.DOTALL)
    a = "harmful" if first.startswith(WORDS["harmful"]) else "harmless"
    assert first != second
    return completion('{"better": "%s"}' % ("A" if a == wins else "B"))


class Stub(FaultServer):
    """``faults`` maps a call's number (from 0) to a reply; the other calls get the usual answer."""

    def __init__(self, faults=None, make=answer):
        self.faults = dict(faults or {})
        self.count = 0
        self.make = make
        super().__init__(self._step)

    def _step(self, request):
        with self._lock:
            number, self.count = self.count, self.count + 1
        fault = self.faults.get(number)
        return fault if fault is not None else Reply(json=self.make(request))

    @property
    def v1(self):
        return self.url + "/v1"

    def tasks(self):
        return [task(request) for request in self.requests]

    def repeats(self):
        """Bodies that came more than once."""
        return [body for body, times in Counter(r.body for r in self.requests).items() if times > 1]


def jpeg(color=(200, 40, 40), size=(32, 24)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "JPEG")
    return out.getvalue()


def memes(folder, count=3):
    found = []
    for i in range(count):
        path = folder / f"{i}.jpg"
        path.write_bytes(jpeg((i * 7 % 256, 40, 40)))
        found.append(Meme(f"m{i}", path, f"what a giant, number {i}", "a photograph"))
    return found


def sent_picture(request):
    url = request.json()["messages"][1]["content"][0]["image_url"]["url"]
    return base64.b64decode(url.split(",", 1)[1])
