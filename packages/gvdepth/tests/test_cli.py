"""The command line: every verb, exit codes, one line per error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fusion_core.images import save_png
from fusion_core.testing import run_cli
from gvdepth import Camera
from gvdepth.cli import main
from gvdepth.data import RIGS, read_depth

VERBS = (
    "predict",
    "ground",
    "calibrate",
    "doctor",
    "train",
    "evaluate",
    "simulate",
    "export",
    "demo",
    "bench",
)
NUMBERS = ("--fx", 90, "--fy", 90, "--cx", 59.5, "--cy", 21.4, "--camera-height", 1.2, "--pitch-deg", 1)


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "streets"
    done = run_cli(main, "simulate", "--rig", "D", "-n", 4, "--out", out, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == {"frames": 4, "out": str(out)}
    return out


def refuse(words, *args):
    done = run_cli(main, *args)
    assert done.code == 2, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
    return done


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    done = run_cli(main, verb, "--help")
    assert done.code == 0
    assert f"Example: gvdepth {verb}" in " ".join(done.stdout.replace("│", " ").split())


def test_version():
    from gvdepth import __version__

    assert run_cli(main, "--version").stdout.strip() == f"gvdepth {__version__}"


def test_predict(streets, tmp_path):
    out = tmp_path / "out"
    done = run_cli(
        main, "predict", streets / "images", "--camera", streets / "camera.json", "--out", out,
        "--format", "npy,png16,color,ply", "--uncertainty", "--calib-std", "0.02,0.1", "--json", "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert "simulated streets only" in done.stderr
    assert json.loads(done.stdout) == {"done": 4, "skipped": 0, "failed": 0, "out": str(out)}
    assert len(list(out.glob("1-0000?.*"))) == 0  # names are those of the images
    assert len(list(out.glob("0-0000?.*"))) == 4 * 5
    depth = np.load(out / "0-00000.depth.npy")
    assert np.isfinite(depth).all()
    np.testing.assert_allclose(read_depth(out / "0-00000.depth.png"), depth, atol=1 / 500)
    again = run_cli(
        main,
        "predict",
        streets / "images",
        "--camera",
        streets / "camera.json",
        "--out",
        out,
        "--resume",
        "--json",
    )
    assert json.loads(again.stdout)["skipped"] == 4
    refuse("holds a run", "predict", streets / "images", "--camera", streets / "camera.json", "--out", out)


def test_predict_lists_what_cannot_be_read(streets, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    Image.open(streets / "images" / "0-00001.png").save(tmp_path / "in" / "b.png")
    done = run_cli(main, "predict", tmp_path / "in", *NUMBERS, "--out", tmp_path / "out", "--json")
    assert done.code == 2
    assert "error: a: " in done.stderr
    assert json.loads(done.stdout)["done"] == 1
    assert (tmp_path / "out" / "b.depth.npy").is_file()


def test_missing_camera_numbers_name_their_flags(streets, tmp_path):
    image, out = streets / "images" / "0-00000.png", ("--out", tmp_path / "x")
    refuse("give --camera FILE, or --fx --fy --cx --cy, or --hfov", "predict", image, *out)
    refuse("--cx, --cy is missing", "predict", image, "--fx", 90, "--fy", 90, *out)
    refuse("give --camera-height METRES, or --preset", "predict", image, *NUMBERS[:8], *out)
    refuse("--hfov and --fx", "predict", image, "--hfov", 60, "--fx", 90, *out)
    refuse("--camera and --fx both", "predict", image, "--camera", streets / "camera.json", "--fx", 9, *out)
    refuse("--pitch-deg and --horizon-row", "predict", image, *NUMBERS, "--horizon-row", 9, *out)
    refuse("preset is 'audi'", "predict", image, *NUMBERS, "--preset", "audi", *out)
    refuse("--calib-std is 'x'", "predict", image, *NUMBERS, "--calib-std", "x", *out)
    refuse("formats is ['exr']", "predict", image, *NUMBERS, "--format", "exr", *out)
    refuse("fx is -1", "predict", image, "--fx", -1, *NUMBERS[2:], *out)
    refuse("is not there", "predict", tmp_path / "none.png", *NUMBERS, *out)
    refuse("is neither a folder", "predict", image, *NUMBERS, "--model", "./none", *out)
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").glob("*.npy"))
    assert run_cli(main, "predict", image, "--out").code == 2


def test_ground(tmp_path, streets):
    flags = ("--fx", 100, "--fy", 100, "--cx", 50, "--cy", 20, "--size", "101x61", "--camera-height", 1.5)
    done = run_cli(main, "ground", *flags, "--out", tmp_path / "g.png", "--json")
    found = json.loads(done.stdout)
    assert found["horizon row"] == 20
    assert found["row at 10 m"] == 35
    assert Image.open(tmp_path / "g.png").size == (101, 61)
    run_cli(main, "ground", *flags, "--pitch-deg", 2, "--pitch-sign", "down", "--out", tmp_path / "g.npy")
    down = np.load(tmp_path / "g.npy")
    horizon = 20 - 100 * np.tan(np.deg2rad(2))
    assert (down[: int(horizon)] == 0).all()
    assert (down[int(horizon) + 1 :] > 0).all()
    row = json.loads(run_cli(main, "ground", *flags, "--horizon-row", 12, "--json").stdout)
    assert row["horizon row"] == pytest.approx(12)
    fov = json.loads(
        run_cli(main, "ground", "--hfov", 90, "--size", "100x60", "--camera-height", 1.5, "--json").stdout
    )
    assert fov["row at 5 m"] == pytest.approx(29.5 + 50 * 1.5 / 5)
    image = streets / "images" / "0-00000.png"
    done = run_cli(
        main, "ground", "--camera", streets / "camera.json", "--image", image, "--out", tmp_path / "i.png"
    )
    assert done.code == 0
    refuse("wanted WIDTHxHEIGHT", "ground", *flags[:8], "--size", "101", "--camera-height", 1)
    refuse("wanted a .png picture or an .npy map", "ground", *flags, "--out", tmp_path / "g.jpg")
    refuse("--size WIDTHxHEIGHT", "ground", "--hfov", 90, "--camera-height", 1.5)


def test_calibrate_and_doctor(streets, tmp_path):
    camera = ("--camera", streets / "camera.json")
    done = run_cli(
        main, "calibrate", "--depth", streets / "depth", "--road", streets / "road", *camera,
        "--out", tmp_path / "c.json", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["camera_height"] == pytest.approx(1.2, abs=0.005)
    assert found["pitch_deg"] == pytest.approx(1.0, abs=0.02)
    assert Camera.load(tmp_path / "c.json").camera_height == pytest.approx(found["camera_height"])
    done = run_cli(main, "doctor", "--depth", streets / "depth", *camera, "--json")
    assert done.code == 0
    told = json.loads(done.stdout)
    assert told["pitch_bias_deg"]["value"] == pytest.approx(0, abs=0.1)
    strict = run_cli(
        main,
        "doctor",
        "--depth",
        streets / "depth",
        *camera,
        "--pitch-deg",
        2,
        "--strict",
        "--out",
        tmp_path / "page",
    )
    assert strict.code == 3
    assert (tmp_path / "page" / "report.html").is_file()
    done = run_cli(main, "doctor", "--images", streets / "images", "--model", "tiny", *camera, "--json")
    assert done.code == 0, done.stderr
    refuse("give either --depth FOLDER", "doctor", *camera)
    refuse("--model is missing", "doctor", "--images", streets / "images", *camera)
    refuse("is no folder with depth maps", "calibrate", "--depth", tmp_path / "none", *camera)
    odd = tmp_path / "odd"
    odd.mkdir()
    for name, rows in (("0.npy", 48), ("1.npy", 47)):
        np.save(odd / name, np.ones((rows, 120), np.float32))
    for verb in ("calibrate", "doctor"):
        refuse(f"{odd / '1.npy'}: the image is 120x47", verb, "--depth", odd, *camera)


def test_evaluate(streets, tmp_path):
    done = run_cli(main, "evaluate", f"folder:{streets}", "--json", "--quiet", "--out", tmp_path / "page")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]["tiny"]
    assert found["abs_rel"] < 0.5
    assert (tmp_path / "page" / "report.html").is_file()
    gate = run_cli(main, "evaluate", f"folder:{streets}", "--max-abs-rel", 0.01, "--quiet")
    assert gate.code == 3
    assert "the gate is 0.01" in gate.stderr
    stored = run_cli(
        main,
        "evaluate",
        f"folder:{streets}",
        "-m",
        streets / "depth",
        "-m",
        "tiny",
        "--json",
        "--quiet",
    )
    assert json.loads(stored.stdout)["metrics"]["depth"]["abs_rel"] < 1e-3
    refuse("wanted kitti:ROOT", "evaluate", "nothing:here")


def test_simulate(tmp_path):
    flags = ("--hfov", 80, "--size", "64x40", "--camera-height", 1.2, "--pitch-deg", 2, "--roll-deg", 3)
    done = run_cli(main, "simulate", "-n", 2, *flags, "--object-size", 1.2, "--out", tmp_path / "s")
    assert done.code == 0, done.stderr
    camera = Camera.load(tmp_path / "s" / "camera.json")
    assert (camera.size, camera.roll_deg) == ((40, 64), 3)
    refuse("not empty", "simulate", "-n", 1, *flags, "--out", tmp_path / "s")
    refuse("--rig is a whole camera", "simulate", "--rig", "A", *flags, "--out", tmp_path / "t")
    refuse("wanted a Camera or one of", "simulate", "--rig", "Z", "--out", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_train(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "steps = 2\nbatch_size = 2\nwarmup_steps = 0\n[augment]\nsize = [48, "
        "120]\n[model]\nencoder_widths = [8, 8]\n"
    )
    run = (
        "train",
        recipe,
        "--data",
        "simulated:train:4",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--quiet",
    )
    done = run_cli(main, *run, "--set", "model.cue=focal", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cue"] == "focal"
    refuse("pass resume or overwrite", *run)
    missing = run_cli(main, "train", recipe, "--out", tmp_path / "other")
    assert missing.code == 2
    assert "--data" in missing.stderr
    refuse(
        "did you mean steps",
        "train",
        recipe,
        "--data",
        "simulated:train:4",
        "--set",
        "stepz=3",
        "--out",
        tmp_path / "other",
    )
    refuse(
        "cannot be read",
        "train",
        tmp_path / "none.toml",
        "--data",
        "simulated:train:4",
        "--out",
        tmp_path / "other",
    )


def test_export_and_bench_pass_their_options_on(tmp_path, monkeypatch):
    from gvdepth import export as module
    from gvdepth.export import Exported

    monkeypatch.setattr(
        module, "export_onnx", lambda model, path, check: Exported(path, 1e-6 if check else 0.5)
    )
    done = run_cli(main, "export", "--onnx", tmp_path / "m.onnx", "--json")
    assert json.loads(done.stdout) == {"onnx": str(tmp_path / "m.onnx"), "log_depth_difference": 1e-6}
    refuse("only is ['nothing']", "bench", "--only", "nothing")


def test_shipped_rigs_are_those_of_the_streets(streets):
    assert Camera.load(streets / "camera.json") == RIGS["D"][0]
    save_png(streets.parent / "x.png", np.zeros((4, 4), np.uint8))


def test_predict_takes_the_lens_out(streets, tmp_path):
    pytest.importorskip("cv2")
    lens = tmp_path / "camera.yaml"
    lens.write_text(
        "image_width: 120\nimage_height: 48\ncamera_name: front\ndistortion_model: plumb_bob\n"
        "camera_matrix: {rows: 3, cols: 3, data: [90, 0, 59.5, 0, 90, 21.4, 0, 0, 1]}\n"
        "distortion_coefficients: {rows: 1, cols: 5, data: [-0.2, 0.05, 0, 0, 0]}\n"
    )
    image = streets / "images" / "0-00000.png"
    mount = ("--camera-height", 1.2, "--pitch-deg", 1)
    done = run_cli(
        main, "predict", image, "--camera", lens, *mount, "--rectify", "--out", tmp_path / "a", "--json"
    )
    assert done.code == 0, done.stderr
    assert np.isfinite(np.load(tmp_path / "a" / "0-00000.depth.npy")).all()
    refuse("--rectify needs --camera FILE", "predict", image, *NUMBERS, "--rectify", "--out", tmp_path / "b")
    refuse("height is missing", "predict", image, "--camera", lens, "--rectify", "--out", tmp_path / "b")
