"""Speculative decoding: greedy token for token, sampling by its law."""

import pytest
import torch

from fusion_core.errors import InputError
from logit_fusion.member import Expert
from logit_fusion.model import FusedModel

pytestmark = pytest.mark.filterwarnings("ignore:no end-of-sequence")


@pytest.mark.parametrize("weights", ["uniform", "evidence"])
@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_equals_plain(large, base, experts, batch, weights, gamma):
    fused = FusedModel(large, base, experts, weights=weights)
    for budget in (1, 2, 7):
        plain = fused.generate(**batch, max_new_tokens=budget)
        found = fused.speculative_generate(
            **batch, max_new_tokens=budget, gamma=gamma, return_dict_in_generate=True
        )
        assert torch.equal(plain, found.sequences)
    assert found.accepted <= found.drafted <= found.rounds * gamma


def test_an_agreeing_draft_saves_passes(large, batch):
    # Base and experts are the large model itself, so the fused argmax is the draft's.
    fused = FusedModel(large, large, {"same": large}, alpha=1.0)
    found = fused.speculative_generate(**batch, max_new_tokens=13, gamma=5, return_dict_in_generate=True)
    assert found.accepted == found.drafted == 10
    assert found.rounds == 2
    assert torch.equal(found.sequences, large.generate(**batch, max_new_tokens=13, do_sample=False))


def test_greedy_ends_and_stops_alike(large, base, experts, batch):
    fused = FusedModel(large, base, experts)
    plain = fused.generate(**batch, max_new_tokens=9)
    options = {"eos_token_id": int(plain[0, 10]), "pad_token_id": 1, "max_new_tokens": 9}
    assert torch.equal(fused.generate(**batch, **options), fused.speculative_generate(**batch, **options))


def test_processors_apply_to_both(large, base, experts, batch):
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    fused = FusedModel(large, base, experts)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    options = {"logits_processor": processors, "max_new_tokens": 8}
    assert torch.equal(fused.generate(**batch, **options), fused.speculative_generate(**batch, **options))


def test_members_with_prompts_of_their_own_draft_too(large, base, experts, batch, make):
    views = {"few": Expert(base, prefix="abc", suffix="!"), "chat": experts["chat"]}
    fused = FusedModel(large, base, views, tokenizer=make.letters(), weights="evidence")
    plain = fused.generate(**batch, max_new_tokens=7)
    for name in views:
        assert torch.equal(plain, fused.speculative_generate(**batch, max_new_tokens=7, draft=name))


@pytest.mark.slow
def test_sampling_has_the_law_of_fusion(make):
    """Triples of tokens on a vocabulary of five, against the exact probabilities."""
    large = make.llama(0, vocab=5, hidden=16, dtype=torch.float32)
    base = make.llama(1, vocab=5, hidden=16, dtype=torch.float32)
    fused = FusedModel(large, base, {"one": make.near(base, 4, 0.3)}, alpha=1.3)
    prompt, rows, calls = torch.tensor([[2, 3]]), 6, 150
    options = {"max_new_tokens": 3, "gamma": 2, "do_sample": True, "temperature": 0.8}
    counts, accepted = torch.zeros(5, 5, 5), 0
    for seed in range(calls):
        found = fused.speculative_generate(
            prompt.expand(rows, -1), **options, seed=seed, return_dict_in_generate=True
        )
        accepted += found.accepted
        for triple in found.sequences[:, 2:].tolist():
            counts[tuple(triple)] += 1
    with torch.no_grad():
        pairs = torch.cat([prompt.expand(5, -1), torch.arange(5)[:, None]], 1)
        triples = torch.cat([pairs.repeat_interleave(5, 0), torch.arange(5).repeat(5)[:, None]], 1)
        first, second, third = (
            (fused(ids).logits[:, -1] / 0.8).softmax(-1) for ids in (prompt, pairs, triples)
        )
        own = (fused.engine.members[2].module(prompt).logits[:, -1] / 0.8).softmax(-1)
    assert accepted > calls / 4  # kept drafts are among what is tested
    law = (first[0][:, None] * second)[:, :, None] * third.view(5, 5, 5)
    expected = law * rows * calls
    used = expected > 5
    chi = ((counts - expected) ** 2 / expected)[used].sum()
    degrees = int(used.sum())
    assert chi < degrees + 5 * (2 * degrees) ** 0.5
    # The draft's own law would not have passed.
    seen = counts.sum((1, 2)) / (rows * calls)
    assert (seen - first[0]).abs().max() < 0.06 < (own - first).abs().max()


def test_a_seed_gives_the_same_draws(large, base, experts, batch):
    fused = FusedModel(large, base, experts)
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 20, "top_p": 0.9}
    one, two, other = (fused.speculative_generate(**batch, **options, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_bad_settings(large, base, experts, batch):
    fused = FusedModel(large, base, experts)
    with pytest.raises(InputError, match="gamma is 0"):
        fused.speculative_generate(**batch, gamma=0)
    with pytest.raises(InputError, match="draft is 'base', the experts are"):
        fused.speculative_generate(**batch, draft="base")
    with pytest.raises(InputError, match=r"does not know \['num_beams'\]"):
        fused.speculative_generate(**batch, num_beams=2)
    with pytest.raises(InputError, match="temperature"):
        fused.speculative_generate(**batch, do_sample=True, temperature=0.0)
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        fused.speculative_generate(**batch, stop_strings="x")
