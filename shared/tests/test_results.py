import enum
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fusion_core.errors import InputError
from fusion_core.results import Result, plain


class Rule(enum.Enum):
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Inner(Result):
    curve: torch.Tensor


@dataclass(frozen=True, slots=True)
class Outer(Result):
    depth: torch.Tensor
    mask: np.ndarray
    inner: Inner
    parts: dict
    score: float
    names: list = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Score(Result):
    score: float


@pytest.fixture
def result():
    depth = torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16, requires_grad=True)
    inner = Inner(torch.arange(3))
    parts = {"teacher": np.ones(2, np.float32), "kind": "sum"}
    return Outer(depth, np.array([True, False]), inner, parts, float("inf"), ["a"] * 9)


def test_to_dict_is_strict_json(result):
    document = result.to_dict()
    assert document == {
        "depth": [[1.0, None]],
        "mask": [True, False],
        "inner": {"curve": [0, 1, 2]},
        "parts": {"teacher": [1.0, 1.0], "kind": "sum"},
        "score": None,
        "names": ["a"] * 9,
    }
    json.dumps(document, allow_nan=False)


def test_repr_shows_shapes(result):
    assert repr(result) == (
        "Outer(depth=bfloat16 (1, 2), mask=bool (2,), inner=Inner(curve=int64 (3,)), "
        "parts={'teacher': float32 (2,), 'kind': 'sum'}, score=inf, names=list of 9)"
    )
    assert repr(Score(1 / 3)) == "Score(score=0.333333)"
    assert repr(Score(torch.tensor(2.5))) == "Score(score=2.5)"


def test_plain_takes_what_results_hold():
    given = {1: Path("a/b"), "e": Rule.MEAN, "t": (np.float32(0.5), {2}), "d": torch.float32}
    assert plain(given) == {"1": str(Path("a/b")), "e": "mean", "t": [0.5, [2]], "d": "torch.float32"}


def test_save_json(result, tmp_path):
    result.save(tmp_path / "sub" / "r.json")
    assert json.loads((tmp_path / "sub" / "r.json").read_text()) == result.to_dict()


def test_save_json_takes_half_a_surrogate_pair(tmp_path):
    Score("a \ud800 b").save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {"score": "a \ud800 b"}


def test_save_arrays(result, tmp_path):
    result.save(tmp_path / "r.npz")
    result.save(tmp_path / "r.safetensors")
    with np.load(tmp_path / "r.npz") as arrays:
        assert set(arrays.files) == {"depth", "mask", "inner.curve", "parts.teacher"}
        assert arrays["depth"].dtype == np.float32
        assert np.isnan(arrays["depth"][0, 1])
        assert arrays["inner.curve"].tolist() == [0, 1, 2]
    from safetensors.torch import load_file as load_torch

    assert load_torch(tmp_path / "r.safetensors")["depth"].dtype == torch.bfloat16


def test_save_tensors_that_share_memory(tmp_path):
    x = torch.arange(4.0)
    Outer(x, x, Inner(x[1:]), {}, 0.0).save(tmp_path / "r.safetensors")
    assert load_file(tmp_path / "r.safetensors")["inner.curve"].tolist() == [1, 2, 3]


def test_save_directory(result, tmp_path):
    result.save(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "depth" not in document
    assert document["parts"]["kind"] == "sum"
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert "parts.teacher" in arrays.files
    with pytest.raises(InputError, match="not empty"):
        result.save(tmp_path / "out")


@pytest.mark.parametrize(("name", "words"), [("r.csv", r"wanted \.json"), ("r.npz", "holds no arrays")])
def test_save_refuses(name, words, tmp_path):
    with pytest.raises(InputError, match=words):
        Score(0.5).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        Outer(torch.ones(1), np.array([object()]), Inner(torch.ones(1)), {}, 0.0).save(
            tmp_path / "r.safetensors"
        )
    assert not list(tmp_path.iterdir())
