"""The recorded numbers of tests/golden (or of ``--golden DIR``): judge, metrics and text format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, T5Config, T5PreTrainedModel

from fusion_core.testing import array, parameter
from meme_debate.composing import compose, parse
from meme_debate.judge import FUSIONS, Judge
from meme_debate.meme import Debate, Meme
from meme_debate.scoring import metrics

PARTS = ("image", "encoder", "decoder", "pooled", "logits", "loss")
# The record is of a T5 with PyTorch's attention; before it had one, its softmax was in float32 always.
EXACT_T5 = bool(getattr(T5PreTrainedModel, "_supports_sdpa", False))
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def recorded_judge(config, fusion):
    """The judge of the record: every parameter follows from its name."""
    text = T5Config(**{"tie_word_embeddings": True, "use_cache": False, **config["text"]})
    text.dropout_rate = 0.0
    judge = Judge(text, CLIPVisionConfig(**config["vision"]), fusion).double().eval()
    with torch.no_grad():
        for name, tensor in judge.state_dict().items():
            tied = name.removeprefix("text_transformer.") in TIED
            key = "text_transformer.shared.weight" if tied else name
            tensor.copy_(torch.from_numpy(parameter(key, tensor.shape)))
    return judge


@pytest.fixture(scope="module")
def record(golden):
    settings = golden.settings.get("judge.npz")
    if settings is None:
        pytest.skip("the folder records no judge")
    return settings, golden.load(settings["config"]), golden.load("judge.npz")


def run(settings, config, arrays, fusion, dtype, **how):
    judge = recorded_judge(config, fusion).to(dtype)
    side = config["vision"]["image_size"]
    ids, mask = torch.from_numpy(arrays["ids"]).long(), torch.from_numpy(arrays["mask"]).long()
    pixels = torch.from_numpy(array(f"{settings['name']}.pixels", (len(ids), 3, side, side))).to(dtype)
    with torch.no_grad():
        image = judge.image_states(pixels)
        seen = {"image_features": image} if how.get("features") else {"pixel_values": pixels}
        out = judge(ids, mask, labels=torch.from_numpy(arrays["labels"]).long(), **seen)
    return {"image": image, **out}


@pytest.mark.parametrize("features", [False, True], ids=["pixels", "features"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_judge(golden, record, fusion, features):
    settings, config, arrays = record
    if fusion not in settings["fusions"]:
        pytest.skip(f"fusion {fusion} is not recorded")
    out = run(settings, config, arrays, fusion, torch.float64, features=features)
    for part in PARTS:
        atol = settings["atol" if part == "image" or EXACT_T5 else "atol_float64_t5"]
        golden.assert_close(out[part], arrays[f"{fusion}.{part}"], rtol=0, atol=atol, what=f"{fusion}.{part}")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_judge_in_float32(golden, record, fusion):
    settings, config, arrays = record
    if fusion not in settings["fusions"]:
        pytest.skip(f"fusion {fusion} is not recorded")
    out = run(settings, config, arrays, fusion, torch.float32)
    for part in PARTS:
        golden.assert_close(out[part], arrays[f"{fusion}.{part}"], rtol=1e-3, atol=1e-4, what=part)


def test_state_dict_has_the_recorded_names(record):
    _, config, _ = record
    if "keys" not in config:
        pytest.skip("the folder records no names")
    for fusion in FUSIONS:
        assert sorted(Judge(config["text"], config["vision"], fusion).state_dict()) == config["keys"]


def test_fusions_are_recorded_apart(record):
    settings, _, arrays = record
    logits = [arrays[f"{fusion}.logits"] for fusion in settings["fusions"]]
    assert all(np.abs(a - logits[0]).max() > 1e-3 for a in logits[1:])


def test_metrics(golden):
    settings = golden.settings["metrics.json"]
    record = golden.load("metrics.json")
    label = record["label"] if "label" in record else record["labels"]
    score = record["score"] if "score" in record else record["scores"]
    assert settings["ece_bins"] == 10
    found = metrics(score, label, settings["threshold"])
    for name, value in found.items():
        expected = record["ece_10" if name == "ece" else name]
        golden.assert_close(value, expected, rtol=0, atol=settings["atol"], what=name)


def test_compose_and_parse(golden):
    cases = golden.settings["compose"]
    assert cases
    for case in cases:
        meme = Meme(case["id"], None, case["text"], case["caption"])
        debate = Debate(case["id"], case["harmful"], case["harmless"], case["verdict"])
        composed = compose(meme, debate, case["first"])
        assert composed == case["composed"], case["id"]
        again, back = parse(composed, case["id"])
        assert (again.id, again.text, again.caption) == (case["id"], case["text"], case["caption"])
        assert (back.id, back.harmful, back.harmless) == (case["id"], case["harmful"], case["harmless"])
        assert back.verdict == case["parsed_verdict"]
