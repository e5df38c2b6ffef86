"""The command line: every verb, resumable folders, shards, one line and exit 2 on bad input."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dbnet_asf import DBConfig, DBNet, datasets
from dbnet_asf.cli import main
from dbnet_asf.jobs import names_of
from fusion_core.errors import InputError
from fusion_core.testing import run_cli

VERBS = ("detect", "train", "evaluate", "tune", "diagnose", "labels")
VERBS += ("export", "convert", "render", "bench", "demo")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny network that finds something, and four pictures."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = DBConfig.nano(inner=32).replace(channels=(8, 12, 16, 16), stem=8, short_side=64)
    DBNet(config).eval().save_pretrained(folder / "net")
    (folder / "photos").mkdir()
    for at in range(4):
        noise = np.random.default_rng(at).integers(0, 256, (70, 100, 3), np.uint8)
        image = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
        Image.fromarray(image).save(folder / "photos" / f"p{at}.png")
    return folder


def detect(place, *more, out=None):
    words = ["detect", "--model", place / "net", "--device", "cpu", "--box-thresh", "0", "-q", *more]
    return run_cli(main, *words, *(["--out", out] if out else []))


def test_help_lists_the_verbs():
    text = run_cli(main, "--help").stdout
    for verb in VERBS:
        assert verb in text
        assert f"Example: dbnet-asf {verb}" in " ".join(run_cli(main, verb, "--help").stdout.split())
    assert run_cli(main, "--version").stdout.startswith("dbnet-asf ")


def test_detect_on_the_screen(place):
    photo = place / "photos" / "p0.png"
    done = detect(place, photo)
    assert done.code == 0, done.stderr
    assert f"{photo}: " in done.stdout
    document = json.loads(detect(place, photo, "--json").stdout)
    assert document["image"] == str(photo)
    both = json.loads(detect(place, place / "photos", "--json", "--limit", "2").stdout)
    assert [Path(each["image"]).name for each in both["results"]] == ["p0.png", "p1.png"]


def test_detect_into_a_folder_and_resume(place, tmp_path):
    out = tmp_path / "out"
    assert detect(place, place / "photos", "--limit", "2", out=out).code == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json", "manifest.jsonl", "p0.json", "p0.annotated.png", "p1.json", "p1.annotated.png",
    }  # fmt: skip
    again = detect(place, place / "photos", out=out)
    assert again.code == 2
    assert "another run" in again.stderr
    before = (out / "p0.json").stat().st_mtime_ns
    assert detect(place, place / "photos", "--resume", out=out).code == 0
    assert (out / "p0.json").stat().st_mtime_ns == before
    assert len(list(out.glob("*.json"))) == 5
    other = detect(place, place / "photos", "--resume", "--polygon", out=out)
    assert other.code == 2
    assert "other settings" in other.stderr
    assert (
        detect(place, place / "photos", "--overwrite", "--polygon", "--crops", "--no-pictures", out=out).code
        == 0
    )
    assert json.loads((out / "config.json").read_text())["detect"]["post"]["mode"] == "polygon"


def test_shards_are_the_whole(place, tmp_path):
    detect(place, place / "photos", out=tmp_path / "whole")
    for at in range(2):
        detect(place, place / "photos", "--shard", f"{at}/2", "--resume", out=tmp_path / "parts")
    found = lambda name: {
        path.name: {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        for path in (tmp_path / name).glob("p*.json")
    }
    assert found("whole") == found("parts")
    assert len(found("whole")) == 4


def test_the_icdar_form(place, tmp_path):
    assert detect(place, place / "photos" / "p0.png", "--format", "txt", out=tmp_path / "t").code == 0
    lines = (tmp_path / "t" / "res_p0.txt").read_text().splitlines()
    assert all(len(line.split(",")) == 8 for line in lines)


def test_one_bad_picture_does_not_stop_the_others(place, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"broken")
    (folder / "b.png").write_bytes((place / "photos" / "p0.png").read_bytes())
    done = detect(place, folder, out=tmp_path / "o")
    assert done.code == 2
    assert (tmp_path / "o" / "b.json").is_file()
    assert done.stderr.count("a.png") >= 1
    assert "Traceback" not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "o" / "manifest.jsonl").read_text().splitlines()]
    assert [("error" in line) for line in sorted(lines, key=lambda line: line["key"])] == [True, False]
    assert detect(place, folder).code == 2


BAD = [
    (["detect", "nowhere.png"], "nowhere.png"),
    (["detect", "{photo}", "--model", "no-such-model"], "no-such-model"),
    (["detect", "{photo}", "--model", "{net}", "--thresh", "3"], "thresh"),
    (["detect", "{photo}", "--model", "{net}", "--native", "--short-side", "64"], "exclude"),
    (["detect", "{photo}", "--model", "{net}", "--shard", "3/2"], "shard"),
    (["evaluate", "nowhere", "--model", "{net}"], "nowhere"),
    (["evaluate", "rendered:1", "--model", "{net}", "--protocol", "x"], "protocol"),
    (["diagnose", "{photos}"], "p0.png"),
    (["labels", "{photo}", "{photo}", "--out", "{out}"], "p0.png"),
    (["labels", "{photo}", "{photo}", "--out", "{out}", "--set", "shrink=1"], "shrink_ratio"),
    (["convert", "{photo}", "--out", "{out}"], "p0.png"),
    (["train", "--data", "rendered:2", "--preset", "huge", "--out", "{out}"], "preset"),
    (["train", "--data", "rendered:2", "--preset", "nano", "--prior", "1", "--out", "{out}"], "prior"),
    (["train", "--data", "rendered:2", "--model", "{net}", "--prior", "0.1", "--out", "{out}"], "prior"),
    (["export", "--out", "{out}/a.onnx", "--model", "nothing"], "nothing"),
    (["render", "--out", "{out}", "--photos", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_one_line_and_2(place, tmp_path, words, said, monkeypatch):
    monkeypatch.chdir(place / "photos")
    names = {
        "photo": place / "photos" / "p0.png",
        "photos": place / "photos",
        "net": place / "net",
        "out": tmp_path / "out",
    }
    done = run_cli(main, *(word.format(**names) for word in words))
    assert done.code == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_run_needs_a_place():
    done = run_cli(main, "train", "--data", "rendered:2")
    assert done.code == 2
    assert "--out" in done.stderr


@pytest.mark.slow
def test_train_from_few_text_pixels_and_resume(tmp_path):
    steady = (
        "--set",
        "lr=1e-12",
        "--set",
        "batch_size=2",
        "--set",
        "crop=64",
        "--device",
        "cpu",
        "-q",
        "--json",
    )
    words = ("train", "--data", "rendered:3", "--preset", "nano", "--prior", "0.02", *steady)
    done = run_cli(main, *words, "--set", "steps=1", "--out", tmp_path / "run")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    net = DBNet.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        prob = net(torch.randn(1, 3, 64, 64)).prob
    assert float(prob.mean()) == pytest.approx(0.02, abs=0.02)
    refused = run_cli(main, *words, "--set", "steps=2", "--out", tmp_path / "run")
    assert (refused.code, "resume" in refused.stderr) == (2, True)
    more = run_cli(main, *words, "--set", "steps=2", "--out", tmp_path / "run", "--resume")
    assert more.code == 0, more.stderr
    assert json.loads(more.stdout)["steps"] == 2


def test_render_labels_diagnose_evaluate_tune(place, tmp_path):
    scenes = tmp_path / "scenes"
    render = ("render", "--out", scenes, "--size", "128", "-q", "--json")
    assert json.loads(run_cli(main, *render, "-n", "3").stdout) == {"scenes": 3, "out": str(scenes)}
    stamp = (scenes / "images" / "scene_000000.jpg").stat().st_mtime_ns
    assert json.loads(run_cli(main, *render, "-n", "4").stdout)["scenes"] == 1
    assert (scenes / "images" / "scene_000000.jpg").stat().st_mtime_ns == stamp
    assert len(datasets.totaltext(scenes)) == 4
    (scenes / "scenes-0-4.partial").touch()  # as a kill leaves it
    with pytest.raises(InputError, match="scenes is unfinished; call what makes it again"):
        datasets.totaltext(scenes)
    assert json.loads(run_cli(main, *render, "-n", "4").stdout)["scenes"] == 0
    assert sorted(path.name for path in scenes.iterdir()) == ["gts", "images"]
    picture = scenes / "images" / "scene_000001.jpg"
    drawn = run_cli(
        main,
        "labels",
        picture,
        scenes / "gts",
        "--format",
        "totaltext",
        "--out",
        tmp_path / "labels",
        "--json",
    )
    assert len(json.loads(drawn.stdout)) == 5
    assert Image.open(tmp_path / "labels" / "scene_000001.shrink.png").size == (128, 128)
    counts = json.loads(run_cli(main, "diagnose", scenes, "--json", "--out", tmp_path / "d").stdout)["counts"]
    assert counts["pictures"] == 4
    assert (tmp_path / "d" / "report.html").is_file()
    common = ["--model", place / "net", "--device", "cpu", "-q", "--json"]
    done = run_cli(main, "evaluate", f"totaltext:{scenes}", *common, "--limit", "3", "--min-hmean", "0.9")
    assert done.code == 3
    report = json.loads(done.stdout)
    assert report["hmean"] < 0.9
    assert len(report["images"]) == 3
    tuned = json.loads(run_cli(main, "tune", scenes, *common, "--limit", "1").stdout)
    assert 0 <= tuned["after"][2] <= 1


def test_convert(tmp_path, official_name):
    state = DBNet(DBConfig.official("resnet18", dcn=False)).state_dict()
    torch.save({official_name(name): value for name, value in state.items()}, tmp_path / "official.pth")
    done = run_cli(main, "convert", tmp_path / "official.pth", "--out", tmp_path / "ours")
    assert done.code == 0, done.stderr
    assert "resnet18" in done.stdout
    assert DBNet.from_pretrained(tmp_path / "ours").config.color == "bgr"


def test_names_of_results():
    names = names_of([Path("a/x.jpg"), Path("a/x.png"), Path("y.png"), Path("b/c/z.png"), Path("d/c/z.png")])
    assert len(set(names.values())) == 5
    assert names[Path("y.png")] == "y"
    assert names[Path("b/c/z.png")] == "b_c_z"
