"""Laws of the losses and of the choice between models; both sides of the published rules; bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat import FusionBatch, FusionLoss, Targets
from fusechat.losses import dense_divergence, log_probs_at
from fusechat.selecting import avg_ce_weights, min_ce, replace_better, rewards
from fusechat.targets import coalesce
from fusion_core.errors import ConfigError, InputError, ShapeError

V, K = 11, 4
DIVERGENCES = ["ce", "kl", "jsd", "rkl", "uld"]


def targets(seed=0, batch=2, tokens=5, ce=None, dtype=torch.float64, distinct=False):
    made = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=dtype)
    ids = torch.randint(-1, V, (batch, tokens, K), generator=made)
    if distinct:
        ids = torch.stack([torch.randperm(V, generator=made)[:K] for _ in range(batch * tokens)]).reshape(
            batch, tokens, K
        )
    logits = draw(batch, tokens, K).sort(-1, descending=True).values
    lse = logits.logsumexp(-1) + draw(batch, tokens).abs()
    mask = torch.rand(batch, tokens, generator=made) < 0.8
    ce = torch.rand(batch, generator=made, dtype=dtype) if ce is None else torch.tensor(ce, dtype=dtype)
    return Targets(ids, logits, mask, ce, lse, torch.rand(batch, tokens, generator=made, dtype=dtype))


def make(seed=0, sources=1, pivot=False, **options):
    made = torch.Generator().manual_seed(seed + 99)
    labels = torch.randint(0, V, (2, 5), generator=made).masked_fill(
        torch.rand(2, 5, generator=made) < 0.3, -100
    )
    labels[:, -1] = 1
    inputs = {"attention_mask": torch.ones_like(labels)}
    others = tuple(targets(seed + n, **options) for n in range(sources))
    return FusionBatch(inputs, labels, others, targets(seed + 50, **options) if pivot else None)


def student(seed=0, dtype=torch.float64):
    return torch.randn(2, 5, V, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def dense(source, tail):
    probs, rest = source.probabilities(1.0, tail)
    ids, probs = coalesce(source.ids, probs)
    kept = ids >= 0
    full = (rest / (V - kept.sum(-1)))[..., None].expand(*rest.shape, V).clone()
    for b, t in torch.cartesian_prod(*map(torch.arange, rest.shape)).tolist():
        full[b, t, ids[b, t][kept[b, t]]] = probs[b, t][kept[b, t]]
    return full


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(DIVERGENCES), st.sampled_from(["none", "uniform"]))
def test_sparse_equals_dense(seed, divergence, tail):
    if divergence == "uld" or (divergence == "rkl" and tail == "none"):
        tail = "none" if divergence == "uld" else "uniform"
    batch, logits = make(seed, distinct=divergence == "uld"), student(seed)  # its ids are the source's own
    loss = FusionLoss(0.4, divergence, "source", beta=0.3, tail=tail)
    found = loss(logits, batch)
    source = batch.sources[0].filled(None)
    learned = torch.cat([batch.labels[:, 1:] >= 0, torch.zeros(2, 1, dtype=torch.bool)], 1)
    mask = source.mask & learned
    each = dense_divergence(logits.log_softmax(-1), dense(source, tail), divergence, 0.3)
    fusion = torch.where(mask, each, 0.0).sum() / mask.sum().clamp(min=1)
    sft = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), batch.labels[:, 1:].reshape(-1))
    wanted = 0.6 * sft + 0.4 * fusion
    torch.testing.assert_close(found.total, wanted)
    mine, theirs = (torch.autograd.grad(value, logits)[0] for value in (found.total, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    batch, logits = make(3, distinct=True), student(3)
    loss = FusionLoss(0.4, divergence, "source", tail="uniform" if divergence == "rkl" else "none")
    assert torch.autograd.gradcheck(lambda x: loss(x, batch).total, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["ce", "kl", "jsd"])
def test_other_dtypes_and_devices(device, dtype, divergence):
    batch, logits = make(1).to(device), student(1).detach()
    loss = FusionLoss(0.4, divergence, "source")
    low = logits.to(device, dtype).requires_grad_()
    found = loss(low, batch)
    found.total.backward()
    assert low.grad.dtype == dtype
    assert found.total.dtype == torch.float32
    wanted = loss(logits, batch.to("cpu")).total.item()
    assert found.total.item() == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 2e-2)


def test_kl_is_ce_minus_entropy():
    batch, logits = make(5), student(5)
    ce, kl = (FusionLoss(1.0, name, "source")(logits, batch).fusion for name in ("ce", "kl"))
    other = FusionLoss(1.0, "kl", "source")(student(6), batch).fusion
    other_ce = FusionLoss(1.0, "ce", "source")(student(6), batch).fusion
    torch.testing.assert_close(ce - kl, other_ce - other)  # the entropy of the target, whatever the student
    assert kl > 0


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_loss_is_affine_in_lambda(weight, seed):
    batch, logits = make(seed), student(seed)
    at = lambda w: FusionLoss(w)(logits, batch).total.item()
    assert at(weight) == pytest.approx((1 - weight) * at(0.0) + weight * at(1.0), rel=1e-9)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 9), min_size=3, max_size=3), min_size=2, max_size=5), st.randoms())
def test_min_ce_and_avg_ce_laws(values, shuffle):
    ce = torch.tensor(values, dtype=torch.float64)
    choice = min_ce(ce)
    chosen = ce.gather(0, choice[None])[0]
    assert (chosen <= ce).all()
    order = list(range(len(values)))
    shuffle.shuffle(order)
    again = min_ce(ce[order])
    assert (ce[order].gather(0, again[None])[0] == chosen).all()
    weights = avg_ce_weights(ce)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))


def test_near_ties_go_to_the_pivot_only_with_the_published_rounding():
    # Row 11.
    ce = torch.tensor([[2.0], [1.999]])
    assert min_ce(ce, "bf16").tolist() == [0]
    assert min_ce(ce).tolist() == [1]
    assert min_ce(torch.tensor([[1.0], [1.0]])).tolist() == [0]


def test_nan_is_the_worst_cross_entropy():
    # Row 18.
    nan = float("nan")
    assert min_ce(torch.tensor([[nan], [50.0]])).tolist() == [1]
    assert replace_better(torch.tensor([1.0, 1.0, nan]), torch.tensor([1.0, 0.5, 2.0])).tolist() == [
        False,
        True,
        True,
    ]
    assert rewards(torch.tensor([[nan]])).item() == 0
    batch = make(0, sources=2)
    worse = replace(batch.sources[0], ce=torch.full((2,), nan))
    found = FusionLoss(0.5)(student(), replace(batch, sources=(worse, batch.sources[1])))
    assert found.choice.tolist() == [1, 1]


def test_masks_differ_where_the_publications_do():
    # Row 10: FuseLLM takes every attended position, the last included.
    batch = make(2, distinct=True)
    full = replace(batch.sources[0], mask=torch.ones(2, 5, dtype=torch.bool))
    batch = replace(batch, sources=(full,))
    assert int(FusionLoss(0.5, mask="attention").counts(batch)[1]) == 10
    assert int(FusionLoss(0.5).counts(batch)[1]) == int((batch.labels[:, 1:] >= 0).sum())


def test_temperature_is_used():
    # Row 12: the published alignment script takes --temperature and never reads it.
    batch, logits = make(4), student(4)
    assert FusionLoss(0.5, temperature=0.5)(logits, batch).fusion != FusionLoss(0.5)(logits, batch).fusion


def test_wider_logits_than_the_tokenizer_are_fine():
    # Row 16: the published width is the tokenizer's, which crashes on padded embeddings.
    batch = make(4)
    wide = torch.cat([student(4), torch.full((2, 5, 3), -30.0, dtype=torch.float64)], -1)
    torch.testing.assert_close(FusionLoss(0.5)(wide, batch).total, FusionLoss(0.5)(student(4), batch).total)


def test_sft_is_rounded_only_on_request():
    # Row 21.
    batch, logits = make(4), student(4)
    exact, rounded = (FusionLoss(0.5, sft_dtype=name)(logits, batch).sft for name in ("auto", "float32"))
    assert exact != rounded
    torch.testing.assert_close(exact, rounded, rtol=1e-6, atol=1e-6)
    own = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, V), batch.labels[:, 1:].reshape(-1)
    )
    assert rounded.item() == pytest.approx(own.item(), rel=1e-6)


def test_empty_rows_take_the_pivot_or_are_left_out():
    source, pivot = targets(1), targets(2)
    empty = replace(
        source,
        ids=source.ids.clone().index_fill_(1, torch.tensor([0]), -1),
        mask=torch.ones(2, 5, dtype=torch.bool),
    )
    assert not empty.filled(None).mask[:, 0].any()
    assert torch.equal(empty.filled(pivot).ids[:, 0], pivot.ids[:, 0])
    assert torch.equal(empty.filled(pivot).mask[:, 0], pivot.mask[:, 0])


def test_items_make_the_loss_of_parts_add_up():
    batch, logits = make(7), student(7)
    loss = FusionLoss(0.4, select="source")
    whole = loss(logits, batch)
    items = loss.counts(batch)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        part = slice(row, row + 1)
        own = batch.sources[0]
        one = Targets(own.ids[part], own.logits[part], own.mask[part], own.ce[part])
        small = FusionBatch({}, batch.labels[part], (one,))
        total = total + loss(logits[part], small, items=items).total
    torch.testing.assert_close(total, whole.total)
    mine, theirs = (torch.autograd.grad(value, logits)[0] for value in (total, whole.total))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


def test_schedules():
    batch, logits = make(0), student()
    decay = FusionLoss(0.4, schedule="decay")
    assert decay(logits, batch, step=25, max_steps=100).lam.item() == pytest.approx(0.7)
    with pytest.raises(ConfigError, match='schedule "decay" got step 0 of max_steps None'):
        decay(logits, batch)
    with pytest.raises(ConfigError, match="batch of 2"):
        FusionLoss(0.4, schedule="soft")(logits, batch)
    own = targets(0, batch=1, ce=[0.7])
    one = FusionBatch({}, batch.labels[:1], (own, targets(1, batch=1, ce=[0.9])))
    best, mean = (
        FusionLoss(schedule="soft", select=name)(logits[:1], one).lam.item() for name in ("min_ce", "avg_ce")
    )
    powers = torch.tensor([-0.7, -0.9]).exp()
    assert best == pytest.approx(1 - powers[0].item())
    assert mean == pytest.approx(1 - powers.mean().item())


def test_padding_may_hold_anything():
    batch, logits = make(0), student().detach()
    bad = (batch.labels[:, 1:] < 0).nonzero()[0]
    logits[bad[0], bad[1]] = torch.nan
    logits.requires_grad_()
    found = FusionLoss(0.4)(logits, batch).total
    found.backward()
    assert found.isfinite()
    assert logits.grad.isfinite().all()


def test_log_probs_of_strided_and_repeated_ids():
    logits = student()[:, 1:]
    ids = torch.tensor([[0, 0, 3]]).expand(2, 4, 3)
    picked, total = log_probs_at(logits, ids)
    torch.testing.assert_close(picked, logits.log_softmax(-1).gather(-1, ids))
    torch.testing.assert_close(total, logits.log_softmax(-1).sum(-1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": 1.5}, "weight is 1.5"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"divergence": "l2"}, "divergence is 'l2'"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"select": "best"}, "select is 'best'"),
        ({"mince": "word"}, "mince is 'word'"),
        ({"tail": "uniform", "temperature": 2.0}, "temperature is 2.0"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        FusionLoss(**options)


def test_calls_are_checked():
    batch = make(0)
    with pytest.raises(ShapeError, match="logits"):
        FusionLoss()(torch.zeros(2, 4, V), batch)
    with pytest.raises(InputError, match="targets hold id"):
        FusionLoss()(torch.zeros(2, 5, 3, dtype=torch.float64), batch.to("cpu"))
    with pytest.raises(ConfigError, match='use tail="uniform"'):
        FusionLoss(divergence="rkl")(student(), batch)
    with pytest.raises(InputError, match="no targets"):
        FusionLoss()(student(), replace(batch, sources=()))
    with pytest.raises(ShapeError, match="targets have shapes"):
        Targets(
            torch.zeros(1, 2, 3, dtype=torch.int64),
            torch.zeros(1, 2, 4),
            torch.ones(1, 2, dtype=torch.bool),
            torch.zeros(1),
        )
