"""The authors' checkpoints: small made files with the true names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_core.errors import CheckpointError
from mantis_photoz.config import EARLY, FusionConfig
from mantis_photoz.convert import from_official, infer_config, load_official, to_official
from mantis_photoz.training import new_model

pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture(scope="module")
def early() -> Any:
    return new_model(FusionConfig.official("early", encoders={EARLY: "convnext_atto"}, bins=8, hidden=6), 0)


@pytest.fixture(scope="module")
def names(early: Any) -> dict[str, torch.Tensor]:
    return to_official(early.state_dict(), early.config)


def test_names_are_the_authors(names: dict[str, torch.Tensor]) -> None:
    expected = {
        "Base.stem.0.weight",
        "Base.stem.1.bias",
        "Base.stages.0.blocks.0.conv_dw.weight",
        "Base.stages.1.downsample.0.weight",
        "Base.stages.3.blocks.1.gamma",
        "Base.head.norm.weight",
        "fc0.weight",
        "fc1.bias",
    }
    assert expected <= set(names)
    assert names["Base.stem.0.weight"].shape == (40, 9, 4, 4)


@pytest.mark.parametrize("wrap", ["bare", "prefixed", "training"])
def test_every_kind_of_file_is_read(
    early: Any, names: dict[str, torch.Tensor], wrap: str, tmp_path: Path
) -> None:
    stored: Any = names
    if wrap != "bare":
        stored = {f"module._orig_mod.{key}": value for key, value in names.items()}
    if wrap == "training":
        stored = {"state_dict": stored, "opt_state": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save(stored, tmp_path / "best_early.pt")
    model = load_official(tmp_path / "best_early.pt")
    assert model.config == early.config
    assert not model.training
    for key, value in early.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_late_and_single_survey_and_report() -> None:
    encoders = dict.fromkeys(("galex", "ps1", "unwise"), "convnext_atto")
    late = new_model(FusionConfig.official("late", encoders=encoders, bins=8, hidden=6), 0)
    state = to_official(late.state_dict(), late.config)
    assert {"model_galex.stem.0.weight", "model_ps.stem.0.weight", "model_unwise.stem.0.weight"} <= set(state)
    assert from_official(state).config == late.config
    only = {key: value for key, value in state.items() if "galex" not in key}
    assert infer_config_of(only) == ("ps1", "unwise")


def infer_config_of(state: dict[str, torch.Tensor]) -> tuple[str, ...]:
    from mantis_photoz.convert import OFFICIAL

    return infer_config(OFFICIAL.apply(state)).surveys


def test_ps1_only_network(early: Any) -> None:
    config = early.config.replace(inputs={"ps1": early.config.inputs["ps1"].to_dict()})
    model = new_model(config, 1)
    again = from_official(to_official(model.state_dict(), config), z_max=1.0)
    assert again.config.surveys == ("ps1",)
    assert again.config.z_max == 1.0


def test_bad_files(names: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "best_early.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:411536\nsize 801048832\n")
    with pytest.raises(CheckpointError, match=r"LFS pointer.*git lfs pull"):
        load_official(path)
    torch.save(names, path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_official(path, sha256=right[:12]).config.bins == 8
    with pytest.raises(CheckpointError, match=r"has sha256 .*, wanted 411536eba11a"):
        load_official(path, sha256="411536eba11a")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_official(tmp_path / "none.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_official(path)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "payload": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_official(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out


def test_misfits_name_the_tensors(names: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="no network of the authors: parts"):
        from_official({"conv.weight": torch.zeros(1)})
    less = {key: value for key, value in names.items() if key != "Base.stem.1.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.early\.stem\.1\.bias"):
        from_official(less)
    with pytest.raises(CheckpointError, match="1 extra"):
        from_official(names | {"Base.other": torch.zeros(1)})
    wrong = names | {"fc0.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"head\.0\.bias \(3,\) for \(6,\)"):
        from_official(wrong)
    seven = names | {"Base.stem.0.weight": torch.zeros(40, 7, 4, 4)}
    with pytest.raises(CheckpointError, match="takes 7 channels"):
        from_official(seven)


def test_what_the_authors_do_not_have_is_refused() -> None:
    encoders = dict.fromkeys(("galex", "ps1", "unwise"), "small-4")
    config = FusionConfig.official("late", encoders=encoders, missing="mask")
    with pytest.raises(CheckpointError, match="no fusion 'late' with missing 'mask'"):
        to_official({}, config)


class _Trap:
    """What a pickle can do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """B20: the authors unpickle their weights; here a file with more than tensors is refused."""
    torch.save(
        {"state_dict": {"fc0.weight": torch.zeros(2, 2)}, "more": _Trap(tmp_path / "was run")},
        tmp_path / "x.pt",
    )
    with pytest.raises(CheckpointError):
        load_official(tmp_path / "x.pt")
    assert not (tmp_path / "was run").exists()
