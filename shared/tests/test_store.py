import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.errors import InputError, StoreError
from fusion_core.store import Manifest, ShardStore, parse_shard, take_shard

PRINT = {"teacher": {"name": "vit", "sha": "abc"}, "seed": 0, "sizes": (1, 2)}
SCHEMA = {"logits": ("float16", (3,)), "label": ("int64", ())}


def rows(start, stop):
    label = np.arange(start, stop)
    return {"logits": np.stack([label] * 3, 1).astype(np.float16), "label": label}


def make(folder, *ranges):
    store = ShardStore.create(folder, PRINT, SCHEMA, kind="logits")
    for index in ranges:
        store.append(rows(*index), index)
    return store


def test_manifest_is_as_documented(tmp_path):
    store = make(tmp_path, (0, 4), (4, 6))
    store.finish(6)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema"] == "fusion.store/1"
    assert (manifest["kind"], manifest["rows"], manifest["complete"]) == ("logits", 6, True)
    assert manifest["fingerprint"] == {"teacher": {"name": "vit", "sha": "abc"}, "seed": 0, "sizes": [1, 2]}
    assert [(s["file"], s["start"], s["stop"]) for s in manifest["shards"]] == [
        ("shard-00000.safetensors", 0, 4),
        ("shard-00001.safetensors", 4, 6),
    ]
    assert all(len(s["digest"]) == 64 for s in manifest["shards"])


def test_fingerprint_kind_and_length(tmp_path):
    make(tmp_path, (0, 4))
    store = ShardStore.open(tmp_path, PRINT)
    assert store.fingerprint == {**PRINT, "sizes": [1, 2]}
    assert (store.kind, len(store), store.complete) == ("logits", 4, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "'seed': the store has 0, wanted 1"),
        ({"seed": False}, "'seed': the store has 0, wanted False"),
        ({"teacher": {"name": "vit", "sha": "xyz"}}, "'teacher.sha': the store has 'abc', wanted 'xyz'"),
        ({"teacher": {"name": "vit"}}, "'teacher.sha': the store has 'abc', wanted 'nothing'"),
        ({"new": 1}, "'new': the store has 'nothing', wanted 1"),
        ({"sizes": [1]}, r"'sizes': the store has \[1, 2\], wanted \[1\]"),
    ],
)
def test_other_fingerprint_names_the_field(tmp_path, change, words):
    make(tmp_path, (0, 2))
    for attempt in (ShardStore.open, lambda *args: ShardStore.create(*args, SCHEMA)):
        with pytest.raises(StoreError, match=words):
            attempt(tmp_path, {**PRINT, **change})


def test_other_schema_is_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(
        StoreError, match=r"another schema in 'label': the store has \['int64', \[\]\], wanted"
    ):
        ShardStore.create(tmp_path, PRINT, {**SCHEMA, "label": ("int32", ())})


def test_bad_schema_and_fingerprint(tmp_path):
    for dtype in ("bfloat16", "object", "float99", "complex128"):
        with pytest.raises(InputError, match=rf"schema\['x'\] has dtype '{dtype}', wanted a numpy dtype"):
            ShardStore.create(tmp_path, {}, {"x": (dtype, ())})
    with pytest.raises(InputError, match="schema is empty"):
        ShardStore.create(tmp_path, {}, {})
    for value in (float("nan"), object()):
        with pytest.raises(InputError, match="fingerprint takes what JSON can say"):
            ShardStore.create(tmp_path, {"a": value}, SCHEMA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint8", "uint16", "int64", "bool"]
)
def test_dtypes(tmp_path, dtype):
    store = ShardStore.create(tmp_path, {}, {"x": (dtype, (2, 2)), "none": (dtype, (0,))})
    array = np.arange(12).reshape(3, 2, 2).astype(dtype)
    store.append({"x": array, "none": np.zeros((3, 0), dtype)}, (0, 3))
    found = ShardStore.open(tmp_path)[:]
    assert found["x"].dtype == array.dtype
    assert np.array_equal(found["x"], array)
    assert found["none"].shape == (3, 0)


def test_missing_and_any_order(tmp_path):
    store = make(tmp_path)
    assert store.missing(5) == [(0, 5)]
    assert store.missing(0) == []
    store = make(tmp_path, (6, 8), (2, 4))
    assert store.missing(10) == [(0, 2), (4, 6), (8, 10)]
    assert store.missing(7) == [(0, 2), (4, 6)]
    assert store.missing(1) == [(0, 1)]
    with pytest.raises(StoreError, match="rows 0 to 2 of 8 are missing"):
        store.finish(8)
    store.append(rows(0, 2), (0, 2))
    store.append(rows(4, 6), (4, 6))
    with pytest.raises(StoreError, match="has 8 rows, finish was told 6"):
        store.finish(6)
    store.finish(8)
    store.finish(8)
    assert ShardStore.open(tmp_path).complete
    assert np.array_equal(store[:]["label"], np.arange(8))
    with pytest.raises(StoreError, match="is complete with 8 rows; nothing can be appended"):
        store.append(rows(8, 9), (8, 9))


