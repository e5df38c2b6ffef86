import json

import pytest
import torch

from fusion_core.device import (
    autocast,
    environment,
    memory_left,
    resolve_device,
    resolve_dtype,
    synchronize,
    threads,
)
from fusion_core.errors import ConfigError, InputError


def test_device_words():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_auto_takes_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"'cuda:2' is not on this machine.*'cuda:1'"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("word", ["gpu", "cuda:x", "", 3.5])
def test_unknown_device_lists_what_is_there(word):
    with pytest.raises(InputError, match=r"device is .*wanted 'auto' or one of \['cpu'"):
        resolve_device(word)


def test_absent_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"device 'cuda' is not on this machine, which has \['cpu'"):
        resolve_device("cuda")


def test_dtype_words(monkeypatch):
    assert resolve_dtype("auto", "cpu") is resolve_dtype() is torch.float32
    assert resolve_dtype(torch.float64) is torch.float64
    assert resolve_dtype("torch.float16") is torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_dtype("auto", "cuda") is torch.bfloat16


@pytest.mark.parametrize("word", ["float8", "int64", torch.int32, "half"])
def test_bad_dtype(word):
    with pytest.raises(ConfigError, match=r"dtype is .*wanted 'auto' or one of \['bfloat16'"):
        resolve_dtype(word)


def test_mps_has_no_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="float64', which MPS does not have"):
        resolve_dtype("float64", "mps")


def test_autocast():
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype is torch.float32


def test_machine():
    synchronize(torch.device("cpu"))
    left = memory_left(torch.device("cpu"))
    assert left is None or left > 0
    found = json.loads(json.dumps(environment()))
    assert found["devices"][0] == "cpu"
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_threads_come_back_also_after_an_error():
    before = torch.get_num_threads()
    seen = []

    @threads(3)
    def fails():
        seen.append(torch.get_num_threads())
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            fails()
    assert seen == [3, 3]
    assert torch.get_num_threads() == before
