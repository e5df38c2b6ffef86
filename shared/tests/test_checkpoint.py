import dataclasses
import enum
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusion_core.checkpoint import (
    KeyMap,
    check_config,
    digest,
    digest_file,
    digest_state,
    load_foreign,
    load_strict,
    load_tensors,
    save_tensors,
)
from fusion_core.errors import CheckpointError, InputError
from fusion_core.shards import CODES, ShardReader

POINTER = "version https://git-lfs.example/spec/v1\noid sha256:00\nsize 12\n"


def example():
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "double": torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(3).to(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "view": base[:, 1],
        "tied": base,
        "weight": base,
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_save_and_load_agree_with_the_format_library(tmp_path):
    tensors, path = example(), tmp_path / "a.safetensors"
    save_tensors(path, tensors, {"note": "x"})
    assert same(load_file(path), tensors)
    assert same(load_tensors(path), tensors)
    assert ShardReader(path).metadata == {"format": "pt", "note": "x"}
    places = {key: ShardReader(path).info(key).offset for key in tensors}
    assert all(place % tensors[key].element_size() == 0 for key, place in places.items())
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "b.safetensors")
    assert same(load_tensors(tmp_path / "b.safetensors"), tensors)


@pytest.mark.parametrize("name", sorted(CODES))
def test_every_dtype_round_trips(tmp_path, name):
    tensor = torch.zeros(3, dtype=getattr(torch, name))
    save_tensors(tmp_path / "a", {"x": tensor})
    assert load_file(tmp_path / "a")["x"].dtype == load_tensors(tmp_path / "a")["x"].dtype == tensor.dtype


def test_load_some_keys_in_order(tmp_path):
    save_tensors(tmp_path / "a", example())
    assert list(load_tensors(tmp_path / "a", ["view", "flag"])) == ["view", "flag"]
    loaded = load_tensors(tmp_path / "a", ["double"])["double"]
    loaded += 1  # memory of its own: the file stays
    assert not torch.equal(load_tensors(tmp_path / "a")["double"], loaded)


