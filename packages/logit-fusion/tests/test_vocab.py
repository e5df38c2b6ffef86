"""Shared vocabularies: padding, strict ids, matching by strings."""

import pytest
import torch

from logit_fusion.errors import VocabularyMismatchError
from logit_fusion.member import Expert
from logit_fusion.model import FusedModel
from logit_fusion.vocab import check_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:no end-of-sequence")


class Words:
    unk_token_id = None

    def __init__(self, words):
        self.words = list(words)

    def get_vocab(self):
        return {word: place for place, word in enumerate(self.words)}


COMMON = [f"w{i}" for i in range(100)]


def test_padding_and_tokens_of_one_member_end_the_shared_range():
    found = check_vocabulary(
        {"large": Words([*COMMON, "<chat>"]), "base": Words(COMMON)}, {"large": 128, "base": 104}
    )
    assert found.size == 100
    assert found.rows[1]["common strings"] == pytest.approx(100 / 101)
    # Added to all members, they are shared.
    both = Words([*COMMON, "<chat>"])
    assert check_vocabulary({"large": both, "base": both}, {"large": 128, "base": 104}).size == 101
    # Without tokenizers only the widths can be compared.
    assert check_vocabulary({}, {"large": 128, "base": 104}).size == 104


def test_other_ids_are_refused_with_counts_and_examples():
    swapped = [*COMMON[:40], *COMMON[60:], *COMMON[40:60]]
    with pytest.raises(VocabularyMismatchError) as caught:
        check_vocabulary({"large": Words(COMMON), "base": Words(swapped)}, {"large": 100, "base": 100})
    text = str(caught.value)
    assert "member 'base' has another token for 60 of 100 shared ids" in text
    assert "40: 'w40' / 'w60'" in text
    assert text.count(" / ") == 10
    assert "100.0% of the large model's strings" in text


@pytest.mark.parametrize("align", ["id", "string"])
def test_too_small_an_overlap_is_refused(align):
    other = [*COMMON[:90], *(f"x{i}" for i in range(10))] if align == "string" else COMMON[:90]
    with pytest.raises(
        VocabularyMismatchError, match=r"90.0% of the large model's 100 tokens.*lacks 10, such as 'w90'"
    ):
        check_vocabulary(
            {"large": Words(COMMON), "base": Words(other)}, {"large": 100, "base": len(other)}, align=align
        )


def test_strings_need_tokenizers():
    with pytest.raises(VocabularyMismatchError, match=r"\['base'\] have none"):
        check_vocabulary({"large": Words(COMMON)}, {"large": 100, "base": 100}, align="string")


def test_gathered_logits():
    order = COMMON[::-1][:-2]  # lacks w0 and w1
    found = check_vocabulary(
        {"large": Words(COMMON), "base": Words(order)}, {"large": 104, "base": 98}, align="string"
    )
    logits = torch.arange(98.0)
    aligned = found.logits("base", logits)
    assert aligned.shape == (100,)
    assert aligned[:2].tolist() == [-torch.inf, -torch.inf]
    assert aligned[2:].tolist() == list(range(97, -1, -1))
    assert found.ids("base", torch.tensor([2, 99])).tolist() == [97, 0]
    assert found.partial
    assert found.widen(aligned).shape == (104,)


def permuted(model, order):
    """The same model with its vocabulary in another order: new id i is old id order[i]."""
    import copy

    made = copy.deepcopy(model)
    with torch.no_grad():
        for table in (made.get_input_embeddings(), made.get_output_embeddings()):
            table.weight.copy_(table.weight[order].clone())
    return made


def test_matching_by_strings_gives_what_equal_ids_give(large, base, experts, batch, make):
    order = torch.randperm(97, generator=torch.Generator().manual_seed(3)).tolist()
    plain, mixed = make.letters(), make.letters(order)
    wanted = FusedModel(large, base, {"math": experts["math"]}, tokenizer=plain).generate(
        **batch, max_new_tokens=6
    )
    members = [Expert(permuted(m, order), tokenizer=mixed) for m in (base, experts["math"])]
    with pytest.raises(VocabularyMismatchError, match='align="string"'):
        FusedModel(large, members[0], {"math": members[1]}, tokenizer=plain)
    for weights in ("uniform", "evidence"):
        reference = FusedModel(large, base, {"math": experts["math"]}, weights=weights)
        fused = FusedModel(
            large, members[0], {"math": members[1]}, tokenizer=plain, align="string", weights=weights
        )
        assert torch.equal(
            fused.generate(**batch, max_new_tokens=6), reference.generate(**batch, max_new_tokens=6)
        )
    assert wanted.shape == (3, 13)


@pytest.mark.parametrize("padded", ["forbid", "keep"])
def test_padded_widths(base, experts, batch, make, padded):
    wide = make.llama(0, hidden=48, heads=6, vocab=104)
    fused = FusedModel(wide, base, {"math": experts["math"]}, padded=padded, alpha=1.0)
    with torch.no_grad():
        log_probs = fused(**batch, logits_to_keep=1).logits[:, -1]
        ours = wide(**batch).logits[:, -1]
        shift = experts["math"](**batch).logits[:, -1] - base(**batch).logits[:, -1]
    assert log_probs.shape == (3, 104)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-9)
    if padded == "forbid":
        assert (log_probs[:, 97:] == -torch.inf).all()
        assert torch.allclose(log_probs[:, :97], (ours[:, :97] + shift).log_softmax(-1), atol=1e-9)
    else:
        assert torch.allclose(log_probs[:, 97:], ours.log_softmax(-1)[:, 97:], atol=1e-9)
    assert fused.generate(**batch, max_new_tokens=3, num_beams=2).shape == (3, 10)
    # A prompt may hold what a small member cannot read.
    ids = batch["input_ids"].clone()
    ids[:, -1] = 103
    assert fused(ids, batch["attention_mask"], logits_to_keep=1).logits.isfinite()[..., :97].all()
