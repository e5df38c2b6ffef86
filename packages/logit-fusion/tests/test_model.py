"""The fusion as a model of transformers: caches, padding, beams, own prompts, adapters."""

import copy
import itertools

import pytest
import torch

from fusion_core.errors import CheckpointError, FusionError, InputError
from logit_fusion.config import FusionConfig
from logit_fusion.errors import ContextLengthError, NonFiniteLogitsError, UnpairedExpertWarning
from logit_fusion.member import Expert
from logit_fusion.model import FusedModel

pytestmark = pytest.mark.filterwarnings("ignore:no end-of-sequence")
RULES = ["uniform", "evidence"]


@pytest.mark.parametrize("weights", RULES)
def test_cache_equals_no_cache_and_a_batch_its_rows(large, base, experts, batch, make, weights):
    fused = FusedModel(large, base, experts, weights=weights)
    whole = fused.generate(**batch, max_new_tokens=6)
    assert torch.equal(whole, fused.generate(**batch, max_new_tokens=6, use_cache=False))
    for row, ids in enumerate(make.rows_of(batch)):
        assert torch.equal(fused.generate(ids, max_new_tokens=6)[0, -6:], whole[row, -6:])


@pytest.mark.parametrize("weights", RULES)
def test_forward_in_pieces_equals_forward_at_once(large, base, experts, batch, weights):
    fused = FusedModel(large, base, experts, weights=weights)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = fused(ids, mask, use_cache=False).logits
    cache, parts = fused.engine.cache(), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        parts.append(fused(ids[:, start:stop], mask[:, :stop], past_key_values=cache).logits)
    real = mask > 0
    assert torch.allclose(torch.cat(parts, 1)[real], whole[real], atol=1e-9)
    assert cache.get_seq_length() == 7
    assert torch.allclose(whole.exp().sum(-1), torch.ones(3, 7, dtype=whole.dtype), atol=1e-9)


def test_alpha_zero_is_the_large_model(large, base, experts, batch):
    fused = FusedModel(large, base, experts, alpha=0.0)
    for options in ({}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}):
        ours = fused.generate(**batch, max_new_tokens=8, **options)
        assert torch.equal(ours, large.generate(**batch, max_new_tokens=8, do_sample=False, **options))


