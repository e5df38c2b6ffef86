import dataclasses
import enum
import json
import math
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.config import Config
from fusion_core.errors import ConfigError


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclasses.dataclass(frozen=True)
class Optimizer:  # a plain dataclass: the rules of the outer one hold in it
    lr: float = 0.1
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Train(Config):
    optimizer: Optimizer = Optimizer()
    steps: int = 100
    clip: float | None = 1.0
    out: Path | None = None
    rule: Literal["sum", "mean"] = "sum"
    sizes: tuple[int, ...] = (1, 2)
    mode: Mode = Mode.FAST
    teacher: Optimizer | None = None

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"steps is {self.steps}, wanted at least 0")
        if self.steps == 13:
            raise ValueError("unlucky")


@dataclasses.dataclass(frozen=True)
class Needs(Config):
    name: str


FULL = Train(Optimizer(0.5, 3), 7, math.inf, Path("a") / "b", "mean", (3,), Mode.SLOW, Optimizer(1.0))


@pytest.mark.parametrize(
    "config", [Train(), FULL, dataclasses.replace(FULL, clip=2.5)], ids=["default", "inf", "full"]
)
def test_round_trips(tmp_path, config):
    assert Train.from_dict(config.to_dict()) == config
    config.save(tmp_path / "a.toml")
    assert Train.load(tmp_path / "a.toml") == config
    if config.clip != math.inf:
        config.save(tmp_path / "a.json")
        assert Train.load(tmp_path / "a.json") == config


def test_plain_values():
    assert FULL.to_dict() == {
        "optimizer": {"lr": 0.5, "warmup_steps": 3}, "steps": 7, "clip": math.inf, "out": "a/b",
        "rule": "mean", "sizes": [3], "mode": "slow", "teacher": {"lr": 1.0, "warmup_steps": 0},
    }  # fmt: skip
    assert Train.from_dict({"optimizer": {"lr": 1}}).optimizer == Optimizer(1.0)
    assert type(Train.from_dict({"optimizer": {"lr": 1}}).optimizer.lr) is float


def test_none_in_files(tmp_path):
    Train().save(tmp_path / "a.toml")
    assert set(tomllib.loads((tmp_path / "a.toml").read_text())) == {
        "optimizer", "steps", "clip", "rule", "sizes", "mode"
    }  # fmt: skip
    none = Train(clip=None)  # its default is another: leaving it out would bring that back
    with pytest.raises(
        ConfigError, match=r"TOML has no None, and its default here is another; save as .json"
    ):
        none.save(tmp_path / "a.toml")
    assert Train.load(tmp_path / "a.toml") == Train()
    none.save(tmp_path / "a.json")
    assert Train.load(tmp_path / "a.json") == none
    assert json.loads((tmp_path / "a.json").read_text())["clip"] is None
    with pytest.raises(ConfigError, match=r"JSON has no infinity and no NaN; save as .toml"):
        FULL.save(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"step": 3}, "unknown setting 'step'; did you mean steps"),
        ({"optimizer": {"l": 3}}, "unknown setting 'optimizer.l'; did you mean optimizer.lr"),
        ({"teacher": {"warmup": 3}}, "unknown setting 'teacher.warmup'; did you mean teacher.warmup_steps"),
        ({"optimizer": {"zzz": 3}}, "'optimizer.zzz'; there are optimizer.lr, optimizer.warmup_steps"),
        ({"steps": "3"}, "setting 'steps' is '3', wanted a valid integer"),
        ({"steps": True}, "setting 'steps' is True, wanted a valid integer"),
        ({"steps": "9" * 20_000}, f"setting 'steps' is '{'9' * 119}..., wanted a valid integer"),
        ({"steps": 1.5}, "setting 'steps' is 1.5, wanted a valid integer"),
        ({"optimizer": {"lr": "fast"}}, "setting 'optimizer.lr' is 'fast', wanted a valid number"),
        ({"sizes": [1, "x"]}, "setting 'sizes.1' is 'x', wanted a valid integer"),
        ({"rule": "max"}, "setting 'rule' is 'max', wanted 'sum' or 'mean'"),
        ({"mode": "medium"}, "setting 'mode' is 'medium', wanted 'fast' or 'slow'"),
        ({"steps": -1}, "^steps is -1, wanted at least 0$"),
        ({"steps": 13}, "^unlucky$"),
        ({"steps": {1, 2}}, "settings take plain values"),
        ({"optimizer": 3}, "setting 'optimizer' is 3, wanted"),
    ],
)
def test_complaints(data, words):
    with pytest.raises(ConfigError, match=words):
        Train.from_dict(data)


