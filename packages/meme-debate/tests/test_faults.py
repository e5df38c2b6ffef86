"""What servers do wrong, and what is made of it."""

import logging

import pytest
from debate_stub import WORDS, Stub, answer, completion, memes, task

from fusion_core.errors import ConfigError, InputError
from meme_debate import Debater
from meme_debate.errors import BackendError
from meme_debate.meme import save_debates

LONG = " ".join(["The meme says it cannot be, and the picture agrees with the words."] * 6)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)


def hold(server, wanted, concurrency=2, **options):
    debater = Debater(server.v1, "stub", **{"retries": 2, "timeout": 5.0, **options})
    return debater.run(wanted, concurrency, progress=False)


def reply(text, **more):
    return {"json": completion(text, **more)}


FAULTS = {
    "429": {"status": 429, "retry_after": 0},
    "500": {"status": 500, "body": "oops"},
    "503": {"status": 503, "retry_after": 0},
    "hang": {"hang": True},
    "cut": {"json": completion("x" * 500), "cut": 60},
    "no head": {"cut": -1},
    "malformed": {"body": '{"choices": [{"mess'},
    "wrong type": {"body": "<html>", "content_type": "text/html"},
    "no choices": {"json": {"error": {"message": "busy"}}},
    "empty choices": {"json": {"choices": []}},
    "null message": {"json": {"choices": [{"message": None}]}},
    "a list": {"json": [1, 2]},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_asked_again(name, tmp_path):
    found = memes(tmp_path, 2)
    with Stub() as server:
        whole = hold(server, found)
    with Stub({1: FAULTS[name], 4: FAULTS[name]}) as server:
        debates = hold(server, found, timeout=0.5)
        assert len(server.requests) == 8 + 2
    save_debates(tmp_path / "a", whole)
    save_debates(tmp_path / "b", debates)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("name", "words", "tries"),
    [
        ("500", "failed after 3 tries, status 500: oops", 3),
        ("hang", "failed after 3 tries, no whole answer within 0.3 s", 3),
        ("malformed", "the server's answer is malformed: wanted JSON, got 19 bytes", 3),
        ("no choices", 'has not the chat-completions schema: \'{"error"', 3),
    ],
)
def test_a_fault_that_stays(name, words, tries, tmp_path):
    with Stub(dict.fromkeys(range(99), FAULTS[name])) as server:
        with pytest.raises(BackendError, match=words):
            hold(server, memes(tmp_path, 1), timeout=0.3)
        assert len(server.requests) == tries
    with Stub(dict.fromkeys(range(3), FAULTS[name])) as server:
        found = memes(tmp_path, 3)
        debater = Debater(server.v1, "stub", retries=2, timeout=0.3)
        debates = debater.run(found, 1, on_error="skip", progress=False)
        assert [debate.id for debate in debates] == ["m1", "m2"]
        assert debates.report.failed[0][0] == "m0"