def brute_force_beams(fused, ids, beams, steps):
    """Beam search without a cache, by the book: all continuations, the best ones kept."""
    running = [(0.0, ids[0].tolist())]
    for _ in range(steps):
        found = []
        for total, tokens in running:
            log_probs = fused(torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits[0, -1].float()
            for token, value in enumerate(log_probs.log_softmax(-1).tolist()):
                found.append((total + value, [*tokens, token]))
        running = sorted(found, key=lambda entry: -entry[0])[:beams]
    return torch.tensor([tokens for _, tokens in running]), torch.tensor([total for total, _ in running])


@pytest.mark.parametrize("weights", RULES)
def test_beam_search_equals_brute_force(large, base, experts, batch, make, weights):
    fused = FusedModel(large, base, experts, weights=weights)
    with torch.no_grad():
        for row, ids in enumerate(make.rows_of(batch)):
            wanted, totals = brute_force_beams(fused, ids, 3, 4)
            found = fused.generate(
                ids, max_new_tokens=4, num_beams=3, num_return_sequences=3, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert torch.equal(found.sequences, wanted)
            assert torch.allclose(found.sequences_scores, totals / 4, atol=1e-5)
            if row == 0:
                together = fused.generate(**batch, max_new_tokens=4, num_beams=3)
                assert torch.equal(together[0, -4:], wanted[0, -4:])


def test_the_cache_moves_whole(large, base, experts, batch):
    fused = FusedModel(large, base, experts, weights="evidence")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = torch.tensor([[3], [4], [5]])
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with torch.no_grad():

        def after(change, rows):
            cache = fused.engine.cache()
            fused(ids, mask, past_key_values=cache)
            change(cache)
            return fused(more[rows], longer[rows], past_key_values=cache).logits

        order = torch.tensor([2, 0, 0])
        plain = after(lambda cache: None, torch.arange(3))
        both = torch.cat([ids, more], 1)
        moved = fused(torch.cat([ids[order], more], 1), torch.cat([mask[order], torch.ones_like(more)], 1))
        cache = fused.engine.cache()
        fused(ids, mask, past_key_values=cache)
        cache.reorder_cache(order)
        found = fused(more, torch.cat([mask[order], torch.ones_like(more)], 1), past_key_values=cache)
        assert torch.allclose(found.logits[:, -1], moved.logits[:, -1], atol=1e-9)
        picked = after(lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), torch.tensor([0, 2]))
        assert torch.allclose(picked, plain[[0, 2]], atol=1e-9)
        rows = torch.arange(3).repeat_interleave(2)
        doubled = after(lambda cache: cache.batch_repeat_interleave(2), rows)
        assert torch.allclose(doubled, plain[rows], atol=1e-9)
        # What was read and taken back leaves no mark.
        cache = fused.engine.cache()
        fused(ids, mask, past_key_values=cache)
        fused(
            torch.tensor([[7, 8], [9, 7], [8, 8]]),
            torch.cat([longer, longer[:, -1:]], 1),
            past_key_values=cache,
        )
        cache.crop(-2)
        again = fused(more, longer, past_key_values=cache).logits
        assert torch.allclose(again, plain, atol=1e-9)
        with pytest.raises(InputError, match="evidence goes back"):
            cache.crop(-5)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.allclose(fused(both, longer, past_key_values=cache).logits[:, -1:], plain, atol=1e-9)


def test_cache_lengths_to_keep_are_understood(large, base, experts, batch):
    cache = FusedModel(large, base, experts).engine.cache()
    fused = FusedModel(large, base, experts)
    fused(**batch, past_key_values=cache)
    cache.crop(5)  # as before transformers 5.23: the length to keep
    assert cache.get_seq_length() == 5
    assert [lane.get_seq_length() for lane in cache.lanes] == [5] * 4


def test_sampling_streaming_and_stopping(large, base, experts, batch, make):
    from transformers.generation.streamers import BaseStreamer

    fused = FusedModel(large, base, experts, tokenizer=make.letters())

    class Keep(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    keep = Keep()
    ids = batch["input_ids"][:1]
    torch.manual_seed(0)
    found = fused.generate(ids, max_new_tokens=5, do_sample=True, top_p=0.9, temperature=0.7, streamer=keep)
    assert keep.seen == found[0].tolist()
    assert keep.ended
    torch.manual_seed(0)
    assert torch.equal(
        found, fused.generate(ids, max_new_tokens=5, do_sample=True, top_p=0.9, temperature=0.7)
    )
    greedy = fused.generate(ids, max_new_tokens=5)
    stop = fused.generate(ids, max_new_tokens=5, eos_token_id=int(greedy[0, 9]))
    assert torch.equal(stop[0], greedy[0, : stop.shape[1]])
    assert stop.shape[1] <= 10


@pytest.mark.parametrize("weights", RULES)
def test_a_member_reads_its_own_prompt(large, base, experts, batch, make, weights):
    letters = make.letters()
    views = {"few": Expert(base, prefix="few shots: ", suffix="?"), "chat": experts["chat"]}
    fused = FusedModel(large, base, views, tokenizer=letters, weights=weights)
    assert len(fused.engine.together[0]) == 4
    assert fused.engine.members[2].module is fused.engine.members[1].module  # weights are shared
    found = fused.generate(**batch, max_new_tokens=5)
    for row, ids in enumerate(make.rows_of(batch)):
        assert torch.equal(fused.generate(ids, max_new_tokens=5)[0, -5:], found[row, -5:])
    # The same prompt, handed over as ids.
    ids, mask = batch["input_ids"], batch["attention_mask"]
    front, back = (torch.tensor(letters(text)["input_ids"]).expand(3, -1) for text in ("few shots: ", "?"))
    own = {
        "input_ids": torch.cat([front, ids, back], 1),
        "attention_mask": torch.cat([torch.ones_like(front), mask, torch.ones_like(back)], 1),
    }
    plain = FusedModel(large, base, {"few": base, "chat": experts["chat"]}, weights=weights)
    assert torch.equal(found, plain.generate(**batch, max_new_tokens=5, prompts={"few": own}))
    beams = {"max_new_tokens": 4, "num_beams": 2}
    first = fused.generate(**batch, **beams)
    assert torch.equal(first, plain.generate(**batch, **beams, prompts={"few": own}))
    if weights == "uniform":
        assert torch.equal(first, fused.generate(**batch, **beams, use_cache=False))
    assert not torch.equal(found, plain.generate(**batch, max_new_tokens=5))


def test_a_chat_template_is_put_round_the_tokens(base):
    from logit_fusion.config import ViewConfig
    from logit_fusion.member import _view_tokens

    class Chatty:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) for c in text]}

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            parts = [f"<{m['role']}>{m['content']}" for m in messages]
            return "".join(parts) + "<assistant>"

    before, after = _view_tokens("chat", ViewConfig(prefix="p", chat=True, system="s"), Chatty())
    assert "".join(map(chr, before)) == "<system>s<user>p"
    assert "".join(map(chr, after)) == "<assistant>"
    with pytest.raises(InputError, match="member 'x' has a view but no tokenizer"):
        _view_tokens("x", ViewConfig(prefix="p"), None)