def test_append_refuses(tmp_path):
    store = make(tmp_path, (2, 4))
    for index in [(3, 5), (0, 3), (2, 4), (1, 9)]:
        with pytest.raises(InputError, match=r"index is .*, but rows 2 to 4 are there"):
            store.append(rows(*index), index)
    for index in [(-1, 1), (5, 5)]:
        with pytest.raises(InputError, match="wanted 0 <= start < stop"):
            store.append(rows(0, 1), index)
    good = rows(4, 6)
    for bad in (
        {"logits": good["logits"]},
        {**good, "more": good["label"]},
        {**good, "label": good["label"].astype(np.int32)},
        {**good, "logits": good["logits"][:, :2]},
        rows(4, 7),
    ):
        with pytest.raises(InputError, match=r"arrays are .*, wanted \{'logits': \('float16', \(2, 3\)\)"):
            store.append(bad, (4, 6))
    assert len(store) == 2


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return make(tmp_path_factory.mktemp("uneven"), (7, 8), (0, 3), (3, 7))


@given(picked=st.lists(st.integers(-8, 7), max_size=20))
def test_rows_in_any_order(uneven, picked):
    found = uneven[picked]
    assert found["label"].tolist() == [i % 8 for i in picked]
    assert found["logits"].shape == (len(picked), 3)
    assert np.array_equal(uneven[np.array(picked, np.int32)]["logits"], found["logits"])


@given(cut=st.slices(8))
def test_slices(uneven, cut):
    assert uneven[cut]["label"].tolist() == list(range(8))[cut]


def test_rows_refuses(tmp_path):
    store = make(tmp_path, (2, 4))
    for picked, row in [([3, 9], 9), ([2, 1], 1), ([-5], -1), (slice(0, 4), 0)]:
        with pytest.raises(StoreError, match=f"has no row {row}; it has 2 rows"):
            store[picked]
    for picked in ([0.5], [[1]], np.array([True, False]), np.array(2)):
        with pytest.raises(InputError, match=r"rows is .*wanted a slice or 1-D integers"):
            store[picked]
    with pytest.raises(StoreError, match="has no row 0"):
        make(tmp_path / "empty")[[0]]


def test_results_are_copies(uneven):
    uneven[:]["label"][:] = 99
    assert uneven[[0]]["label"].tolist() == [0]


def test_only_touched_rows_are_read(tmp_path):
    store = ShardStore.create(tmp_path, {}, {"x": ("float32", (1000,))})
    for start in range(0, 3000, 1000):
        store.append({"x": np.full((1000, 1000), start, np.float32)}, (start, start + 1000))
    store = ShardStore.open(tmp_path)
    tracemalloc.start()
    found = store[[2500, 3, 2501]]["x"][:, 0].tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [2000.0, 0.0, 2000.0]
    assert peak < 200_000  # of 12 MB


def test_a_pickled_store_carries_no_rows(tmp_path):
    store = ShardStore.create(tmp_path, {}, {"x": ("float32", (1000,))})
    store.append({"x": np.ones((100, 1000), np.float32)}, (0, 100))
    before = store[[5]]
    text = pickle.dumps(store)
    assert len(text) < 5000
    assert np.array_equal(pickle.loads(text)[[5]]["x"], before["x"])


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_stop_between_any_two_steps_is_resumed(tmp_path, monkeypatch, name, stop_at):
    if name == "fsync" and os.name == "nt":
        pytest.skip("folders are not synced there")
    store = make(tmp_path, (0, 2))
    owner = os if name == "fsync" else Path
    real, calls = getattr(owner, name), []

    def stops(*args):
        calls.append(args)
        if len(calls) == (
            stop_at if name != "fsync" else 2 * stop_at - 1
        ):  # fsync: file, folder, file, folder
            raise Stop
        return real(*args)

    monkeypatch.setattr(owner, name, stops)
    with pytest.raises(Stop):
        store.append(rows(2, 4), (2, 4))
    monkeypatch.undo()
    again = make(tmp_path)
    again.verify()
    assert again.missing(4) == [(2, 4)]
    again.append(rows(2, 4), (2, 4))
    again.finish(4)
    again.verify()
    assert again[:]["label"].tolist() == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 3


