"""Fusion as a logits processor of somebody else's generate."""

import copy

import pytest
import torch

from fusion_core.errors import InputError
from logit_fusion.errors import NonFiniteLogitsError
from logit_fusion.model import FusedModel
from logit_fusion.processor import FusionLogitsProcessor

pytestmark = pytest.mark.filterwarnings("ignore:no end-of-sequence")


@pytest.mark.parametrize("weights", ["uniform", "evidence"])
def test_the_processor_gives_what_the_model_gives(large, base, experts, batch, weights):
    fused = FusedModel(large, base, experts, weights=weights)
    processor = FusionLogitsProcessor(base, experts, weights=weights, pad_token_id=1)
    for _ in range(2):  # the second prompt starts anew
        found = large.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=[processor])
        assert torch.equal(found, fused.generate(**batch, max_new_tokens=6))
    assert processor.step.alpha.shape == (3, 2)
    processor = FusionLogitsProcessor(base, experts, weights=weights, attention_mask=batch["attention_mask"])
    found = large.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=[processor])
    assert torch.equal(found, fused.generate(**batch, max_new_tokens=6))
    other = batch["input_ids"][:1, 2:]
    processor.attention_mask = None
    processor.reset()
    found = large.generate(other, max_new_tokens=4, do_sample=False, logits_processor=[processor])
    assert torch.equal(found, fused.generate(other, max_new_tokens=4))


def test_beams_are_noticed(large, base, experts, batch):
    fused = FusedModel(large, base, experts)
    processor = FusionLogitsProcessor(base, list(experts.values()), pad_token_id=1)
    with pytest.raises(InputError, match="the rows changed places, as in beam search"):
        large.generate(**batch, max_new_tokens=8, num_beams=4, do_sample=False, logits_processor=[processor])
    patient = FusionLogitsProcessor(base, experts["math"], pad_token_id=1, on_reorder="prefill")
    found = large.generate(
        **batch, max_new_tokens=4, num_beams=3, do_sample=False, logits_processor=[patient]
    )
    one = FusedModel(large, base, {"math": experts["math"]})
    assert torch.equal(found, one.generate(**batch, max_new_tokens=4, num_beams=3))
    assert fused.engine.names == ["large", "base", "math", "chat"]


def test_bad_use(large, base, experts, batch):
    with pytest.raises(InputError, match="on_reorder is 'guess'"):
        FusionLogitsProcessor(base, experts, on_reorder="guess")
    with pytest.raises(InputError, match="experts is empty"):
        FusionLogitsProcessor(base, {})
    processor = FusionLogitsProcessor(base, experts, attention_mask=torch.ones(2, 3))
    with pytest.raises(InputError, match="belongs to another batch"):
        large.generate(**batch, max_new_tokens=2, logits_processor=[processor])
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.get_output_embeddings().weight[3] = float("nan")
    processor = FusionLogitsProcessor(broken, experts)
    with pytest.raises(NonFiniteLogitsError, match="base"):
        large.generate(**batch, max_new_tokens=2, logits_processor=[processor])