def test_the_prompts_first_token_is_hidden_behind_a_prefix(base):
    from logit_fusion.member import Member, lead

    member = Member("x", base)
    member.prefix_ids = [5, 6]
    ids, mask = lead(
        member, torch.tensor([[1, 0, 9], [0, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), bos=0
    )
    assert ids.tolist() == [[5, 6, 1, 0, 9], [5, 6, 0, 8, 9]]
    assert mask.tolist() == [[1, 1, 0, 0, 1], [1, 1, 0, 1, 1]]


@pytest.fixture(scope="module")
def adapters(base, large, tmp_path_factory):
    """Folders of large and base, two LoRA adapters, and the experts they make."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    base.save_pretrained(folder / "base")
    large.save_pretrained(folder / "large")
    merged = {}
    for number, name in enumerate(("math", "chat")):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            tuned = peft.get_peft_model(copy.deepcopy(base), config)
        tuned.save_pretrained(folder / name)
        merged[name] = tuned.merge_and_unload().eval()
    return folder, merged


@pytest.mark.parametrize("weights", RULES)
def test_adapters_share_one_base_and_one_pass(adapters, batch, large, base, weights, tmp_path):
    folder, merged = adapters
    experts = {name: Expert(str(folder / "base"), adapter=folder / name) for name in merged}
    fused = FusedModel.from_pretrained(
        folder / "large", folder / "base", experts, weights=weights, dtype="float64"
    )
    assert len(fused.engine.together[0]) == 2
    apart = FusedModel(large, base, merged, weights=weights)
    for options in ({}, {"num_beams": 3}):
        plain = apart.generate(**batch, max_new_tokens=5, **options)
        assert torch.equal(plain, fused.generate(**batch, max_new_tokens=5, **options))
    assert torch.equal(plain, fused.generate(**batch, max_new_tokens=5, **options))
    fused.save_pretrained(tmp_path / "saved", weights=True)
    again = FusedModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(plain, again.generate(**batch, max_new_tokens=5, **options))


def test_save_and_load(large, base, experts, batch, tmp_path, make):
    settings = FusionConfig(strategy="single", solver="grid", step=0.2, max_kl=1.5)
    fused = FusedModel(large, base, experts, settings)
    fused.save_pretrained(tmp_path / "fusion")
    again = FusedModel.from_pretrained(tmp_path / "fusion")
    assert again.settings.fuse_arguments() == settings.fuse_arguments()
    assert torch.equal(fused.generate(**batch, max_new_tokens=4), again.generate(**batch, max_new_tokens=4))
    again.save_pretrained(tmp_path / "names")
    assert sorted(path.name for path in (tmp_path / "names").iterdir()) == ["fusion.json"]
    with pytest.raises(InputError, match="came from memory"):
        fused.save_pretrained(tmp_path / "no", weights=False)
    assert not (tmp_path / "no").exists()


def test_presets(large, base, experts, batch):
    expert = {"math": experts["math"]}
    for preset, alpha in (("proxy-tuning", 1.0), ("eft", 1.0), ("dexperts", 2.0)):
        fused = FusedModel(large, base, expert, preset=preset)
        plain = FusedModel(large, base, expert, alpha=alpha)
        assert torch.equal(
            fused.generate(**batch, max_new_tokens=4), plain.generate(**batch, max_new_tokens=4)
        )
    fused = FusedModel(large, base, preset="contrastive")
    assert len(fused.engine.together[0]) == 2  # the large model runs once
    with torch.no_grad():
        log_probs = fused(**batch, logits_to_keep=1).logits[:, -1]
        ours, theirs = (m(**batch).logits[:, -1].log_softmax(-1) for m in (large, base))
    wanted = (1.5 * ours - 0.5 * theirs).masked_fill(
        ours < ours.amax(-1, keepdim=True) + torch.log(torch.tensor(0.1)), -torch.inf
    )
    assert torch.allclose(log_probs, wanted.log_softmax(-1), atol=1e-6)
    with pytest.raises(InputError, match="preset is 'best', wanted one of proxy-tuning"):
        FusedModel(large, base, expert, preset="best")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_dtypes_and_devices(large, base, experts, batch, kind, device):
    members = [copy.deepcopy(model).to(device, kind) for model in (large, base, experts["math"])]
    fused = FusedModel(members[0], members[1], {"math": members[2]})
    moved = {name: value.to(device) for name, value in batch.items()}
    step = fused(**moved, logits_to_keep=1)
    assert step.logits.dtype == torch.float32
    assert step.logits.isfinite().all()
    whole = FusedModel(large, base, {"math": experts["math"]})(**batch, logits_to_keep=1)
    tolerance = 1e-3 if kind == torch.float32 else 0.5
    assert torch.allclose(step.logits.cpu().double(), whole.logits, atol=tolerance)
    assert fused.generate(**moved, max_new_tokens=3).shape == (3, 10)


def test_members_of_several_dtypes(large, base, experts, batch):
    fused = FusedModel(
        large, copy.deepcopy(base).float(), {"math": copy.deepcopy(experts["math"]).bfloat16()}
    )
    assert fused(**batch, logits_to_keep=1).logits.dtype == torch.float64


def test_bad_members(large, base, experts, make, tmp_path):
    with pytest.raises(InputError, match="experts is empty"):
        FusedModel(large, base, {})
    with pytest.raises(InputError, match="names 'base'; wanted an identifier"):
        FusedModel(large, base, {"base": base})
    for wrong in ({"weights": (1.0, 1.0, 1.0)}, {"weights": (-1.0, 2.0)}, {"alpha": (1.0, 1.0, 1.0)},
                  {"per_expert_range": ((0.0, 1.0),)}):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(wrong))):
            FusedModel(large, base, experts, **wrong)
    with pytest.raises(InputError, match=r"holds no fusion.json"):
        FusedModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"member 'large': .* cannot be loaded"):
        FusedModel.from_pretrained(tmp_path / "none", tmp_path / "none", {"x": tmp_path / "none"})
    with pytest.raises(InputError, match=r"device_map names \['mat'\]"):
        FusedModel.from_pretrained(large, base, {"math": base}, device_map={"mat": "cpu"})
    with pytest.warns(UnpairedExpertWarning, match="hidden_size 32 / 16"):
        FusedModel(large, base, {"math": make.llama(3, hidden=16)})


def test_bad_calls(large, base, experts, batch, make):
    fused = FusedModel(large, base, experts)
    right = {name: value.flip(1) for name, value in batch.items()}
    with pytest.raises(InputError, match="padded on the right"):
        fused.generate(**right, max_new_tokens=2)
    with pytest.raises(
        ContextLengthError, match="member 'large' would read 129 tokens, it takes at most 128"
    ):
        fused.generate(torch.ones(1, 127, dtype=torch.long), max_new_tokens=5)
    few = FusedModel(large, base, {"few": Expert(base, prefix="x" * 122)}, tokenizer=make.letters())
    with pytest.raises(ContextLengthError, match="member 'few' would read 129"):
        few.generate(**batch, max_new_tokens=2)
    with pytest.raises(InputError, match="prompts names 'who'"):
        fused.generate(**batch, prompts={"who": batch})
    with pytest.raises(InputError, match="has 3 rows, input_ids has 1"):
        fused.generate(batch["input_ids"][:1], prompts={"math": batch})
    with pytest.raises(InputError, match="cache_implementation is 'static'"):
        fused.generate(**batch, cache_implementation="static")
    with pytest.raises(InputError, match=r"wanted \(rows, tokens\)"):
        fused.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.warns(UserWarning, match="no end-of-sequence token"):
        fused.generate(**batch, max_new_tokens=1)


def test_out_of_memory_shows_the_members(large, base, experts, batch, monkeypatch):
    fused = FusedModel(large, base, experts)

    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(fused.engine, "read", full)
    with pytest.raises(FusionError, match=r"tried to allocate 3 GiB.*weights: large .* GiB on cpu, base"):
        fused.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("name", ["large", "base", "math"])
def test_nan_names_member_and_row(large, base, experts, batch, name):
    broken = {"large": large, "base": base, **experts}
    broken[name] = copy.deepcopy(broken[name])
    with torch.no_grad():
        broken[name].get_input_embeddings().weight[9] = float("nan")
    fused = FusedModel(broken["large"], broken["base"], {n: broken[n] for n in experts})
    ids = batch["input_ids"].clone()
    ids[2, -1] = 9
    with pytest.raises(NonFiniteLogitsError, match=f"{name}.*row"):
        fused.generate(ids, attention_mask=batch["attention_mask"], max_new_tokens=3)
    # Met later on, it is told at the end.
    forced = itertools.count()
    tokens = FusedModel(broken["large"], broken["base"], {n: broken[n] for n in experts})
    ids[2, -1] = 4

    def allowed(row, prefix):
        return [9] if row == 2 and next(forced) >= 0 and len(prefix) == 8 else list(range(10, 90))

    with pytest.raises(NonFiniteLogitsError, match=f"{name}.*row 2"):
        tokens.generate(
            ids, attention_mask=batch["attention_mask"], max_new_tokens=4, prefix_allowed_tokens_fn=allowed
        )
