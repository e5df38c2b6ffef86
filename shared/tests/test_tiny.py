import pytest
import torch

from fusion_core.testing import tiny

TEXTS = ["one two three 12345", "two three four 67890", "three four five"] * 20


@pytest.mark.parametrize("kind", ["bytes", "blanks"])
def test_a_tokenizer_and_a_model_learn_a_text(kind):
    tokenizer = tiny.bpe(TEXTS, 300, kind, digits=True)
    assert tokenizer.decode(tokenizer("one two 12")["input_ids"]).strip() == "one two 12"
    digits = [token for token in tokenizer.get_vocab() if any(map(str.isdigit, token))]
    assert {len(token.strip("\u2581\u0120")) for token in digits} == {1}
    ids = torch.tensor([i for text in TEXTS for i in tokenizer(text)["input_ids"]])
    model = tiny.llama(len(tokenizer), 16, 1, 2, seed=3)
    again = tiny.llama(len(tokenizer), 16, 1, 2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    state = torch.get_rng_state()
    before = model(input_ids=ids[None, :64], labels=ids[None, :64]).loss.item()
    tiny.fit_causal(model, ids, 30, 1e-2, length=16, batch_size=4)
    assert model(input_ids=ids[None, :64], labels=ids[None, :64]).loss.item() < before - 1
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_reach_the_last_token():
    rows = tiny.windows(torch.arange(6), 5, 200, torch.Generator().manual_seed(0))
    assert set(rows[:, 0].tolist()) == {0, 1}
    assert (rows.diff() == 1).all()
