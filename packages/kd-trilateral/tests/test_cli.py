"""The command line and the demo."""

import dataclasses
import json

import pytest

from fusion_core.testing import run_cli
from kd_trilateral import demo as demo_module
from kd_trilateral import tasks
from kd_trilateral.cli import main

RUN = """
data = "kd_trilateral.tasks:digits_splits"
student = "kd_trilateral.tasks:digits_student"
temperature = 4.0
steps = 20
batch_size = 64
lr = 1e-2
device = "cpu"
"""


@pytest.fixture(scope="module", autouse=True)
def teachers():
    """Each command makes its task anew, and the teacher follows from the rows and the seed: one training."""
    train, trained = tasks._train_teacher, {}

    def once(net, x, y, seed, **options):
        key = (seed, x.numpy().tobytes(), y.numpy().tobytes(), *options.items())
        if key not in trained:
            trained[key] = train(net, x, y, seed, **options)
        return trained[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_train_teacher", once)
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, teachers):
    place = tmp_path_factory.mktemp("cli")
    (place / "run.toml").write_text(RUN)
    done = run_cli(main, "train", str(place / "run.toml"), "--out", str(place / "run"), "--json", "--quiet")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 20
    return place


def test_train_inspect_plot(run_dir):
    run = run_dir / "run"
    assert (run / "report.html").is_file()
    again = run_cli(main, "train", str(run_dir / "run.toml"), "--out", str(run), "--resume", "--json", "-q")
    assert again.code == 0
    done = run_cli(main, "inspect", str(run), "--suspects", "3", "--out", str(run_dir / "s.csv"), "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["statistics"]["rows"] == 600
    assert len(document["rows"]) == 3
    assert (run_dir / "s.csv").read_text().startswith("sample,suspicion")
    table = run_cli(main, "inspect", str(run), "--suspects", "2")
    assert "alpha median" in table.stdout
    done = run_cli(main, "plot", str(run), "--out", str(run_dir / "a.png"))
    assert done.code == 0
    assert (run_dir / "a.png").is_file()


def test_compare(run_dir):
    words = ["--ratios", "const:0.5,tgeo", "--seeds", "2", "--set", "steps=10", "--json", "-q", "--out"]
    done = run_cli(main, "compare", str(run_dir / "run.toml"), *words, str(run_dir / "comparison"))
    assert done.code == 0, done.stderr
    assert len(json.loads(done.stdout)["verdict"]) == 2
    assert (run_dir / "comparison" / "report.html").is_file()


def test_cache_build_info_verify(run_dir):
    path = str(run_dir / "teacher.kdc")
    build = ("cache", "build", "--teacher", "kd_trilateral.tasks:digits_student", "--data",
             "kd_trilateral.tasks:digits_splits", "--out", path, "--top-k", "3", "-q", "--json")  # fmt: skip
    done = run_cli(main, *build)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["top_k"] == 3
    assert json.loads(run_cli(main, "cache", "info", path, "--json").stdout)["rows"] == 600
    assert "600 rows, sound" in run_cli(main, "cache", "verify", path).stdout
    trained = run_cli(
        main,
        "train",
        str(run_dir / "run.toml"),
        "--set",
        f"teacher={path}",
        "--out",
        str(run_dir / "cached"),
        "-q",
    )
    assert trained.code == 0, trained.stderr
    shard = run_dir / "teacher.kdc" / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 255
    shard.write_bytes(bytes(raw))
    bad = run_cli(main, "cache", "verify", path)
    assert bad.code == 2
    assert "shard-00000" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.toml", "--out", "x"], "no file"),
        (["train", "RUN"], "--out"),
        (["train", "RUN", "--out", "x", "--set", "evry=3"], "did you mean every"),
        (["train", "RUN", "--out", "x", "--set", "student="], "student is not set"),
        (["train", "RUN", "--out", "x", "--set", "data=kd_trilateral.tasks:nothing"], "nothing"),
        (["train", "RUN", "--out", "x", "--device", "cuda:9"], "cuda:9"),
        (["compare", "RUN", "--ratios", "magic"], "magic"),
        (["compare", "RUN", "--set", "geometry=round"], "run.toml: geometry is 'round'"),
        (["inspect", "nowhere"], "no run directory"),
        (["demo", "--task", "imagenet"], "--task"),
        (["demo", "--noise", "much"], "two shares"),
        (["demo", "--val-noise", "3"], "--val-noise"),
        (["cache", "info", "nowhere"], "nowhere"),
        (["cache", "build", "--teacher", "a:b", "--data", "c:d"], "--out"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run_dir, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = run_cli(main, *[str(run_dir / "run.toml") if a == "RUN" else a for a in arguments])
    assert done.code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    if "Usage" not in done.stderr:
        assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1


def test_help_teaches_with_an_example():
    for verb in ("demo", "train", "compare", "inspect", "plot", "bench"):
        assert f"Example: kd-trilateral {verb}" in " ".join(run_cli(main, verb, "--help").stdout.split())
    for verb in ("build", "info", "verify"):
        assert f"Example: kd-trilateral cache {verb}" in " ".join(
            run_cli(main, "cache", verb, "--help").stdout.split()
        )


@pytest.fixture
def short(monkeypatch):
    """The demo's tasks with a few steps; the recorded numbers come of the whole runs."""
    make = demo_module.make_task

    def made(*words):
        task = make(*words)
        return dataclasses.replace(task, settings={**task.settings, "steps": 30})

    monkeypatch.setattr(demo_module, "make_task", made)


def test_demo_writes_page_table_and_picture(short, tmp_path):
    done = run_cli(main, "demo", "--seeds", "2", "--task", "cancer", "--out", str(tmp_path / "d"))
    assert done.code == 0, done.stderr
    result = json.loads((tmp_path / "d" / "result.json").read_text())
    assert result["status"] == "ok"
    assert result["tables"][0]["title"].startswith("cancer, 30% wrong teacher")
    assert all(claim["sentence"] for claim in result["claims"])
    assert {figure["file"] for figure in result["figures"]} == {"alpha.png"}
    assert (tmp_path / "d" / "alpha.png").stat().st_size > 10_000
    assert "data:image/png" in (tmp_path / "d" / "report.html").read_text()


def test_clean_demo_claims_no_gain_it_does_not_have(short, tmp_path):
    done = run_cli(
        main, "demo", "--seeds", "2", "--noise", "0,0", "--task", "ctr", "--out", str(tmp_path / "d")
    )
    assert done.code == 0, done.stderr
    (claim,) = json.loads((tmp_path / "d" / "result.json").read_text())["claims"]
    low = float(claim["sentence"].split("[")[1].split(",")[0])
    assert claim["shown"] == (low > 0)
