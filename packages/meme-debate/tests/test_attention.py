"""Attention with dropout on a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meme_debate.attention import attention, draw_kept, use_attention
from meme_debate.judge import Judge

TEXT = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "num_layers": 2}
VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip


def made(queries, keys, *, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, queries, 4), (2, 3, keys, 4), (2, 3, keys, 4), (1, 3, queries, keys))
    return [torch.randn(shape, generator=draw, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(query, key, value, bias, open_, kept=None, share=1.0):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) + bias
    weights = torch.softmax(scores.masked_fill(~open_, -torch.inf), -1)
    if kept is not None:
        weights = torch.where(kept, weights / share, 0.0)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value)


@given(
    queries=st.integers(1, 6), keys=st.integers(1, 6), seed=st.integers(0, 1 << 20),
    dropout=st.sampled_from([0.0, 0.1, 0.5, 0.9]), kind=st.sampled_from(["none", "causal", "bool", "float"]),
)  # fmt: skip
def test_it_is_the_equation(queries, keys, seed, dropout, kind):
    query, key, value, bias = made(queries, keys, seed=seed)
    open_ = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if kind == "causal":
        open_ = open_.tril()
    elif kind != "none":
        open_ = torch.rand(2, 1, 1, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
        open_[..., 0] = True
    mask = {"bool": open_, "float": torch.zeros(open_.shape).masked_fill(~open_, -1e30)}.get(kind)
    torch.manual_seed(seed)
    got = attention(query, key, value, bias, mask, causal=kind == "causal", dropout=dropout)
    torch.manual_seed(seed)
    kept, share = draw_kept((2, 3, queries, keys), dropout) if dropout else (None, 1.0)
    torch.testing.assert_close(got, plain(query, key, value, bias, open_, kept, share))


def test_gradients():
    query, key, value, bias = made(4, 5)
    mask = torch.tensor([True, True, False, True, True])

    def drawn(*given):
        torch.manual_seed(0)  # the same weights are dropped in each call
        return attention(*given, mask, dropout=0.3)

    assert torch.autograd.gradcheck(drawn, (query, key, value, bias))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-6])
def test_what_is_kept_is_kept_with_the_share_that_is_told(dropout):
    torch.manual_seed(1)
    kept, share = draw_kept((1000, 1003), dropout)
    assert abs(share - (1 - dropout)) <= 0.5 / 65536
    spread = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - share) <= 5 * spread
    half = kept.double() - kept.double().mean()
    if dropout > 0.01:  # neighbours, which come from one number of 64 bits, know nothing of each other
        for shift in (1, 2, 3):
            related = (half[:, shift:] * half[:, :-shift]).mean() / half.var()
            assert abs(related.item()) < 5 / 1000


def test_what_is_dropped_repeats_with_the_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(draw_kept((50, 7), 0.3)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_mean_over_draws_is_attention_without_dropout():
    query, key, value, bias = (each.detach() for each in made(3, 4))
    torch.manual_seed(0)
    draws = torch.stack([attention(query, key, value, bias, dropout=0.2) for _ in range(4000)])
    spread = draws.std(0) / draws.shape[0] ** 0.5
    exact = attention(query, key, value, bias)
    assert ((draws.mean(0) - exact).abs() <= 5 * spread).all()


def test_the_judge_takes_it_in_training_and_only_there(monkeypatch):
    torch.manual_seed(0)
    judge = Judge({**TEXT, "dropout_rate": 0.1}, VISION)
    if judge.text_transformer.config._attn_implementation != "meme_debate":
        pytest.skip("this transformers' T5 has no choice of attention")
    calls = []

    def watched(*given, **options):
        calls.append(options)
        return attention(*given, **options)

    monkeypatch.setattr("meme_debate.attention.attention", watched)
    ids, mask = torch.randint(3, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    pixels = torch.rand(2, 3, 8, 8)
    judge.train()(ids, mask, pixels).logits.sum().backward()
    assert len(calls) == 6  # two of the encoder, two times two of the decoder
    assert {call["causal"] for call in calls} == {True, False}
    calls.clear()
    with_ours = judge.eval()(ids, mask, pixels).logits
    judge.text_transformer.set_attn_implementation("sdpa")
    assert torch.equal(with_ours, judge(ids, mask, pixels).logits)
    assert not calls


def test_training_without_the_draws_is_that_of_transformers(monkeypatch):
    """Where nothing is dropped in the end, loss and gradients are those of the plain attention."""
    monkeypatch.setattr("torch.nn.functional.dropout", lambda states, *_, **__: states)
    monkeypatch.setattr(
        "meme_debate.attention.draw_kept", lambda shape, _: (torch.ones(shape, dtype=torch.bool), 1.0)
    )
    torch.manual_seed(0)
    judge = Judge({**TEXT, "dropout_rate": 0.1}, VISION).double().train()
    ids, mask = torch.randint(3, 40, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = mask[2, 1:] = 0
    pixels, labels = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 1])

    def gradients():
        judge.zero_grad()
        judge(ids, mask, pixels, labels=labels).loss.backward()
        return [each.grad.clone() for each in judge.parameters() if each.grad is not None]

    ours = gradients()
    judge.text_transformer.set_attn_implementation("eager")
    theirs = gradients()
    assert len(ours) == len(theirs) > 30
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_chosen_attention_stays():
    judge = Judge(TEXT, VISION)
    judge.text_transformer.set_attn_implementation("eager")
    use_attention(judge.text_transformer)
    assert judge.text_transformer.config._attn_implementation == "eager"
    assert "attn" not in str(judge.text_config.to_diff_dict())
