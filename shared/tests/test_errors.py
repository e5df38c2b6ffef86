import subprocess
import sys

import pytest
import torch

import fusion_core
from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FusionError,
    InputError,
    MissingExtraError,
    NonFiniteError,
    ShapeError,
    StoreError,
    check_finite,
    check_range,
    check_shape,
    check_text,
    naming,
    reading,
    require_extra,
)


def test_family():
    for kind in (ShapeError, DataError, NonFiniteError, ConfigError):
        assert issubclass(kind, InputError)
    assert issubclass(InputError, ValueError)
    for kind in (InputError, CheckpointError, StoreError, MissingExtraError):
        assert issubclass(kind, FusionError)
    assert not issubclass(CheckpointError, InputError)
    assert issubclass(MissingExtraError, ImportError)


def test_missing_extra_holds_the_install_line():
    with pytest.raises(MissingExtraError, match=r'pip install "adaea\[plot\]"'):
        require_extra("no_such_module.pyplot", "plot", "adaea")


def test_extra_with_a_broken_import_of_its_own_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require_extra("broken_extra", "plot", "adaea")
    assert not isinstance(caught.value, MissingExtraError)


def test_check_shape():
    assert check_shape("x", torch.zeros(2, 3, 4), "... n 4") == {"n": 3}
    assert check_shape("x", torch.zeros(3, 3), "n n") == {"n": 3}
    with pytest.raises(ShapeError, match=r"x has shape \(2, 3\), wanted \(n n\)"):
        check_shape("x", torch.zeros(2, 3), "n n")
    with pytest.raises(
        ShapeError, match=r"logits has shape \(2, 3\), wanted \(batch classes\) with classes=5"
    ):
        check_shape("logits", torch.zeros(2, 3), "batch classes", classes=5)
    with pytest.raises(ShapeError, match=r"shape \(2,\)"):
        check_shape("x", torch.zeros(2), "batch classes")
    with pytest.raises(ShapeError, match=r"shape \(2,\)"):
        check_shape("x", torch.zeros(2), "... batch classes")


def test_check_finite():
    x = torch.zeros(2, 3)
    check_finite("x", x)
    x[1, 0], x[1, 2] = float("nan"), float("inf")
    with pytest.raises(NonFiniteError, match=r"x holds 2 non-finite values of 6, the first at \(1, 0\)"):
        check_finite("x", x)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_check_range_open(value):
    with pytest.raises(ConfigError, match=r"temperature is .*, wanted a number in \(0, inf\)"):
        check_range("temperature", value, 0.0, float("inf"), open=True)


def test_naming_adds_a_file_that_the_error_does_not_name():
    with pytest.raises(ShapeError, match=r"^a\.toml: x has shape"), naming("a.toml"):
        check_shape("x", torch.zeros(2), "batch classes")
    with pytest.raises(ShapeError, match=r"^x has shape"), naming(None):
        check_shape("x", torch.zeros(2), "batch classes")
    for error in (ConfigError("a.toml holds nothing"), MissingExtraError("pip install x"), KeyError("k")):
        with pytest.raises(type(error)) as found, naming("a.toml"):
            raise error
        assert found.value is error


def test_check_range_closed():
    assert check_range("alpha", 1.0, 0, 1) == 1.0
    with pytest.raises(ConfigError, match=r"alpha is 1.5, wanted a number in \[0, 1\]"):
        check_range("alpha", 1.5, 0, 1)
    with pytest.raises(ConfigError, match=r"lr is inf, wanted a number in \[0, 1e\+09\]"):
        check_range("lr", float("inf"), 0)


def test_check_text():
    assert check_text("x", "Grüße \U0001f600") == "Grüße \U0001f600"
    with pytest.raises(InputError, match="prompt holds half a surrogate pair at 2"):
        check_text("prompt", "a \ud83d")


def test_import_is_light():
    code = (
        "import sys, fusion_core, fusion_core.lazy\n"
        "assert fusion_core.InputError and fusion_core.__version__\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'rich', 'typer') if m in sys.modules])\n"
        "import fusion_core.checkpoint, fusion_core.store, fusion_core.config\n"
        "print([m for m in ('torch', 'pydantic', 'tomli_w') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_public_names_exist():
    assert set(fusion_core.__all__) <= set(dir(fusion_core))


def test_lazy_exports(tmp_path, monkeypatch):
    package = tmp_path / "lazy_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fusion_core.lazy import lazy_exports\n"
        "__getattr__, __dir__ = lazy_exports(__name__, {'thing': 'inner', 'inner': 'inner'})\n"
    )
    (package / "inner.py").write_text("thing = 'found'")
    monkeypatch.syspath_prepend(str(tmp_path))
    import lazy_package  # pyright: ignore[reportMissingImports]

    assert "lazy_package.inner" not in sys.modules
    assert {"thing", "inner"} <= set(dir(lazy_package))
    assert lazy_package.thing == "found"
    assert vars(lazy_package)["thing"] == "found"  # the second look does not come back here
    assert lazy_package.inner is sys.modules["lazy_package.inner"]
    with pytest.raises(AttributeError, match="'lazy_package' has no attribute 'other'"):
        _ = lazy_package.other


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (KeyError("weights"), CheckpointError, "a.json is damaged: KeyError 'weights'"),
        (RecursionError("deep"), CheckpointError, "a.json is damaged: RecursionError deep"),
        (MemoryError(), CheckpointError, "a.json is damaged: MemoryError"),
        (ValueError("no\n JSON"), CheckpointError, "a.json is damaged: no JSON"),
        (FileNotFoundError(2, "No such file"), CheckpointError, "a.json is damaged: No such file"),
        (ConfigError("lr is -1"), ConfigError, "a.json: lr is -1"),
        (ConfigError("a.json: lr is -1"), ConfigError, "a.json: lr is -1"),
        (MissingExtraError("yaml is not installed"), MissingExtraError, "yaml is not installed"),
    ],
)
def test_reading_gives_one_error_that_names_the_file(raised, kind, words):
    with pytest.raises(kind) as told, reading("a.json", "is damaged", CheckpointError):
        raise raised
    assert str(told.value) == words
    assert type(told.value) is kind


def test_reading_takes_the_panic_of_a_library_in_rust_for_an_error():
    panic = type("PanicException", (BaseException,), {})  # as PyO3 makes it: no Exception
    words = r"^a\.json cannot be read: PanicException no entry found"
    with pytest.raises(InputError, match=words), reading("a.json"):
        raise panic("no entry found")


def test_reading_lets_ctrl_c_through():
    with pytest.raises(KeyboardInterrupt), reading("a.json"):
        raise KeyboardInterrupt
