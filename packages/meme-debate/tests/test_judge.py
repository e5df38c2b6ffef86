"""The fused judge: fusions, padding, gradients, files, the authors' checkpoint, one process and two."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from judges import TEXT, VISION, make_judge, make_memes
from torch import nn

from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, FusionError, InputError, ShapeError
from fusion_core.testing import spawn
from meme_debate.detection import score
from meme_debate.fused import gather, score_memes, share_of_rank
from meme_debate.fusion import CrossAttention, cross_attention
from meme_debate.judge import FUSIONS, Judge
from meme_debate.settings import JudgeSettings
from meme_debate.text_judge import TextJudge
from meme_debate.training import JudgeTrainConfig, train_judge


@pytest.fixture(scope="module")
def inputs():
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 20, (3, 7), generator=draws)
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2, 6:] = 0, 0
    pixels = torch.randn(3, 3, 16, 16, generator=draws)
    return ids.masked_fill(mask == 0, 0), mask, pixels


def test_cross_attention_equals_the_formula_and_has_exact_gradients():
    block = CrossAttention(6, 4).double()
    states, image = torch.randn(2, 5, 6).double(), torch.randn(2, 3, 4).double()
    q, k, v = block.proj_q(states), block.proj_k(image), block.proj_v(image)
    weights = torch.stack(
        [torch.softmax((q[b, i] * k[b]).sum(-1) / 3**0.5, 0) for b in range(2) for i in range(5)]
    ).view(2, 5, 3)
    assert torch.allclose(block(states, image), block.proj_o(torch.einsum("bip,bpw->biw", weights, v)))
    maps = (block.proj_q, block.proj_k, block.proj_v, block.proj_o)
    both = (states.requires_grad_(), image.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, i: cross_attention(s, i, *maps), both)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_and_batch_composition_never_change_a_logit(fusion, inputs):
    ids, mask, pixels = inputs
    judge = make_judge(fusion)
    with torch.no_grad():
        together = judge(ids, mask, pixels).logits
        longer = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
        assert torch.allclose(judge(*longer, pixels).logits, together, atol=1e-6)
        for row in range(3):
            kept = int(mask[row].sum())
            one = judge(ids[row : row + 1, :kept], mask[row : row + 1, :kept], pixels[row : row + 1]).logits
            assert torch.allclose(one[0], together[row], atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_only_without_fusion_the_pixels_do_not_matter(fusion, inputs):
    ids, mask, pixels = inputs
    judge = make_judge(fusion)
    pixels = pixels.clone().requires_grad_()
    logits = judge(ids, mask, pixels).logits
    other = judge(ids, mask, torch.flip(pixels, [0]).detach()).logits
    if fusion == "none":
        assert torch.equal(logits, other)
        assert torch.equal(judge(ids, mask).logits, logits)
        return
    assert not torch.allclose(logits, other, atol=1e-4)
    logits[:, 1].sum().backward()
    assert pixels.grad.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_devices(fusion, dtype, inputs, device):
    ids, mask, pixels = (each.to(device) for each in inputs)
    judge = make_judge(fusion).to(device, dtype)
    out = judge(ids, mask, pixels.to(dtype), labels=torch.tensor([0, 1, 0], device=device))
    assert out.logits.dtype == dtype
    assert torch.isfinite(out.loss)


def test_a_copy_looks_with_its_own_weights(inputs):
    ids, mask, pixels = inputs
    judge = make_judge()
    twin = copy.deepcopy(judge)
    with torch.no_grad():
        for block in twin.text_transformer.encoder.ca_block:
            nn.init.zeros_(block.proj_o.weight)
            nn.init.zeros_(block.proj_o.bias)
        none = make_judge("none")
        none.load_state_dict(judge.state_dict())
        assert torch.allclose(twin(ids, mask, pixels).logits, none(ids, mask).logits, atol=1e-6)
        assert not torch.allclose(judge(ids, mask, pixels).logits, none(ids, mask).logits, atol=1e-4)


def test_save_and_load_give_the_same_judge(tmp_path):
    judge = make_judge(max_length=64, policy="rude")
    memes, debates = make_memes()
    from meme_debate.calibrate import Calibration

    judge.calibration = Calibration(2.0, 0.4, (0.3, 0.5), 10)
    judge.save_pretrained(tmp_path / "judge")
    back = Judge.from_pretrained(tmp_path / "judge")
    assert {"config.json", "model.safetensors", "calibration.json", "tokenizer", "card.md"} <= {
        path.name for path in (tmp_path / "judge").iterdir()
    }
    assert (back.fusion, back.settings, back.calibration) == (judge.fusion, judge.settings, judge.calibration)
    assert back.digest() == judge.digest()
    assert np.array_equal(score_memes(back, memes, debates), score_memes(judge, memes, debates))


def test_damaged_weights_are_named(tmp_path):
    memes, debates = make_memes()
    judge = make_judge(max_length=64)
    torch.nn.init.constant_(next(judge.parameters()), float("nan"))
    with pytest.raises(CheckpointError, match=r"no finite score; .*model\.safetensors damaged"):
        score(judge, memes, debates)
    strange = copy.copy(make_judge(max_length=64))

    class Fails:
        is_fast = True

        def __call__(self, *texts, **options):
            raise Exception("WordLevel error: Missing [UNK] token")

    strange.tokenizer = Fails()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used: Exception WordLevel error"):
        score(strange, memes, debates)
    for wrong in ({"ngrams": 1e308}, {"ngrams": 0}, {"min_df": 0}, {"c": 0.0}, {"c": math.nan}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*, wanted a number in"):
            TextJudge(**wrong)
    light = TextJudge(min_df=1).fit(["a good day", "a bad day"], [0, 1])
    light.save(tmp_path / "light")
    state = load_tensors(tmp_path / "light" / "model.safetensors")
    for factor, words in (
        (float("nan"), "holds values other"),
        (1e300, "holds values other"),
        (0.0, "goes below 1"),
    ):
        save_tensors(tmp_path / "light" / "model.safetensors", {**state, "idf": state["idf"] * factor})
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: idf {words}"):
            TextJudge.load(tmp_path / "light")
    save_tensors(
        tmp_path / "light" / "model.safetensors", {**state, "coef": state["coef"].to(torch.bfloat16)}
    )
    TextJudge.load(tmp_path / "light").predict_proba(["a day"])


def official_file(path, judge, **extra):
    """A Lightning checkpoint with the names that the authors' code writes."""
    state = {
        key.replace("image_transformer.", "image_transformer.vision_model."): value
        for key, value in judge.state_dict().items()
    }
    state["image_transformer.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    state["train_harm_accuracy.scores"] = torch.tensor(0.0)
    state |= extra
    torch.save(
        {
            "state_dict": state,
            "epoch": 9,
            "hyper_parameters": {"lr": 5e-4},
            "pytorch-lightning_version": "1.3",
        },
        path,
    )


def test_the_authors_checkpoint_is_read_by_its_names(tmp_path, inputs):
    ids, mask, pixels = inputs
    text = {**TEXT, "feed_forward_proj": "gated-gelu", "vocab_size": 40, "num_decoder_layers": 2}
    vision = {**VISION, "hidden_size": 128, "num_attention_heads": 2}
    judge = Judge(text, vision, "none").eval()
    official_file(tmp_path / "best.ckpt", judge)
    back = Judge.load_official(tmp_path / "best.ckpt")
    assert (back.fusion, back.settings.normalize, back.settings.truncate) == ("none", "inception", "tail")
    assert torch.equal(back(ids, mask).logits, judge(ids, mask).logits)
    seeing = Judge.load_official(tmp_path / "best.ckpt", fusion="layerwise")
    sure = Judge(text, vision, "layerwise").eval()
    sure.load_state_dict(judge.state_dict())
    assert torch.allclose(seeing(ids, mask, pixels).logits, sure(ids, mask, pixels).logits, atol=1e-6)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    judge = Judge({**TEXT, "vocab_size": 40}, {**VISION, "hidden_size": 64, "num_attention_heads": 1}, "none")
    official_file(tmp_path / "a.ckpt", judge, **{"clf.weight": torch.zeros(3, 16)})
    with pytest.raises(CheckpointError, match=r"clf\.weight \(3, 16\) for \(2, 16\)"):
        Judge.load_official(tmp_path / "a.ckpt")
    torch.save({"state_dict": {"clf.weight": torch.zeros(1)}}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"text_transformer\.shared\.weight"):
        Judge.load_official(tmp_path / "b.ckpt")
    torch.save({"state_dict": {}, "callback": Judge}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        Judge.load_official(tmp_path / "c.ckpt")


def test_bad_input_is_told(inputs):
    ids, mask, pixels = inputs
    with pytest.raises(ConfigError, match="fusion is 'early', wanted one of"):
        Judge({**TEXT, "vocab_size": 40}, VISION, "early")
    judge = make_judge()
    with pytest.raises(InputError, match="takes pixel_values or image_features, got neither"):
        judge(ids, mask)
    with pytest.raises(InputError, match="got both"):
        judge(ids, mask, pixels, judge.image_states(pixels))
    with pytest.raises(ShapeError, match="pixel_values has shape"):
        judge(ids, mask, pixels[..., :8])
    with pytest.raises(ShapeError, match="attention_mask has shape"):
        judge(ids, mask[:, :3], pixels)
    with pytest.raises(ConfigError, match=r"'ablation' is 'w/o X', wanted '', 'w/o MD'"):
        JudgeSettings.from_dict({"ablation": "w/o X"})
    with pytest.raises(ConfigError, match="max_length is 3, wanted 16 to 1000000"):
        JudgeSettings(max_length=3)
    with pytest.raises(CheckpointError, match="holds no fused judge"):
        Judge.from_pretrained("/nowhere/at/all")
    judge.tokenizer = None
    with pytest.raises(CheckpointError, match="no tokenizer"):
        score_memes(judge, *make_memes(2))


@pytest.mark.parametrize(
    ("file", "keys", "value", "words"),
    [
        # what later versions of transformers refuse themselves, in their own words
        (
            "config.json",
            ("text_config", "is_encoder_decoder"),
            "../x",
            "holds no fused|_decoder is '../x', want",
        ),
        ("config.json", ("vision_config", "hidden_act"), 10**40, "holds no fused judge"),
        ("config.json", ("text_config", "d_ff"), 0, "d_ff is 0, wanted a number in"),
        ("config.json", ("vision_config", "intermediate_size"), 0, "intermediate_size is 0"),
        ("config.json", ("vision_config", "attention_dropout"), math.inf, "attention_dropout is inf, wanted"),
        (
            "config.json",
            ("vision_config", "layer_norm_eps"),
            math.nan,
            "layer_norm_eps is nan, wanted a number",
        ),
        ("config.json", ("text_config", "dropout_rate"), -0.5, "dropout_rate is -0.5, wanted"),
        ("calibration.json", ("temperature",), 0, "temperature is 0.0, wanted"),
        ("calibration.json", ("temperature",), 1e-320, "temperature is 1e-320, wanted"),
        ("calibration.json", ("band",), [0.1, 2.0], "band is 2.0, wanted"),
    ],
)
def test_a_judge_whose_files_are_odd_is_named(file, keys, value, words, tmp_path):
    make_judge().save_pretrained(tmp_path / "judge")
    path = tmp_path / "judge" / file
    whole = json.loads(path.read_text("utf-8"))
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(FusionError, match=words) as found:
        Judge.from_pretrained(tmp_path / "judge")
    assert str(tmp_path / "judge") in str(found.value)


def test_batches_do_not_change_scores():
    judge = make_judge()
    memes, debates = make_memes()
    whole = score_memes(judge, memes, debates, batch_size=12)
    for size in (1, 5):
        assert np.allclose(score_memes(judge, memes, debates, batch_size=size), whole, atol=1e-6)
    order = [3, 1, 0, 2]
    part = score_memes(judge, [memes[i] for i in order], [debates[i] for i in order])
    assert np.allclose(part, whole[order], atol=1e-6)
    assert ((whole >= 0) & (whole <= 1)).all()


def trained(out, fusion, accumulate):
    """The weights of a small training; with two processes each batch of a step is another one's."""
    judge = make_judge(fusion, max_length=64)
    memes, debates = make_memes(24)
    config = JudgeTrainConfig(steps=3, batch_size=4, lr=1e-2, accumulate=accumulate)
    held = make_memes(11, seed=5)
    result = train_judge(judge, memes, debates, config, out=out, device="cpu", validation=held,
                         features=out.with_suffix(".states"))  # fmt: skip
    return result.best, load_tensors(out / "model.safetensors")


def share(rank, folder):
    judge = make_judge()
    memes, debates = make_memes(7)
    rows = share_of_rank(7)
    mine = score_memes(judge, [memes[i] for i in rows], [debates[i] for i in rows], batch_size=1)
    scores = gather(mine, 7)
    return rows, scores, [trained(folder / fusion, fusion, 1) for fusion in ("layerwise", "none")]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Each meme is scored once, and a step over two batches is the step of two processes."""
    one = score_memes(make_judge(), *make_memes(7), batch_size=1)
    ranks = spawn(share, 2, tmp_path / "two", timeout=240)
    assert sorted(ranks[0][0] + ranks[1][0]) == list(range(7))
    for _, scores, _ in ranks:
        assert np.array_equal(scores, one)
    for place, fusion in enumerate(("layerwise", "none")):
        best, weights = trained(tmp_path / fusion, fusion, 2)
        for _, _, runs in ranks:
            assert runs[place][0] == pytest.approx(best, abs=1e-6)
            for name, value in weights.items():
                assert torch.allclose(value, runs[place][1][name], atol=1e-6), (fusion, name)
        assert (tmp_path / "two" / fusion / "judge" / "config.json").is_file()
