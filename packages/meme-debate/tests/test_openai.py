"""The ``openai`` client as a backend, against a local server."""

import asyncio
import base64
import sys

import pytest
from debate_stub import Stub, answer, completion, memes, sent_picture, task

from fusion_core.errors import ConfigError, InputError, MissingExtraError
from meme_debate import Debater
from meme_debate.errors import BackendError
from meme_debate.meme import save_debates

openai = pytest.importorskip("openai", reason="needs the extra openai")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def hold(server, wanted, monkeypatch, **options):
    monkeypatch.setenv("OPENAI_BASE_URL", server.v1)
    return Debater("openai:stub", **{"retries": 0, **options}).run(wanted, 4, progress=False)


def test_the_debate_is_that_of_the_own_transport(tmp_path, monkeypatch):
    found = memes(tmp_path, 3)
    with Stub() as server:
        ours = Debater(server.v1, "stub").run(found, 4, progress=False)
    with Stub() as server:
        theirs = hold(server, found, monkeypatch, cache=tmp_path / "c.sqlite")
        assert sorted(server.tasks()) == sorted(["harmful/1", "harmless/1", "verdict", "verdict"] * 3)
        assert server.requests[0].headers["authorization"] == "Bearer sk-nobody"
        assert base64.b64encode(sent_picture(server.requests[0]))
        again = hold(server, found, monkeypatch, cache=tmp_path / "c.sqlite")
        assert (again.report.cached, len(server.requests)) == (12, 12)
    for name, debates in (("a", ours), ("b", theirs)):
        save_debates(tmp_path / name, debates)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert theirs.report.prefix_tokens == 3 * 4 * 600


def test_a_client_of_ones_own(tmp_path):
    found = memes(tmp_path, 1)
    with Stub() as server:

        async def main():
            async with openai.AsyncOpenAI(base_url=server.v1, api_key="sk-mine", max_retries=0) as client:
                debater = Debater(
                    client, "deployment", verdict_model="other", extra={"seed": None, "top_k": 5}
                )
                return await debater.arun(found, progress=False)

        debate = asyncio.run(main())[0]
    bodies = [request.json() for request in server.requests]
    assert [body["model"] for body in bodies] == ["deployment"] * 2 + ["other"] * 2
    assert all("seed" not in body and body["top_k"] == 5 for body in bodies)
    assert (debate.record["model"], debate.record["verdict_model"]) == ("deployment", "other")
    assert server.requests[0].headers["authorization"] == "Bearer sk-mine"


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, ConfigError, "the server answered 401: check OPENAI_API_KEY"),
        (403, ConfigError, "the server answered 403"),
        (404, ConfigError, "the server knows no model 'stub'"),
        (500, BackendError, "the openai client gave up: .*500"),
    ],
)
def test_faults(status, error, words, tmp_path, monkeypatch):
    with Stub(dict.fromkeys(range(9), status)) as server:
        with pytest.raises(error, match=words):
            hold(server, memes(tmp_path, 1), monkeypatch)
        assert len(server.requests) == 1


def test_malformed_answers(tmp_path, monkeypatch):
    empty = lambda request: {"choices": []} if task(request) == "harmful/1" else answer(request)
    with Stub(make=empty) as server, pytest.raises(BackendError, match="has not the chat-completions schema"):
        hold(server, memes(tmp_path, 1), monkeypatch)
    refused = lambda r: completion(None, refusal="No.") if task(r) == "harmful/1" else answer(r)
    with Stub(make=refused) as server:
        assert hold(server, memes(tmp_path, 1), monkeypatch)[0].flags == ("refused_harmful",)


def test_without_a_key_or_the_extra(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match=r"the openai client does not start: .*OPENAI_API_KEY"):
        Debater("openai:stub").run(memes(tmp_path, 1), progress=False)
    with pytest.raises(InputError, match="model is empty"):
        Debater(openai.AsyncOpenAI(api_key="x"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r'pip install "meme-debate\[openai\]"'):
        Debater("openai:stub")
