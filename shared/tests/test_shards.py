# ruff: noqa: PT012
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion_core.atomic import UNDER_WAY, resumable_directory
from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import CheckpointError, InputError
from fusion_core.shards import ShardReader, ShardWriter

INDEX = "model.safetensors.index.json"


def tensors(n=5, size=10):
    return {f"layer.{i}": torch.full((size,), float(i)) for i in range(n)}


def write(folder, state, shard_bytes=100, like=None):
    with ShardWriter(folder, shard_bytes, like) as writer:
        for key, value in state.items():
            if key not in writer:
                writer.add(key, value)


def check(folder, state):
    found = load_tensors(folder)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_standard_names_and_index(tmp_path):
    write(tmp_path, tensors())
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 40
    assert index["weight_map"]["layer.4"] == names[2]
    check(tmp_path, tensors())
    check(tmp_path / INDEX, tensors())
    assert torch.equal(load_file(tmp_path / names[0])["layer.1"], tensors()["layer.1"])


def test_partial_until_closed_and_written_as_it_goes(tmp_path):
    writer = ShardWriter(tmp_path, 100)
    for i, (key, value) in enumerate(tensors().items()):
        writer.add(key, value)
        assert len(list(tmp_path.iterdir())) == i // 2
    assert all(f.name.endswith(".safetensors.partial") for f in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="is unfinished; run again what wrote it"):
        ShardReader(tmp_path)
    writer.close()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("done", range(3))
def test_no_half_checkpoint_is_read(tmp_path, monkeypatch, done):
    """A kill while close() gives the shards their names: some have theirs, the index is missing."""
    with ShardWriter(tmp_path / "whole", 100) as writer:
        for key, value in tensors().items():
            writer.add(key, value)
    writer = ShardWriter(tmp_path / "cut", 100)
    for key, value in tensors().items():
        writer.add(key, value)
    replace, names = Path.replace, []

    def stops(self, target):
        if Path(target).name.startswith("model-") and "-of-" in Path(target).name:
            if len(names) == done:
                raise KeyboardInterrupt
            names.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    monkeypatch.undo()
    assert (
        len(list((tmp_path / "cut").glob("*.partial")))
        == len(list((tmp_path / "whole").glob("*-of-*"))) - done
    )
    with pytest.raises(CheckpointError, match="is unfinished"):
        ShardReader(tmp_path / "cut")
    ShardWriter(tmp_path / "cut", 100).close()
    assert {f.name: f.read_bytes() for f in (tmp_path / "cut").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }


def test_a_folder_under_way_is_finished_whatever_it_holds(tmp_path):
    """A kill between the index and the step that shows the folder: the writer goes on, readers refuse."""
    with resumable_directory(tmp_path / "out", "a") as work, ShardWriter(work, 100) as writer:
        writer.add("a", torch.ones(2))
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / UNDER_WAY).write_text("a")
    with pytest.raises(CheckpointError, match="is unfinished"):
        ShardReader(tmp_path / "out.partial")
    with resumable_directory(tmp_path / "out", "a") as work, ShardWriter(work, 100) as writer:
        assert "a" in writer
    assert torch.equal(ShardReader(tmp_path / "out").get("a"), torch.ones(2))


def test_error_in_the_block_does_not_finish(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 1) as writer:
        writer.add("a", torch.ones(1))
        writer.add("b", torch.ones(1))
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ["model-00001.safetensors.partial"]


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_stop_at_any_rename_is_resumed(tmp_path, monkeypatch, stop_at):
    calls, replace = [], Path.replace

    def stops(self, target):
        calls.append(target)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stops)
    try:  # 3 shards written, 3 renamed, the index: 7 steps
        write(tmp_path, tensors())
    except KeyboardInterrupt:
        monkeypatch.undo()
        assert not (tmp_path / INDEX).exists()
        write(tmp_path, {**tensors(), "more": torch.zeros(30)})
        check(tmp_path, {**tensors(), "more": torch.zeros(30)})
    else:
        assert stop_at == 8
        assert len(calls) == 7


KILLED = """
import sys, time, torch
from fusion_core.shards import ShardWriter
writer = ShardWriter(sys.argv[1], 100)
for i in range(3):
    writer.add(f"layer.{i}", torch.full((10,), float(i)))
print("ready", flush=True); time.sleep(60)
"""


