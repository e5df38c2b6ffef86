"""Running evidence and its weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, InputError
from logit_fusion import fuse_logits
from logit_fusion.evidence import evidence_weights, scan_evidence, token_log_probs, update_evidence


def seen(*shape, seed=0):
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 600), st.floats(0.5, 1.0), st.booleans())
def test_scan_is_the_update_repeated(seed, tokens, gamma, resumed):
    log_probs = seen(2, tokens, 3, seed=seed)
    made = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, tokens, generator=made) < 0.7
    state = seen(2, 3, seed=seed + 1) if resumed else torch.zeros(2, 3, dtype=torch.float64)
    found = scan_evidence(log_probs, gamma=gamma, mask=mask, initial=state if resumed else None)
    for n in range(tokens):
        state = update_evidence(state, log_probs[:, n], gamma=gamma, active=mask[:, n])
        torch.testing.assert_close(found[:, n], state, rtol=1e-9, atol=1e-9)


def test_padding_changes_nothing(device):
    log_probs = seen(1, 5, 3).to(device)
    padded = torch.cat([torch.full((1, 3, 3), -9.0, device=device, dtype=torch.float64), log_probs], 1)
    mask = torch.tensor([[False] * 3 + [True] * 5], device=device)
    whole = scan_evidence(padded, mask=mask)
    torch.testing.assert_close(whole[:, 3:], scan_evidence(log_probs))


def test_weights_leave_the_share_of_the_base(device):
    evidence = torch.tensor([[0.0, -100.0, -100.0], [-100.0, 0.0, -100.0], [0.0, 0.0, 0.0]], device=device)
    weights = evidence_weights(evidence)
    torch.testing.assert_close(weights[0], torch.zeros(2, device=device))
    torch.testing.assert_close(weights[1], torch.tensor([1.0, 0.0], device=device))
    torch.testing.assert_close(weights[2], torch.full((2,), 1 / 3, device=device))


def test_one_impossible_token_is_forgotten_in_time():
    log_probs = torch.full((1, 400, 2), -1.0)
    log_probs[0, 0, 1] = -torch.inf
    evidence = scan_evidence(log_probs)
    assert torch.isfinite(evidence).all()
    assert evidence_weights(evidence[:, 0])[0, 0] < 1e-9
    assert evidence_weights(evidence[:, -1])[0, 0] > 0.4


def test_log_probs_of_tokens():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(1))
    wanted = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_log_probs(logits, tokens), wanted)
    assert token_log_probs(logits.bfloat16(), tokens).dtype == torch.float32


def test_evidence_finds_the_right_expert():
    """The weights of an expert that wrote the text lead the pool to it."""
    made = torch.Generator().manual_seed(2)
    base = torch.randn(1, 30, generator=made)
    experts = [base + 2 * torch.randn(1, 30, generator=made) for _ in range(2)]
    text = torch.multinomial(experts[1].softmax(-1), 60, replacement=True, generator=made)[0]
    sources = torch.stack([x[0].log_softmax(-1)[text] for x in (base, *experts)], -1)
    weights = evidence_weights(scan_evidence(sources.unsqueeze(0))[:, -1])
    assert weights[0, 1] > 0.9
    step = fuse_logits(base, base, experts, weights=weights)
    assert int(step.expert) == 1


@pytest.mark.parametrize("gamma", [0.0, 1.5, float("nan")])
def test_bad_gamma(gamma):
    with pytest.raises(ConfigError, match=r"gamma is .*, wanted a number in \(0, 1\]"):
        update_evidence(torch.zeros(1, 2), torch.zeros(1, 2), gamma=gamma)
    with pytest.raises(InputError):
        scan_evidence(torch.zeros(1, 3, 2), gamma=gamma)
