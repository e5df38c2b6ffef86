"""Collect, collate and train on tiny models: stores, ranks, batches, accumulation, PEFT."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fusechat import FusionCollator, FusionLoss, FusionTrainer, TopKStore, collect
from fusechat.errors import AlignmentError
from fusechat.store import check_same_texts
from fusion_core.checkpoint import load_tensors
from fusion_core.errors import DataError, FusionWarning, InputError, NonFiniteError, StoreError
from fusion_core.testing import spawn


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("rows-*"))}


def test_store_holds_what_the_model_says(store, source_model, source_tokenizer, pivot_tokenizer, dialogues):
    assert store.complete
    assert len(store) == len(dialogues)
    store.verify()
    for row, dialogue in enumerate(dialogues):
        stored = store[row]
        text = pivot_tokenizer.apply_chat_template(dialogue, tokenize=False)
        assert stored.text.text == text
        ids = torch.tensor([stored.encoded.ids.tolist()])
        with torch.no_grad():
            logits = source_model(ids).logits[0]
        top = logits.topk(8, -1)
        np.testing.assert_allclose(stored.logits, top.values, rtol=2e-3, atol=1e-3)
        assert (stored.indices == top.indices.numpy()).mean() > 0.99
        np.testing.assert_allclose(stored.lse, logits.logsumexp(-1), rtol=1e-5)
        ce = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        np.testing.assert_allclose(stored.token_ce[:-1], ce, rtol=1e-4, atol=1e-5)
        learned = stored.encoded.supervised[1:]
        assert stored.ce == pytest.approx(float(ce[torch.from_numpy(learned)].mean()), rel=1e-5)
        assert np.isnan(stored.token_ce[-1])
        start, stop = stored.text.spans[0]
        assert text[start:stop] == dialogue[1]["content"] + "</s>"


def test_resumed_run_equals_the_uninterrupted_one(
    store, source_model, source_tokenizer, pivot_tokenizer, dialogues, tmp_path
):
    copy = tmp_path / "again"
    shutil.copytree(store.folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "shards": [], "complete": False}))
    (copy / "rows-000001.safetensors").unlink()
    half = TopKStore(copy)
    assert half.missing() == [1]
    with pytest.raises(StoreError, match="row 5"):
        half[5]
    options = {"k": 8, "tokenizer": source_tokenizer, "pivot_tokenizer": pivot_tokenizer, "shard_rows": 4}
    done = collect(source_model, dialogues, out=copy, **options)
    assert done.complete
    assert folder_bytes(copy) == folder_bytes(store.folder)
    with pytest.raises(StoreError, match=r"'k': the store has 8, wanted 4"):
        collect(source_model, dialogues, out=copy, **{**options, "k": 4})
    with pytest.raises(StoreError, match="texts"):
        collect(source_model, dialogues[::-1], out=copy, **options)


def test_damaged_shards_are_named(store, tmp_path):
    copy = tmp_path / "cut"
    shutil.copytree(store.folder, copy)
    shard = copy / "rows-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(StoreError, match="rows-000000"):
        TopKStore(copy)
    with pytest.raises(StoreError, match="no store"):
        TopKStore(tmp_path / "nowhere")


def test_batches_do_not_change_the_store(
    store, source_model, source_tokenizer, pivot_tokenizer, dialogues, tmp_path
):
    one = collect(
        source_model,
        dialogues,
        out=tmp_path / "one",
        k=8,
        tokenizer=source_tokenizer,
        pivot_tokenizer=pivot_tokenizer,
        batch_tokens=1,
        shard_rows=4,
    )
    for row in range(len(store)):
        assert one[row].encoded.ids.tolist() == store[row].encoded.ids.tolist()
        np.testing.assert_allclose(one[row].lse, store[row].lse, rtol=1e-5)


def collect_rank(rank, model, dialogues, out):
    made = collect(model, dialogues, out=out, k=8, shard_rows=2, device="cpu", dtype="float32")
    return made.complete


@pytest.mark.slow
def test_two_ranks_equal_one(source_model, source_tokenizer, dialogues, tmp_path):
    source_model.save_pretrained(tmp_path / "model")
    source_tokenizer.save_pretrained(tmp_path / "model")
    words = (str(tmp_path / "model"), dialogues, str(tmp_path / "two"))
    assert spawn(collect_rank, 2, *words, timeout=120) == [True, True]
    one = collect(
        str(tmp_path / "model"),
        dialogues,
        out=tmp_path / "one",
        k=8,
        shard_rows=2,
        device="cpu",
        dtype="float32",
    )
    assert folder_bytes(tmp_path / "two") == folder_bytes(one.folder)


def collator(pivot_tokenizer, store, source_tokenizer, **options):
    return FusionCollator(pivot_tokenizer, [store], tokenizers=[source_tokenizer], **options)


def test_collator_makes_what_the_readme_says(
    store, pivot_store, pivot_model, pivot_tokenizer, source_tokenizer, dialogues
):
    batch = collator(pivot_tokenizer, store, source_tokenizer, pivot=pivot_store)(dialogues[:3])
    out = pivot_model(**batch.inputs)
    for divergence in ("ce", "kl", "jsd"):
        for select in ("min_ce", "avg_ce", "source"):
            found = FusionLoss(0.5, divergence, select)(out.logits, batch)
            assert found.total.isfinite()
            assert found.total.item() == pytest.approx(
                0.5 * (found.sft.item() + found.fusion.item()), rel=1e-5
            )
    for divergence in ("ce", "kl", "rkl", "jsd"):
        assert FusionLoss(0.5, divergence, "source", tail="uniform")(out.logits, batch).total.isfinite()
    assert FusionLoss(0.5, mince="token")(out.logits, batch).choice.ndim == 2
    labels = batch.labels[0][batch.labels[0] >= 0]
    assert pivot_tokenizer.decode(labels).replace(" ", "") == (dialogues[0][1]["content"] + "</s>").replace(
        " ", ""
    )
    raw = collator(pivot_tokenizer, store, source_tokenizer, vocab="none")(dialogues[:3])
    assert FusionLoss(0.5, "uld", "source")(out.logits, raw).total.isfinite()


@pytest.mark.parametrize("vocab", ["ms", "ms-official", "em", "mined", "prefix"])
@pytest.mark.parametrize("align", ["span", "dtw"])
def test_every_map_and_alignment_collates(
    store, pivot_store, pivot_tokenizer, source_tokenizer, dialogues, vocab, align
):
    for unaligned in ("skip", "onehot", "pivot"):
        batch = collator(
            pivot_tokenizer,
            store,
            source_tokenizer,
            pivot=pivot_store,
            vocab=vocab,
            align=align,
            unaligned=unaligned,
        )(dialogues[:2])
        source = batch.sources[0]
        probs, _ = source.filled(batch.pivot).probabilities()
        covered = source.mask & (source.ids >= 0).any(-1)
        torch.testing.assert_close(probs[covered].sum(-1), torch.ones(int(covered.sum())))
        if unaligned != "skip":
            assert (source.mask.sum(1) == batch.inputs["attention_mask"].sum(1)).all()


def test_collator_names_foreign_texts(store, pivot_tokenizer, source_tokenizer, dialogues):
    made = collator(pivot_tokenizer, store, source_tokenizer)
    changed = [dialogues[0][0], {"role": "assistant", "content": dialogues[0][1]["content"] + "!"}]
    with pytest.raises(AlignmentError, match=r"dialogue 0 .* differs from character \d+"):
        made([changed])
    with pytest.raises(DataError, match="assistant"):
        made([[{"role": "user", "content": "alone"}]])


def test_stores_of_other_texts(store, source_model, source_tokenizer, pivot_tokenizer, dialogues, tmp_path):
    changed = [*dialogues[:5], [dialogues[5][0], {"role": "assistant", "content": "other"}]]
    other = collect(
        source_model,
        changed,
        out=tmp_path / "other",
        k=4,
        tokenizer=source_tokenizer,
        pivot_tokenizer=pivot_tokenizer,
    )
    with pytest.raises(AlignmentError, match=r"row 5 differs from character \d+"):
        check_same_texts(store, other)
    with pytest.raises(AlignmentError, match="row 5"):
        FusionCollator(pivot_tokenizer, [store, other], tokenizers=[source_tokenizer] * 2)


def test_collect_refuses(source_model, source_tokenizer, pivot_tokenizer, dialogues, tmp_path):
    run = lambda model=source_model, data=dialogues, **options: collect(
        model, data, **{"out": tmp_path / "x", "tokenizer": source_tokenizer, **options}
    )
    with pytest.raises(InputError, match="k is 0"):
        run(k=0)
    with pytest.raises(InputError, match="k is 9999, wanted at most the model's vocabulary"):
        run(k=9999)
    with pytest.raises(InputError, match="dialogues is empty"):
        run(data=[])
    with pytest.raises(DataError, match="none of 1 dialogues"):
        run(data=[[{"role": "user", "content": "alone"}]])
    with pytest.raises(InputError, match="tokenizer is None"):
        run(tokenizer=None)
    with pytest.raises(InputError, match="message 0"):
        run(data=[[{"role": "user"}]])
    broken = type(source_model)(source_model.config)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="row 0"):
        run(broken)


def test_rows_without_a_turn_are_kept_empty(source_model, source_tokenizer, dialogues, tmp_path):
    data = [*dialogues[:2], [{"role": "user", "content": "alone"}]]
    made = collect(source_model, data, out=tmp_path / "x", tokenizer=source_tokenizer)
    assert len(made[2].encoded) == 0
    assert np.isnan(made[2].ce)


def arguments(folder, **options):
    from transformers import TrainingArguments

    given = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**given, **options})


def trained(pivot, folder, store, pivot_tokenizer, source_tokenizer, dialogues, model=None, **options):
    model = model if model is not None else pivot()
    options = {"tokenizers": [source_tokenizer], "vocab": "prefix"}, options
    trainer = FusionTrainer(
        model, arguments(folder, **options[1]), dialogues, [store], processing_class=pivot_tokenizer,
        collator_options=options[0], fusion_loss=FusionLoss(0.5, select="source"),
    )  # fmt: skip
    trainer.train()
    return model, trainer


def test_trainer_learns_and_accumulation_changes_nothing(
    pivot, store, pivot_tokenizer, source_tokenizer, dialogues, tmp_path
):
    common = (pivot, tmp_path, store, pivot_tokenizer, source_tokenizer, dialogues[:4])
    whole, trainer = trained(*common, per_device_train_batch_size=4)
    parts, _ = trained(*common, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {"sft", "fusion"} <= set(trainer.state.log_history[0])


def test_trainer_leaves_out_what_cannot_be_learned(
    pivot, store, pivot_tokenizer, source_tokenizer, dialogues, tmp_path
):
    common = (pivot, tmp_path, store, pivot_tokenizer, source_tokenizer)
    with pytest.warns(FusionWarning, match="1 of 3 dialogues"):
        trained(*common, [*dialogues[:2], [{"role": "user", "content": "alone"}]], max_steps=1)
    with pytest.raises(DataError, match="none of 1"):
        trained(*common, [[{"role": "user", "content": "alone"}]])
    with pytest.raises(InputError, match="at least one store"):
        FusionTrainer(pivot(), arguments(tmp_path), dialogues)


def test_peft(pivot, store, pivot_tokenizer, source_tokenizer, dialogues, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pivot(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(pivot, tmp_path, store, pivot_tokenizer, source_tokenizer, dialogues, model=model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


def train_rank(rank, folder, store, dialogues, batch):
    """A rank's run of the trainer on models of a folder; its parameters at the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/pivot")
    pivot, source = (AutoTokenizer.from_pretrained(f"{folder}/{name}") for name in ("pivot", "source"))
    trained(
        lambda: model, f"{folder}/run{batch}", TopKStore(store), pivot, source, dialogues,
        per_device_train_batch_size=batch, optim="sgd", learning_rate=0.5,
    )  # fmt: skip
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_two_ranks_train_as_one(pivot, store, pivot_tokenizer, source_tokenizer, dialogues, tmp_path):
    pivot().save_pretrained(tmp_path / "pivot")
    pivot_tokenizer.save_pretrained(tmp_path / "pivot")
    source_tokenizer.save_pretrained(tmp_path / "source")
    inputs = str(tmp_path), str(store.folder), dialogues
    first, second = spawn(train_rank, 2, *inputs, 1, timeout=120)
    whole = train_rank(0, *inputs, 2)
    before = load_tensors(tmp_path / "pivot" / "model.safetensors")
    moved = 0.0
    for name, wanted in whole.items():
        assert torch.equal(first[name], second[name])
        moved = max(moved, float((wanted - before[name]).abs().max()))
        torch.testing.assert_close(first[name], wanted, rtol=1e-5, atol=1e-6)
    assert moved > 1e-3