def test_resume_after_a_kill(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.wait()
    child.stdout.close()
    writer = ShardWriter(tmp_path, 100)
    assert [key in writer for key in tensors()] == [True, True, False, False, False]
    with pytest.raises(InputError, match=r"tensor 'layer.1' is written already"):
        writer.add("layer.1", torch.ones(1))
    write(tmp_path, tensors())
    check(tmp_path, tensors())


def test_a_large_tensor_gets_a_shard_of_its_own(tmp_path):
    state = {"a": torch.ones(2), "big": torch.ones(1000), "b": torch.ones(2)}
    write(tmp_path, state)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    check(tmp_path, state)


def test_like_files_are_copied_but_not_over_others(tmp_path):
    like, out = tmp_path / "like", tmp_path / "out"
    like.mkdir()
    out.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "merges.txt",
    ):
        (like / name).write_text("like")
    (like / "model.safetensors").write_text("weights")
    (like / "notes.md").write_text("x")
    (out / "config.json").write_text("mine")
    write(out, tensors(), like=like)
    copied = {f.name: f.read_text() for f in out.iterdir() if "model" not in f.name}
    assert copied.pop("config.json") == "mine"
    assert set(copied) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"}
    assert set(copied.values()) == {"like"}


def test_writer_refuses(tmp_path):
    with pytest.raises(InputError, match="shard_bytes is 0, wanted at least 1"):
        ShardWriter(tmp_path, 0)
    with pytest.raises(InputError, match="like is 'nowhere', wanted the folder of a model"):
        ShardWriter(tmp_path, 10, like="nowhere")
    write(tmp_path, tensors())
    with pytest.raises(InputError, match="holds a finished checkpoint"):
        ShardWriter(tmp_path, 10)


MEASURED = """
import resource, sys, torch
from fusion_core.shards import ShardReader, ShardWriter
unit = 1 if sys.platform == "darwin" else 1024
torch.ones(1000).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ShardWriter(sys.argv[1], 10_000_000) as writer:
    for i in range(40):
        writer.add(str(i), torch.full((1_000_000,), float(i)))
reader = ShardReader(sys.argv[1])
assert sum(float(reader.get(key)[-1]) for key in reader) == sum(range(40))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


@pytest.mark.skipif(os.name == "nt", reason="no resource module")
def test_memory_is_bounded(tmp_path):
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000_000  # of 160 MB written and read


def test_reader_is_lazy(tmp_path):
    save_tensors(tmp_path / "a.safetensors", tensors(12))
    reader = ShardReader(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", reader.info("layer.3").offset)
    info = reader.info("layer.3")
    assert (info.dtype, info.shape, info.nbytes) == ("float32", (10,), 40)
    first = min(reader.keys(), key=lambda key: reader.info(key).offset)
    assert float(reader.get(first)[0]) == float(first.rpartition(".")[2])
    with pytest.raises(CheckpointError, match=r"is cut off inside 'layer.3'"):
        reader.get("layer.3")
    assert len(reader) == 12
    assert "layer.3" in reader
    assert "layer.99" not in reader


def test_reader_of_a_folder_without_an_index(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    save_tensors(tmp_path / "b.safetensors", {"b": torch.ones(1)})
    assert ShardReader(tmp_path).keys() == ["a", "b"]
    save_tensors(tmp_path / "c.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="holds 'a' in more than one file"):
        ShardReader(tmp_path)
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds several indices, name one"):
        ShardReader(tmp_path)


def test_reader_complaints(tmp_path):
    write(tmp_path, tensors())
    first = tmp_path / "model-00001-of-00003.safetensors"
    reader = ShardReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor 'x'; it has layer.0, layer.1"):
        reader.get("x")
    reader.info("layer.0")
    os.truncate(first, first.stat().st_size - 40)
    with pytest.raises(CheckpointError, match="is cut off"):
        reader.get("layer.1")
    with pytest.raises(CheckpointError, match="is cut off"):
        ShardReader(tmp_path).get("layer.0")
    first.unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors cannot be read"):
        ShardReader(tmp_path).get("layer.0")
    for text, words in [
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is outside its folder"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "which is outside its folder"),
        ('{"weight_map": {"a": "b\\\\x.safetensors"}}', "which is outside its folder"),
        ("[]", "is not an index of shards"),
        ("{", "is not an index of shards"),
        ('{"weight_map": {"a": 3}}', "is not an index of shards"),
    ]:
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=words):
            ShardReader(tmp_path)