def test_missing_setting():
    with pytest.raises(ConfigError, match="setting 'name' is missing"):
        Needs.from_dict({})


def test_override():
    config = Train().override(
        [
            "optimizer.lr=1e-3",
            "steps = 5",
            "sizes=[4, 5]",
            "rule=mean",
            'mode="slow"',
            "out=some/where",
            "teacher.lr=2",
        ]
    )
    assert config == Train(
        Optimizer(0.001), 5, 1.0, Path("some/where"), "mean", (4, 5), Mode.SLOW, Optimizer(2.0)
    )
    assert Train().override([]) == Train()
    assert FULL.override(["steps=1"]) == dataclasses.replace(FULL, steps=1)
    for text in ("2020-01-01", "a=b", "1\nx = 2", "", "x y"):
        assert Needs("a").override([f"name={text}"]) == Needs(text)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("steps", "'steps' sets nothing, wanted name=value"),
        ("=3", "'=3' sets nothing"),
        ("steps.x=3", "'steps.x' cannot be set: 'steps' is 100 and has no parts"),
        ("optimizer.lrr=3", "unknown setting 'optimizer.lrr'; did you mean optimizer.lr"),
        ("a.b=3", "unknown setting 'a'; there are optimizer, steps"),
        ("steps=many", "setting 'steps' is 'many', wanted a valid integer"),
    ],
)
def test_override_complaints(assignment, words):
    with pytest.raises(ConfigError, match=words):
        Train().override([assignment])


def test_replace():
    assert FULL.replace(
        steps=9, teacher=None, mode=Mode.FAST, optimizer=Optimizer(2.0)
    ) == dataclasses.replace(FULL, steps=9, teacher=None, mode=Mode.FAST, optimizer=Optimizer(2.0))
    with pytest.raises(ConfigError, match="unknown setting 'stepz'; did you mean steps"):
        FULL.replace(stepz=3)
    with pytest.raises(ConfigError, match="setting 'steps' is 'x', wanted a valid integer"):
        FULL.replace(steps="x")
    with pytest.raises(ConfigError, match="settings take plain values"):
        FULL.replace(steps=object())


def test_files(tmp_path):
    path = tmp_path / "a.toml"
    with pytest.raises(ConfigError, match=r"a.toml cannot be read: No such file"):
        Train.load(path)
    path.write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"a.toml is not TOML: Invalid value .*line 1"):
        Train.load(path)
    path.write_text("stepz = 1\n")
    with pytest.raises(ConfigError, match=r"a.toml: unknown setting 'stepz'; did you mean steps"):
        Train.load(path)
    path.write_text("steps = 2020-01-01\n")
    with pytest.raises(ConfigError, match=r"a.toml: settings take plain values"):
        Train.load(path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a.json is not JSON"):
        Train.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"a.json: settings are \[\], wanted names with values"):
        Train.load(tmp_path / "a.json")
    for name in ("a.yaml", "a"):
        with pytest.raises(ConfigError, match=r"has suffix .*, wanted .toml or .json"):
            Train().save(tmp_path / name)
        assert not (tmp_path / name).exists()


@given(text=st.text())
def test_any_text_survives_toml(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a.toml"
    Needs(text).save(path)
    assert Needs.load(path) == Needs(text)