KILLED = """
import sys, numpy as np
from fusion_core.store import Manifest, ShardStore, parse_shard, take_shard
store = ShardStore.create(sys.argv[1], {}, {"x": ("int64", (100,))})
for i in range(10**6):
    store.append({"x": np.full((2, 100), i)}, (2 * i, 2 * i + 2))
"""


def test_kill_at_any_time_leaves_a_store(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("shard-*"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.003)
    child.kill()
    child.wait()
    store = ShardStore.create(tmp_path, {}, {"x": ("int64", (100,))})
    store.verify()
    n = len(store)
    assert n >= 14
    assert store.missing(n + 2) == [(n, n + 2)]
    store.append({"x": np.full((2, 100), n // 2)}, (n, n + 2))
    store.finish(n + 2)
    assert np.array_equal(store[:]["x"][:, 0], np.arange(n + 2) // 2)


def test_damaged_stores(tmp_path):
    with pytest.raises(StoreError, match=r"is no store: manifest.json cannot be read"):
        ShardStore.open(tmp_path)
    make(tmp_path, (0, 2), (2, 4))
    shard, manifest = tmp_path / "shard-00001.safetensors", tmp_path / "manifest.json"
    whole, text = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(whole[:-1] + b"\x07")
    store = ShardStore.open(tmp_path)
    with pytest.raises(StoreError, match=r"shard-00001.safetensors does not have the digest of the manifest"):
        store.verify()
    shard.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"shard-00001.safetensors does not fit the manifest: .* is cut off"):
        ShardStore.open(tmp_path)
    shard.unlink()
    with pytest.raises(StoreError, match=r"does not fit the manifest: .*cannot be read"):
        ShardStore.open(tmp_path)
    shard.write_bytes(whole)
    for old, new, words in [
        ('"stop": 4', '"stop": 5', "the manifest wants"),
        ('"start": 2', '"start": 1', "hold the same rows"),
        ("fusion.store/1", "fusion.store/9", "schema 'fusion.store/9', wanted 'fusion.store/1'"),
        ('"shards"', '"shard"', "is damaged: KeyError 'shards'"),
        ("{", "", "is damaged: Extra data"),
        ('"rows": 4', '"rows": "4"', "manifest.json: rows is '4', wanted int"),
        ('"start": 2', '"start": 1e999', r"shard-00001.safetensors holds the rows \[inf, 4\]"),
        ('"shard-00001', '"../shard-00001', "outside the folder"),
        ('"float16"', '"object"', "array .* is 'object'"),
        ('"shards": [', '"shards": ' + "[" * 200_000, "is damaged: RecursionError"),
    ]:
        assert old in text
        manifest.write_text(text.replace(old, new, 1))
        with pytest.raises(StoreError, match=words):
            ShardStore.open(tmp_path)


def test_manifest_survives_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "manifest.jsonl"
    manifest = Manifest(path)
    manifest.add("a", seconds=1.5)
    manifest.add("b", error="broken")
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        read = Manifest(path)
        assert ("a" in read) == (cut > whole.index(b"\n"))
        read.add("c")
        assert "c" in Manifest(path)
        assert set(Manifest(path).entries) <= {"a", "b", "c"}
    path.write_bytes(whole)
    read = Manifest(path)
    assert read.done == {"a"}
    assert read.failures() == {"b": "broken"}
    read.add("b", seconds=2)
    assert (Manifest(path).done, Manifest(path).failures()) == ({"a", "b"}, {})
    assert dict(Manifest(path))["a"] == {"seconds": 1.5}


def test_manifest_refuses_what_it_cannot_say_or_read(tmp_path):
    path = tmp_path / "manifest.jsonl"
    with pytest.raises(InputError, match="JSON"):
        Manifest(path).add("a", value=object())
    assert not path.exists()
    path.write_text('{"key": "a"}\n[1]\n{"key": "b"}\n')
    with pytest.raises(StoreError, match="line 2"):
        Manifest(path)


@given(st.lists(st.text(max_size=5), unique=True), st.integers(1, 5))
def test_shards_cover_the_work_once(items, n):
    parts = [take_shard(items, f"{i}/{n}") for i in range(n)]
    assert sorted(x for part in parts for x in part) == sorted(items)
    assert take_shard(items, None) == sorted(items)


@pytest.mark.parametrize("shard", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_bad_shards_are_named(shard):
    with pytest.raises(InputError, match=f"shard is {shard!r}"):
        parse_shard(shard)
