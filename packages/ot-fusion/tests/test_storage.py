"""Folders in and out, streaming, resuming, refusing, interrupted runs."""

import json
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from fusion_core.errors import CheckpointError
from fusion_core.testing import kill_when
from ot_fusion import FusionConfig, fuse, fusing, storage
from ot_fusion.errors import InputError
from ot_fusion.fusing import settled
from ot_fusion.storage import LazyState, folder_spec, fuse_folders, load_maps, refuse

WEIGHTS = {"a": 0.5, "b": 0.5}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    found = {}
    for number, name in enumerate("ab"):
        model = models.make("llama-mha", seed=number).float()
        model.save_pretrained(place / name)
        (place / name / "tokenizer.json").write_text("{}")
        found[name] = str(place / name)
    return found


def loaded(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("strategy", ["flow", "consistent"])
def test_a_fused_folder_is_a_model_folder_with_its_maps(folders, tmp_path, models, strategy):
    config = FusionConfig(features="wts", strategy=strategy)
    pair = {name: loaded(path) for name, path in folders.items()}
    fused = fuse(pair, config=config)
    fused.save_pretrained(tmp_path / "out", parents=folders)
    again = loaded(tmp_path / "out")
    for key, value in fused.state.items():
        assert torch.equal(again.state_dict()[key], value)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    maps = load_maps(tmp_path / "out" / "maps.safetensors")
    assert {name: plan.matrix.shape for name, plan in maps.items()} == {
        n: p.matrix.shape for n, p in fused.maps.items()
    }
    note = json.loads((tmp_path / "out" / "ot_fusion.json").read_text())
    assert note["weights"] == WEIGHTS
    assert note["anchor"] == "b"
    with pytest.raises(InputError, match="not empty"):
        fused.save_pretrained(tmp_path / "out")
    refuse(tmp_path / "out", tmp_path / "other", alpha=0.2)
    wanted = fuse(pair, config=config.replace(alpha=0.2)).state
    for key, value in loaded(tmp_path / "other").state_dict().items():
        torch.testing.assert_close(value, wanted[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", ["flow", "consistent"])
def test_streaming_gives_the_same_model_in_small_shards(folders, tmp_path, strategy):
    pair = {name: loaded(path) for name, path in folders.items()}
    config = FusionConfig(features="wts", strategy=strategy)
    spec = folder_spec(folders["b"], list(LazyState(folders["b"])))
    config = settled(config, spec)
    plans = fuse_folders(
        folders, tmp_path / "out", anchor="b", weights=WEIGHTS, config=config, shard_bytes=8_000
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    wanted = fuse(pair, config=config)
    assert set(plans) == set(wanted.maps)
    for key, value in loaded(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(value, wanted.state[key], atol=1e-6, rtol=0)
    assert not (tmp_path / "out.partial").exists()


def fuse_until(folders, out, last):
    """Fuse, and wait to be killed before the tensor of this number; how many tensors were mixed."""
    plain, count = fusing.mix_states, [0]

    def counted(*words, **settings):
        count[0] += 1
        if count[0] == last:
            Path(f"{out}.here").touch()
            time.sleep(60)
        return plain(*words, **settings)

    config = FusionConfig(features="wts", strategy="consistent", legal="enforce")
    with mock.patch.object(fusing, "mix_states", counted):
        fuse_folders(folders, out, anchor="b", weights=WEIGHTS, config=config, shard_bytes=8000)
    return count[0]


def test_a_killed_run_leaves_no_folder_and_goes_on(folders, tmp_path):
    out = tmp_path / "out"
    assert kill_when([fuse_until, folders, out, 12], f"{out}.here") != 0
    assert not out.exists()
    assert (tmp_path / "out.partial" / "maps.safetensors").exists()
    assert fuse_until(folders, out, None) < len(list(LazyState(folders["b"])))  # finished shards were kept
    whole = fuse(
        {n: loaded(p) for n, p in folders.items()}, config=FusionConfig(features="wts", strategy="consistent")
    )
    for key, value in loaded(out).state_dict().items():
        torch.testing.assert_close(value, whole.state[key], atol=1e-6, rtol=0)


def cut_off(monkeypatch, name, after, call):
    """Run a call that ends when ``storage.NAME`` is called once more than ``after`` times, as by a kill."""
    plain, count = getattr(storage, name), []

    def stops(*args, **options):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(name)
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, name, stops)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_fusing_again_takes_nothing_of_a_run_with_another_weight(folders, tmp_path, monkeypatch):
    pair = {name: loaded(path) for name, path in folders.items()}
    fused = fuse(pair, config=FusionConfig(features="wts"))
    fused.save_pretrained(tmp_path / "fused", parents=folders)
    refuse(tmp_path / "fused", tmp_path / "wanted", alpha=0.8)
    cut_off(monkeypatch, "save_maps", 0, lambda: refuse(tmp_path / "fused", tmp_path / "out", alpha=0.2))
    assert list((tmp_path / "out.partial").glob("model-*.safetensors"))
    refuse(tmp_path / "fused", tmp_path / "out", alpha=0.8)
    files = {f.name: f.read_bytes() for f in (tmp_path / "wanted").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_cut_off_at_its_last_step_can_be_run_again(folders, tmp_path, monkeypatch, overwrite):
    config = FusionConfig(features="wts", strategy="consistent")
    words = {"anchor": "b", "weights": WEIGHTS, "config": config, "shard_bytes": 8_000}
    fuse_folders(folders, tmp_path / "wanted", **words)
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    call = lambda: fuse_folders(folders, tmp_path / "out", overwrite=overwrite, **words)
    cut_off(monkeypatch, "save_maps", 1, call)  # behind the index of the shards
    assert [f.name for f in tmp_path.glob("out/*")] == ["old"] * overwrite
    call()
    files = {f.name: f.read_bytes() for f in (tmp_path / "wanted").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == files


def test_parents_that_changed_are_refused(folders, tmp_path, models):
    import shutil

    places = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in folders.items()}
    fused = fuse({n: loaded(p) for n, p in places.items()}, config=FusionConfig(features="wts"))
    fused.save_pretrained(tmp_path / "out", parents=places)
    models.make("llama-mha", seed=5).float().save_pretrained(places["a"])
    with pytest.raises(InputError, match=r"the parent a .* was changed"):
        refuse(tmp_path / "out", tmp_path / "other", alpha=0.5)
    fused.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="does not say where a, b lie"):
        refuse(tmp_path / "bare", tmp_path / "other", alpha=0.5)


def test_bad_folders(folders, tmp_path):
    with pytest.raises(InputError, match="no fused folder"):
        refuse(tmp_path, tmp_path / "other")
    (tmp_path / "x.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError):
        load_maps(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no plans"):
        load_maps(next(Path(folders["a"]).glob("*.safetensors")))
    with pytest.raises(InputError, match=r"readable config.json"):
        folder_spec(tmp_path, [])
    with pytest.raises(InputError, match="features='wts'"):
        fuse_folders(folders, tmp_path / "o", anchor="b", weights=WEIGHTS, config=FusionConfig())


def test_a_model_without_a_folder_class_is_saved_as_safetensors(models, tmp_path):
    pair = [models.make("mlp"), models.make("mlp", seed=1)]
    fused = fuse(pair, config=FusionConfig(features="wts"))
    fused.save_pretrained(tmp_path / "out")
    state = {key: LazyState(tmp_path / "out" / "model.safetensors")[key] for key in fused.state}
    assert all(torch.equal(state[key], value) for key, value in fused.state.items())