def test_onehot_rows_hold_the_next_or_the_current_token(store, pivot_tokenizer, source_tokenizer, dialogues):
    made = {
        at: collator(pivot_tokenizer, store, source_tokenizer, unaligned="onehot", onehot_at=at)(
            dialogues[:2]
        )
        for at in ("next", "current")
    }
    plain = collator(pivot_tokenizer, store, source_tokenizer)(dialogues[:2])
    ids, seen = plain.inputs["input_ids"], plain.inputs["attention_mask"].bool()
    rest = seen & ~plain.sources[0].mask
    assert rest.any()
    last = seen.sum(1) - 1
    following = torch.cat([ids[:, 1:], ids[:, -1:]], 1)
    following[torch.arange(len(ids)), last] = ids[torch.arange(len(ids)), last]
    for at, wanted in (("next", following), ("current", ids)):
        target = made[at].sources[0]
        assert torch.equal(target.ids[rest][:, 0], wanted[rest])
        assert (target.ids[rest][:, 1:] == -1).all()
        assert (target.logits[rest][:, 0] == 1).all()
        probs, _ = target.probabilities()
        torch.testing.assert_close(probs[rest][:, 0], torch.ones(int(rest.sum())))
        aligned = plain.sources[0].mask
        assert torch.equal(target.ids[aligned], plain.sources[0].ids[aligned])


def test_forbidden_tokens_are_stored_and_dropped(
    source_model, source_tokenizer, pivot_tokenizer, dialogues, tmp_path
):
    import copy

    model = copy.deepcopy(source_model)
    head = model.forward

    def forbidding(*args, **options):
        out = head(*args, **options)
        out.logits[..., 4:] = -torch.inf  # four tokens are left of which k = 8 are kept
        return out

    model.forward = forbidding
    made = collect(
        model,
        dialogues[:2],
        out=tmp_path / "x",
        k=8,
        tokenizer=source_tokenizer,
        pivot_tokenizer=pivot_tokenizer,
    )
    assert np.isneginf(made[0].logits[:, 4:]).all()
    assert np.isfinite(made[0].lse).all()
    batch = collator(pivot_tokenizer, made, source_tokenizer, vocab="prefix")(dialogues[:2])
    target = batch.sources[0]
    probs, _ = target.probabilities()
    assert probs.isfinite().all()
    assert (target.ids[target.mask] >= 0).sum(-1).max() <= 4