def test_save_refuses(tmp_path):
    with pytest.raises(InputError, match="metadata has 'a': 1, wanted text"):
        save_tensors(tmp_path / "a", {}, {"a": 1})
    with pytest.raises(InputError, match="tensor 'x' is int, wanted a tensor"):
        save_tensors(tmp_path / "a", {"x": 3})
    with pytest.raises(InputError, match=r"tensor 'x' is torch.complex128, wanted .*'float32'"):
        save_tensors(tmp_path / "a", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_load_complaints(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a.safetensors cannot be read: No such file"):
        load_tensors(path)
    save_tensors(path, {"weight": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=r"a.safetensors has no tensor 'bias'; it has weight"):
        load_tensors(path, ["bias"])
    with pytest.raises(CheckpointError, match="has no tensor 'bias'"):
        load_tensors(path, shapes={"bias": (3,)})
    with pytest.raises(CheckpointError, match=r"'weight' has shape \(2, 3\), wanted \(3, 2\)"):
        load_tensors(path, shapes={"weight": (3, 2)})
    assert load_tensors(path, shapes={"weight": (2, 3)})["weight"].shape == (2, 3)
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*git lfs pull"):
        load_tensors(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\1" * 50)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_tensors(path)


@given(cut=st.integers(0, 200), data=st.data())
def test_a_cut_file_is_never_loaded(tmp_path_factory, cut, data):
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    save_tensors(path, {"a": torch.randn(7), "b": torch.randn(3, 2)})
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError, match="is cut off"):
        load_tensors(path)


def header(path, entries, size=8):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    return path


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([1], "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "its header is damaged"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, "do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "is too long"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "its header is damaged"),
    ],
)
def test_damaged_headers(tmp_path, entries, words):
    with pytest.raises(CheckpointError, match=words):
        load_tensors(header(tmp_path / "a", entries))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_malicious_pickle_never_runs(tmp_path, how):
    trap, path = tmp_path / "trap", tmp_path / "a.pt"
    evil = {"state_dict": {}, "x": Evil(trap)}
    if how == "torch":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(
        CheckpointError, match=r"holds more than tensors \(GLOBAL \w+.mkdir .*can run any code"
    ):
        load_foreign(path)
    assert not trap.exists()
    if how == "pickle":  # the trap is a real one
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_os_system_is_named(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(
        {"a": type("X", (), {"__reduce__": lambda self: (__import__("os").system, ("true",))})()}, path
    )
    with pytest.raises(CheckpointError, match=r"\(GLOBAL \w+.system.*\).*not loaded"):
        load_foreign(path)


@pytest.mark.parametrize(
    "wrap", [(), ("state_dict",), ("model_state_dict",), ("model",), ("model", "state_dict")]
)
def test_foreign_is_unwrapped(tmp_path, wrap):
    state = {"weight": torch.randn(2), "model": torch.randn(1)}
    found = state
    for word in reversed(wrap):
        found = {word: found, "epoch": 3}
    torch.save(found, tmp_path / "a.pt")
    assert same(load_foreign(tmp_path / "a.pt"), state)


def test_foreign_safetensors(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    assert same(load_foreign(tmp_path / "a.safetensors"), {"w": torch.ones(1)})


def test_foreign_module_and_loose_values_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError, match=r"more than tensors \(GLOBAL torch.nn.*Linear\)"):
        load_foreign(path)
    torch.save({"weight": torch.zeros(1), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"holds more than tensors: \{'epoch': 'int'\}"):
        load_foreign(path)
    torch.save({1: torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"holds more than tensors: \[1\]"):
        load_foreign(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="holds a list, wanted a state_dict"):
        load_foreign(path)
    torch.save({"w": torch.zeros(3).to_sparse()}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt .*sparse"):
        load_foreign(path)
    torch.save({"w": torch.zeros(3), "c": torch.zeros(3, dtype=torch.complex64)}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt holds complex or sparse tensors \(c\)"):
        load_foreign(path)


def test_foreign_damaged(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_foreign(path)
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load_foreign(path)
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, buffer)
    for content in (b"", b"junk", buffer.getvalue()[:700], b"PK\3\4" + b"\0" * 40):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a.pt is damaged or no checkpoint"):
            load_foreign(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(CheckpointError, match=r"a.pt is damaged or no checkpoint"):
        load_foreign(path)


def test_key_map():
    state = {f"_orig_mod.module.{k}": torch.ones(1) for k in ("backbone.a.gamma", "fc.w", "aux.w")}
    keys = KeyMap(
        [(r"^backbone\.", "encoder."), (r"\.gamma$", ".weight"), (r"^aux\.", None), (r"^never", "x")]
    )
    assert list(keys.apply(state)) == ["encoder.a.weight", "fc.w"]
    report = keys.report()
    assert report["renamed"]["_orig_mod.module.backbone.a.gamma"] == "encoder.a.weight"
    assert report["dropped"] == ["_orig_mod.module.aux.w"]
    assert report["unused"] == ["^never"]
    assert list(KeyMap(strip=()).apply(state)) == list(state)
    assert list(KeyMap([(r"(\w+)\.w", r"\1.v")]).apply({"a.w": torch.ones(1)})) == ["a.v"]


def test_key_map_complaints():
    with pytest.raises(CheckpointError, match=r"'module.a' and 'a' would both be named 'a'"):
        KeyMap().apply({"module.a": torch.ones(1), "a": torch.ones(1)})
    with pytest.raises(InputError, match=r"rules has '\(', no regular expression"):
        KeyMap([("(", "x")])


def test_layers_without_end_are_refused(tmp_path):
    check_config("owner/name")
    check_config(tmp_path)
    path = tmp_path / "config.json"
    for name in (
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "n_layers",
        "num_decoder_layers",
        "decoder_layers",
    ):
        path.write_text(
            json.dumps({"vocab_size": 10**6, name: 10_000, "inner": {"a": [1], "n_heads": 99999}})
        )
        check_config(tmp_path)
        path.write_text(json.dumps({"inner": {name: 2**63}}))
        with pytest.raises(CheckpointError, match=rf"config\.json: {name} is 9223372036854775808, wanted 0"):
            check_config(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        check_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attention_dropout": float("nan")}, "attention_dropout is nan, wanted 0 to 1"),
        ({"text_config": {"dropout_rate": 1.5}}, "dropout_rate is 1.5, wanted 0 to 1"),
        ({"resid_pdrop": -0.1}, "resid_pdrop is -0.1, wanted 0 to 1"),
        ({"hidden_dropout_prob": 10**400}, "hidden_dropout_prob is 1000"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, wanted a number"),
    ],
)
def test_numbers_that_fail_late_are_refused(tmp_path, config, words):
    fine = {
        "attention_dropout": None,
        "classifier_dropout": None,
        "hidden_dropout_prob": 0.1,
        "time_step_limit": [0.0, float("inf")],
    }
    (tmp_path / "config.json").write_text(json.dumps({**fine, "scale": float("inf")}))
    check_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**fine, **config}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {words}"):
        check_config(tmp_path)


def test_load_strict():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    wrong = {**state, "0.weight": torch.zeros(3, 9), "extra": torch.zeros(1)}
    del wrong["1.bias"]
    with pytest.raises(
        CheckpointError,
        match=r"fit Sequential; 1 missing: 1.bias; 1 extra: extra; "
        r"1 of another shape: 0.weight \(3, 9\) for \(3, 2\)",
    ):
        load_strict(module, wrong)
    assert same(dict(module.state_dict()), before)
    load_strict(module, state)
    assert same(dict(module.state_dict()), state)
    with pytest.raises(CheckpointError, match=r"Sequential; 1 complex: 0.bias$"):
        load_strict(module, {**state, "0.bias": state["0.bias"].cfloat()})
    assert same(dict(module.state_dict()), state)
    with pytest.raises(CheckpointError, match=r"7 missing: .*, \.\.\."):
        load_strict(module, {})


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: float


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), plain, max_size=5))
def test_digest_does_not_see_key_order(data):
    assert digest(data) == digest(dict(reversed(list(data.items()))))
    assert digest(data, 1) != digest(data)


@given(plain, plain)
def test_digest_differs_where_values_do(a, b):
    assert (digest(a) == digest(b)) == (repr(sort(a)) == repr(sort(b)))


def sort(value):
    if isinstance(value, dict):
        return sorted((k, repr(sort(v))) for k, v in value.items()), "map"
    return [sort(v) for v in value] if isinstance(value, list) else value


def test_digest_is_the_same_in_another_process():
    code = (
        "from fusion_core.checkpoint import digest; import numpy as np;"
        "print(digest({'b', 'a', 'c'}, {'x': np.arange(3, dtype='float32')}))"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout.strip()
        for seed in "123"
    }  # fmt: skip
    assert runs == {digest({"a", "b", "c"}, {"x": torch.arange(3.0)})}


def test_digest_tells_apart():
    array = np.arange(6, dtype=np.float32)
    values = [
        1, 1.0, True, "1", b"1", None, [1], [[1]], [], {}, {1}, {1: 1}, array, array.reshape(2, 3),
        array.astype(np.float64), array[::-1], torch.zeros(0), torch.zeros(0, 2),
        torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16), Point(1, 2.0), Color.RED,
        Path("1"), torch.float32,
        torch.device("cpu"), "cpu", [1, [2]], [[1], 2], ["ab", "c"], ["a", "bc"],
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)


def test_digest_takes_alike():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(array) == digest(torch.from_numpy(array)) == digest(array.astype(">f4"))
    assert digest(array.T) == digest(np.ascontiguousarray(array.T))
    assert digest((1, 2)) == digest([1, 2])
    assert digest(np.int64(3), np.float64(0.5)) == digest(3, 0.5)
    assert digest(Path("a") / "b") == digest(PurePosixPath("a/b"))
    assert digest(torch.nn.Parameter(torch.ones(2))) == digest(torch.ones(2))
    for value in (len, object(), np.array([object()]), Point):
        with pytest.raises(InputError, match=r"digest got a .*, wanted plain values"):
            digest([value])


def test_digest_state_and_file(tmp_path):
    module = torch.nn.Linear(2, 2)
    state = module.state_dict()
    first = digest_state(state)
    assert first == digest_state(dict(reversed(list(state.items()))))
    with torch.no_grad():
        module.bias[0] += 1
    assert digest_state(module.state_dict()) != first
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a").startswith("ba7816bf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        digest_file(tmp_path / "b")