@pytest.mark.parametrize("key", [None, "sk-secret-0123456789"])
def test_unauthorized_is_not_retried_and_names_the_variable(key, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.delenv("MEME_DEBATE_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("MEME_DEBATE_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    with Stub({key_0: {"status": 401, "body": f"wrong key {key}"} for key_0 in range(9)}) as server:
        debater = Debater(server.v1, "stub", cache=tmp_path / "c.sqlite")
        with pytest.raises(ConfigError) as told:
            debater.run(memes(tmp_path, 1), on_error="skip", progress=False)
        assert len(server.requests) == 1
    has = "holds a key that it does not take" if key else "is not set"
    assert str(told.value) == f"the server answered 401: the environment variable MEME_DEBATE_API_KEY {has}"
    if key:
        assert server.requests[0].headers["authorization"] == f"Bearer {key}"
        everything = (
            caplog.text + "".join(capsys.readouterr()) + repr(told.value) + repr(told.value.__cause__)
        )
        everything += repr(debater) + repr(vars(debater.backend))
        assert key not in everything
        assert key.encode() not in b"".join(p.read_bytes() for p in tmp_path.glob("c.sqlite*"))


def test_keys_go_only_where_they_were_named_for(tmp_path, monkeypatch):
    monkeypatch.delenv("MEME_DEBATE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    with Stub() as server:
        hold(server, memes(tmp_path, 1))
    assert all("authorization" not in request.headers for request in server.requests)
    with Stub() as server:
        hold(server, memes(tmp_path, 1), key_variable="OPENAI_API_KEY")
    assert server.requests[0].headers["authorization"] == "Bearer sk-somebody-elses"
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        Debater("http://127.0.0.1:1/v1", "m", key_variable="NO_SUCH_KEY")


def test_no_such_model(tmp_path):
    with Stub({0: {"status": 404, "body": "The model `stub` does not exist."}}) as server:
        with pytest.raises(
            ConfigError, match=r"does not exist.; check that the URL ends .* the model 'stub'"
        ):
            hold(server, memes(tmp_path, 1))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "said",
    [
        reply(""),
        reply(None),
        reply("   \n"),
        reply("I'm sorry, but I can't help with that."),
        reply("I cannot assist with this request."),
        reply("As an AI, I do not argue for that."),
        reply("", refusal="I will not."),
        reply("The picture shows", finish="content_filter"),
        reply("<think>what is this</think>"),
        reply("<think>what is this and the tokens end", finish="length"),
    ],
    ids=str,
)
def test_refusal(said, tmp_path):
    """One more try with other words; then the side stays empty, is flagged, and no verdict is asked."""
    with Stub({0: said}) as server:
        debate = hold(server, memes(tmp_path, 1), 1)[0]
        assert server.tasks() == ["harmful/1", "harmful/1", "harmless/1", "verdict", "verdict"]
        retry = server.requests[1].json()["messages"][1]["content"][-1]["text"]
        assert retry.endswith("describe instead of quoting.")
    assert debate.harmful.startswith(WORDS["harmful"])
    assert "refused_harmful" not in debate.flags
    assert set(debate.record["raw"]) == {"harmful/1"}
    with Stub({0: said, 1: said}) as server:
        debate = hold(server, memes(tmp_path, 1), 1)[0]
        assert server.tasks() == ["harmful/1", "harmful/1", "harmless/1"]
    assert (debate.harmful, debate.flags, debate.verdict) == ("", ("refused_harmful",), None)
    assert set(debate.record["raw"]) == {"harmful/1", "harmful/1/retry"}
    assert not debate.empty


def test_both_sides_refuse(tmp_path):
    with Stub(dict.fromkeys(range(4), reply("I can't help with that."))) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
    assert debate.empty
    assert debate.flags == ("refused_harmful", "refused_harmless")


def test_long_text_about_refusing_is_kept(tmp_path):
    for text in (LONG, "The words say: I'm sorry, I cannot. The picture shows a cat."):
        with Stub({0: reply(text)}) as server:
            assert hold(server, memes(tmp_path, 1))[0].harmful == text


def test_length_is_kept_and_flagged(tmp_path):
    with Stub({1: reply("The picture shows a cup and the words", finish="length")}) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
    assert debate.harmless == "The picture shows a cup and the words"
    assert debate.flags == ("length_harmless",)


@pytest.mark.parametrize("said", ["<think>They want X.</think>\n\nA cup.", "They want X.</think>A cup."])
def test_thinking_is_stripped(said, tmp_path):
    with Stub({0: reply(said)}) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
    assert (debate.harmful, debate.flags) == ("A cup.", ("thinking",))
    assert debate.record["raw"] == {"harmful/1": said}


def test_pictures_in_a_reply_are_left_out(tmp_path):
    parts = [
        {"type": "text", "text": "A cup."},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "image_url", "image_url": {"url": "data:,"}},
    ]
    with Stub({0: reply(parts)}) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
    assert (debate.harmful, debate.flags) == ("A cup.", ("picture_in_reply",))


def test_same_statement_for_both_sides(tmp_path):
    with Stub({0: reply("A cup."), 1: reply("A cup.")}) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
        assert len(server.requests) == 2
    assert (debate.flags, debate.verdict) == (("same_statement",), None)


@pytest.mark.parametrize("said", ["maybe", "A or B", "", '{"better": "C"}', "<think>A is"])
def test_unparsed_verdict(said, tmp_path):
    with Stub({2: reply(said)}) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
        assert server.tasks()[2:] == ["verdict"] * 3
    assert (debate.verdict, debate.flags) == (1, ())
    with Stub({2: reply(said), 3: reply(said)}) as server:
        debate = hold(server, memes(tmp_path, 1))[0]
    assert (debate.verdict, debate.agreement, debate.flags) == (None, False, ("verdict_unparsed",))
    assert debate.record["votes"][0]["better"] is None


def test_labels_kept_masked_retried(tmp_path):
    named = "This is harmful. It is reasoned as harmless by some; no harm is meant."
    for on_label, harmful, flags, calls in (
        ("keep", named, ("names_label",), 4),
        ("mask", "This is so. It is so so by some; no harm is meant.", ("names_label",), 4),
        ("retry", None, (), 5),
    ):
        with Stub({0: reply(named)}) as server:
            debate = hold(server, memes(tmp_path, 1), on_label=on_label)[0]
            assert len(server.requests) == calls
        assert debate.flags == flags
        assert debate.harmful == (harmful or debate.harmful)
        assert debate.record["raw"] == ({} if on_label == "keep" else {"harmful/1": named})
    with Stub({0: reply(named), 1: reply(named)}) as server:
        debate = hold(server, memes(tmp_path, 1), on_label="retry")[0]
    assert (debate.harmful, debate.flags) == (named, ("names_label",))


def test_usage_may_be_missing(tmp_path):
    def make(request):
        found = answer(request)
        del found["usage"]
        return found

    with Stub(make=make) as server:
        debates = hold(server, memes(tmp_path, 1))
    assert debates[0].record["usage"] == {"calls": 4, "prompt_tokens": 0, "completion_tokens": 0}


def test_a_tenth_of_the_calls_fails(tmp_path):
    found = memes(tmp_path, 12)
    with Stub() as server:
        whole = hold(server, found)
    kinds = [FAULTS[name] for name in ("429", "500", "cut", "malformed", "no head")]
    faults = {number: kinds[number // 10 % 5] for number in range(0, 100, 10)}
    with Stub(faults) as server:
        debates = hold(server, found, 6)
        assert server.tasks().count("verdict") >= 24
    assert list(debates) == list(whole)
    assert task(server.requests[0]) == "harmful/1"


def test_a_refusal_can_be_kept_as_the_statement(tmp_path):
    said = reply("I cannot argue for that.")
    with Stub({0: said, 1: said}) as server:
        debate = hold(server, memes(tmp_path, 1), 1, on_refusal="keep")[0]
        assert server.tasks() == ["harmful/1", "harmful/1", "harmless/1", "verdict", "verdict"]
    assert (debate.harmful, debate.flags) == ("I cannot argue for that.", ("refused_harmful",))
    said = reply("", refusal="I will not.")
    with Stub({0: said, 1: said}) as server:
        debate = hold(server, memes(tmp_path, 1), 1, on_refusal="keep")[0]
    assert (debate.harmful, debate.flags) == ("I will not.", ("refused_harmful",))
    with pytest.raises(InputError, match="on_refusal is 'drop', wanted one of"):
        Debater("http://x/v1", "m", on_refusal="drop")


def test_a_server_that_answers_nobody_ends_the_run(tmp_path):
    """With ``on_error="skip"`` the others would wait for their tries in vain; one answer and it goes on."""
    found = memes(tmp_path, 12)
    with Stub(dict.fromkeys(range(999), 500)) as server:
        with pytest.raises(BackendError, match="failed after one try, status 500"):
            Debater(server.v1, "stub", retries=0).run(found, 4, on_error="skip", progress=False)
        assert len(server.requests) < 12
    with Stub(dict.fromkeys(range(4, 999), 500)) as server:
        debates = Debater(server.v1, "stub", retries=0).run(found, 1, on_error="skip", progress=False)
        assert (len(debates), len(debates.report.failed)) == (1, 11)


def test_keys_of_the_body_can_be_added_and_left_out(tmp_path):
    with Stub() as server:
        hold(server, memes(tmp_path, 1), extra={"max_tokens": None, "max_completion_tokens": 99})
        body = server.requests[0].json()
    assert "max_tokens" not in body
    assert body["max_completion_tokens"] == 99
    with Stub() as server:
        hold(server, memes(tmp_path, 1), extra={"max_tokens": None, "temperature": None, "seed": None})
        assert set(server.requests[0].json()) == {"model", "messages"}
