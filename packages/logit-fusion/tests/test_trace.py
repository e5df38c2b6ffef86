"""Traces: what they hold, how they are written, shown and read back."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from fusion_core.errors import DataError, InputError
from logit_fusion.model import FusedModel
from logit_fusion.trace import FusionTrace

pytestmark = pytest.mark.filterwarnings("ignore:no end-of-sequence")
ARRAYS = (
    "alpha",
    "f",
    "r",
    "kl_forward",
    "loss",
    "expert",
    "entropy",
    "log_prob",
    "token",
    "sequence",
    "certified",
)


@pytest.fixture(scope="module")
def fused(large, base, experts, make):
    return FusedModel(large, base, experts, tokenizer=make.letters())


@pytest.fixture(scope="module")
def traced(fused, batch):
    return fused.generate(**batch, max_new_tokens=6, trace=True)


def test_a_trace_tells_every_token(fused, traced, batch):
    trace = traced.trace
    assert len(trace) == 18
    assert trace.experts == ("math", "chat")
    assert torch.equal(traced.sequences, fused.generate(**batch, max_new_tokens=6))
    assert trace.token.tolist() == traced.sequences[:, 7:].flatten().tolist()
    # Against the forward of the whole sequence at once.
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
    with torch.no_grad():
        out = fused(traced.sequences, mask, use_cache=False)
    step, rows = out.step, slice(6, 12)
    assert np.allclose(trace.alpha, step.alpha[:, rows].flatten(0, 1), atol=1e-4)
    for name in ("kl_forward", "kl_reverse", "loss"):
        assert np.allclose(getattr(trace, name), getattr(step, name)[:, rows].flatten(), atol=1e-4)
    chosen = out.logits[:, rows].gather(-1, traced.sequences[:, 7:, None])[..., 0]
    assert np.allclose(trace.log_prob, chosen.flatten(), atol=1e-4)
    fused_entropy = -(out.logits.exp() * out.logits).sum(-1)[:, rows]
    assert np.allclose(trace.entropy, fused_entropy.flatten(), atol=1e-4)
    assert trace.top.tolist() == trace.token.tolist()  # greedy
    assert set(trace.to_dataframe().columns) >= {"text", "alpha[math]", "alpha[chat]", "loss"}
    assert trace.of_sequence(1).sequence.tolist() == [1] * 6


def test_beams_are_followed_back(fused, batch):
    found = fused.generate(**batch, max_new_tokens=5, num_beams=3, trace=True)
    assert torch.equal(found.sequences, fused.generate(**batch, max_new_tokens=5, num_beams=3))
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    with torch.no_grad():
        step = fused(found.sequences, mask, use_cache=False).step
    assert np.allclose(found.trace.alpha, step.alpha[:, 6:11].flatten(0, 1), atol=1e-4)
    assert np.allclose(found.trace.log_prob.reshape(3, 5).sum(1) / 5, found.sequences_scores, atol=1e-4)


def test_rows_end_where_they_ended(fused, batch, traced):
    end = int(traced.sequences[0, 9])
    found = fused.generate(**batch, max_new_tokens=6, trace=True, eos_token_id=end, pad_token_id=1)
    first = found.trace.of_sequence(0)
    assert first.token[-1] == end
    assert len(first) == int((traced.sequences[0, 7:] == end).nonzero()[0]) + 1
    assert len(found.trace) < 18


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
def test_round_trip(traced, tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    traced.trace.save(path)
    again = FusionTrace.load(path)
    assert again.experts == traced.trace.experts
    assert again.text == traced.trace.text
    for name in ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(traced.trace, name)), name
    if suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == 3
        assert len(lines[0]["alpha"]) == 6


def test_html_is_whole_and_escaped(traced, tmp_path):
    from dataclasses import replace

    words = tuple("<script>alert(1)</script>" if i == 0 else word for i, word in enumerate(traced.trace.text))
    trace = replace(traced.trace, text=words, experts=('"><img src=x>', "chat"))
    trace.save(tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("<svg") == 3
    assert 'title="alpha: ' in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_show_colors_the_text(traced):
    out = io.StringIO()
    traced.trace.show(
        Console(file=out, force_terminal=True, color_system="truecolor", width=200, highlight=False)
    )
    assert "\x1b[48;2;" in out.getvalue()
    assert "sequence 2: 6 tokens, mean strength" in out.getvalue()


def test_plot(traced):
    pytest.importorskip("matplotlib").use("Agg")
    ax = traced.trace.plot()
    assert [line.get_label() for line in ax.get_lines()] == ["math", "chat"]


def test_bad_files(traced, tmp_path):
    with pytest.raises(InputError, match=r"wanted .jsonl, .npz or .html"):
        traced.trace.save(tmp_path / "t.csv")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="is no trace of logit-fusion"):
        FusionTrace.load(tmp_path / "x.jsonl")
    traced.trace.save(tmp_path / "x.jsonl")
    line = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    line["alpha"][0][0] = 1e308
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl.* overflow"):
        FusionTrace.load(tmp_path / "x.jsonl")
    for name in ("none.jsonl", "none.npz"):
        with pytest.raises(DataError, match="cannot be read as a trace"):
            FusionTrace.load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("loss", lambda v: v[1:], r"loss has shape \(17,\), wanted \(18,\)"),
        ("alpha", lambda v: v[:, :1], r"alpha has shape \(18, 1\), wanted \(18, 2\)"),
        ("expert", lambda v: v + 7, r"expert runs from .*, wanted \[-1, 2\)"),
        ("sequence", lambda v: v - 1, "sequence runs from -1 to 1"),
        ("token", lambda v: v.astype(np.float32), "token is of float32, wanted numbers"),
    ],
)
def test_columns_that_do_not_fit(traced, tmp_path, name, change, words):
    traced.trace.save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as found:
        arrays = dict(found)
    np.savez(tmp_path / "t.npz", **{**arrays, name: change(arrays[name])})
    with pytest.raises(DataError, match=words) as told:
        FusionTrace.load(tmp_path / "t.npz")
    assert "t.npz" in str(told.value)
