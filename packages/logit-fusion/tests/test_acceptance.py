"""Speculative acceptance: greedy keeps what the target would say, sampling keeps the target's law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ShapeError
from logit_fusion.acceptance import accept_greedy, accept_sampled


def laws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 4), st.integers(0, 5), st.integers(1, 5))
def test_greedy_keeps_the_longest_right_prefix(seed, batch, drafted, vocab):
    made = torch.Generator().manual_seed(seed)
    draft = torch.randint(0, vocab, (batch, drafted), generator=made)
    scores = torch.randn(batch, drafted + 1, vocab, generator=made)
    found = accept_greedy(draft, scores)
    best = scores.argmax(-1)
    for row in range(batch):
        count = 0
        while count < drafted and draft[row, count] == best[row, count]:
            count += 1
        wanted = [*draft[row, :count].tolist(), int(best[row, count])]
        assert int(found.count[row]) == count
        assert int(found.token[row]) == wanted[-1]
        assert found.tokens[row].tolist() == wanted + [-1] * (drafted - count)


def test_sampling_keeps_the_law_of_the_target(device):
    """Frequencies of the first two tokens against the target's, drafts from another law."""
    draws, vocab = 200_000, 4
    q, p = laws(1, 2, vocab, seed=1), laws(1, 3, vocab, seed=2)
    p[0, 0, 3] = -torch.inf  # the target forbids what the draft may say
    p, q = p.log_softmax(-1).to(device), q.to(device)
    made = torch.Generator(device).manual_seed(3)
    draft = torch.stack(
        [torch.multinomial(q[0, g].exp(), draws, replacement=True, generator=made) for g in range(2)], 1
    )
    found = accept_sampled(draft, q.expand(draws, -1, -1), p.expand(draws, -1, -1), generator=made)
    first = torch.bincount(found.tokens[:, 0], minlength=vocab) / draws
    torch.testing.assert_close(first, p[0, 0].exp(), rtol=0, atol=0.006)
    assert first[3] == 0
    again = found.tokens[found.count >= 1, 1]
    second = torch.bincount(again, minlength=vocab) / len(again)
    torch.testing.assert_close(second, p[0, 1].exp(), rtol=0, atol=0.006)
    bonus = found.token[found.count == 2]
    third = torch.bincount(bonus, minlength=vocab) / len(bonus)
    torch.testing.assert_close(third, p[0, 2].exp(), rtol=0, atol=0.01)
    # The share that is kept is the overlap of the laws.
    kept = (found.count >= 1).double().mean()
    overlap = torch.minimum(p[0, 0].exp(), q[0, 0].exp()).sum()
    assert abs(float(kept) - float(overlap)) < 0.006


def test_equal_laws_keep_everything(device):
    q = laws(1, 3, 5, seed=4).to(device).expand(64, -1, -1)
    p = torch.cat([q, q[:, :1]], 1)
    made = torch.Generator(device).manual_seed(0)
    draft = torch.multinomial(q.exp().flatten(0, 1), 1, generator=made).view(64, 3)
    found = accept_sampled(draft, q, p, generator=made)
    assert (found.count == 3).all()
    assert (found.tokens[:, :3] == draft).all()


def test_one_seed_one_answer():
    q, p = laws(5, 2, 6, seed=1), laws(5, 3, 6, seed=2)
    draft = torch.zeros(5, 2, dtype=torch.int64)
    a, b = (accept_sampled(draft, q, p, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.tokens, b.tokens)


def test_bad_shapes():
    draft, q, p = torch.zeros(2, 3, dtype=torch.int64), laws(2, 3, 5), laws(2, 4, 5)
    with pytest.raises(ShapeError, match="target scores has shape"):
        accept_greedy(draft, p[:, :3])
    with pytest.raises(ShapeError, match="draft_log_probs has shape"):
        accept_sampled(draft, q[:, :2], p)
    with pytest.raises(ShapeError, match="draft has shape"):
        accept_greedy(draft[0], p)
