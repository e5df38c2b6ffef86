import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from importlib.metadata import EntryPoints
from itertools import pairwise
from typing import Annotated

import pytest
import typer

from fusion_core import cli, command, demo
from fusion_core.errors import DataError, FusionWarning, InputError
from fusion_core.report import Claim, Comparison, Figure
from fusion_core.testing import heed_ctrl_c, kill_when, run_cli

PNG = (
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478da63f8cfc000000301"
    "010018dd8db00000000049454e44ae426082"
)
FAKES = f"""
import os, time
from fusion_core import require_extra
from fusion_core.demo import Demo, Method
from fusion_core.report import Claim, Comparison, Figure

def good(out, *, full=False, seed=0):
    metrics = {{"accuracy": {{"better": "higher", "percent": True}}}}
    table = Comparison(metrics, "plain", [seed, seed + 1], "Digits")
    for k, name in enumerate(["plain", "ours"]):
        for s in (seed, seed + 1):
            table.add(name, "accuracy", s, 0.9 + 0.01 * k + 0.001 * s * k)
    (out / "curve.png").write_bytes(bytes.fromhex("{PNG}"))
    claims = [Claim("It helps", "table 1", True, "By a point."), Claim("It scales", "", None, "Not here.")]
    figures = [Figure(out / "curve.png", "a curve", "The curve")]
    return Demo([table], claims, figures, ["Small data."], {{"full": full}}, [seed, seed + 1])

def bad(out, **_):
    (out / "half.png").write_bytes(b"half")
    raise RuntimeError("the teacher left")

def needy(out, **_):
    require_extra("no_such_module", "demo", "fake-methods")

def crash(out, **_):
    os._exit(41)

def vanish(out, **_):
    os._exit(0)

def slow(out, **_):
    (out / "started").write_text("")
    time.sleep(15)

def method(name, function):
    return Method(name, "fake-methods", f"<script>{{name}}</script>", "A. Author, 2024", "https://example.org/paper",
                  f"Does [{{name}}]", function)

m_good, m_bad, m_crash = method("good", good), method("bad", bad), method("crash", crash)
m_vanish, m_slow, m_odd = method("vanish", vanish), method("slow", slow), "no method"
m_needy = method("needy", needy)
"""
NAMES = ["good", "bad", "crash", "vanish", "slow", "odd", "needy"]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "fake_methods-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "fusion_fakes.py").write_text(FAKES)
    lines = [f"{name} = fusion_fakes:m_{name}" for name in NAMES] + [
        "gone = fusion_no_such_module:method",
        "alias = fusion_fakes:m_good",
    ]
    (info / "entry_points.txt").write_text("[fusion_core.methods]\n" + "\n".join(lines) + "\n")
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fake-methods\nVersion: 1.5\n"
        "Provides-Extra: plot\nProvides-Extra: fine\n"
        'Requires-Dist: no-such-dist>=3; extra == "plot"\nRequires-Dist: numpy>=2; extra == "fine"\n'
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    yield site
    sys.modules.pop("fusion_fakes", None)


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(demo, "entry_points", lambda **_: EntryPoints())
    monkeypatch.setattr(command, "entry_points", lambda **_: EntryPoints())


def fusion(*arguments):
    return run_cli(command.main, *arguments)


def test_demo_runs_each_method_apart_and_names_the_failed(fakes, tmp_path):
    out = tmp_path / "page"
    done = fusion("demo", "good", "bad", "crash", "vanish", "needy", "gone", "--out", out, "--seed", "3")
    assert done.code == 1
    assert done.stderr.splitlines()[-1] == "error: failed: bad, crash, vanish, needy, gone"
    assert "RuntimeError: the teacher left" in done.stderr
    assert "91.35 ± 0.07 *" in done.stdout
    assert "shown: It helps (table 1) By a point." in done.stdout
    assert done.stdout.splitlines()[-1] == str(out / "index.html")

    document = json.loads((out / "result.json").read_text())
    assert document["schema"] == "fusion.demo/1"
    assert document["failed"] == ["bad", "crash", "vanish", "needy", "gone"]
    errors = {result["method"]: result["error"] for result in document["results"]}
    assert errors["good"] is None
    assert "exit code 41" in errors["crash"]
    assert "exit code 0" in errors["vanish"]
    remedy = 'no_such_module is not installed; it comes with: pip install "fake-methods[demo]"'
    assert errors["needy"] == f"{remedy}\nexit code 2"
    assert "fusion_no_such_module" in errors["gone"]

    result = json.loads((out / "good" / "result.json").read_text())
    assert list(result) == [
        "schema", "method", "package", "version", "status", "error", "mode", "seed", "seeds", "seconds",
        "environment", "settings", "tables", "claims", "figures", "notes",
    ]  # fmt: skip
    assert result["schema"] == "fusion.result/1"
    assert (result["package"], result["version"], result["mode"]) == ("fake-methods", "1.5", "quick")
    assert (result["seed"], result["seeds"], result["settings"]) == (3, [3, 4], {"full": False})
    assert result["figures"] == [{"file": "curve.png", "alt": "a curve", "caption": "The curve"}]
    assert sorted(path.name for path in (out / "good").iterdir()) == [
        "curve.png",
        "report.html",
        "result.json",
    ]
    assert not (out / "bad").exists()

    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;good&lt;/script&gt;" in page
    assert "data:image/png;base64," in page
    assert page.count("✗ failed") == 10  # in the overview and in the section of each
    for word in (
        "the teacher left",
        "exit code 41",
        "Small data.",
        "✓ shown",
        "✓ 1 shown",
        "1 not tested",
        "91.35",
        "fake-methods 1.5",
    ):
        assert word in page, word


def earlier(out):
    """What an earlier run left, with a file that a new one has no place for."""
    (out / "good").mkdir(parents=True)
    (out / "result.json").write_text(json.dumps({"schema": command.SCHEMA}))
    (out / "index.html").write_text("<p>before</p>")
    (out / "good" / "stale").write_text("")
    return out


def test_demo_again_replaces_its_own_but_nothing_else(fakes, tmp_path):
    out = earlier(tmp_path / "page")
    again = fusion("demo", "good", "-o", out, "--full", "-q")
    assert (again.code, again.stderr) == (0, "")
    assert not (out / "good" / "stale").exists()
    assert json.loads((out / "good" / "result.json").read_text())["mode"] == "full"

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused = fusion("demo", "good", "-o", other)
    assert refused.code == 2
    assert "holds no earlier result" in refused.stderr
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_unknown_name_lists_what_is_installed(fakes, tmp_path):
    done = fusion("demo", "goood", "-o", tmp_path / "page")
    assert done.code == 2
    assert "goood" in done.stderr
    assert "good" in done.stderr.split("only: ")[1].split(", ")
    assert not (tmp_path / "page").exists()


def test_none_installed_is_kind(none_installed, tmp_path):
    done = fusion("demo", "-o", tmp_path / "page")
    assert done.code == 0
    assert "pip install" in done.stdout
    assert "pip install" in (tmp_path / "page" / "index.html").read_text()
    assert "pip install" in fusion("list").stdout
    assert json.loads(fusion("list", "--json").stdout) == {"methods": []}
    assert "pip install" in fusion("doctor").stdout
    assert fusion("demo", "good").code == 2


def test_list(fakes):
    done = fusion("list")
    assert done.code == 0
    for word in ("good", "1.5", "Does [good]", "A. Author, 2024", "broken: ModuleNotFoundError"):
        assert word in done.stdout
    rows = {row["name"]: row for row in json.loads(fusion("list", "--json").stdout)["methods"]}
    assert rows["good"]["url"] == "https://example.org/paper"
    assert "wanted fusion_core.demo.Method" in rows["odd"]["error"]


def test_doctor_names_what_is_missing(fakes):
    document = json.loads(fusion("doctor", "--json").stdout)
    package = {entry["name"]: entry for entry in document["packages"]}["fake-methods"]
    remedy = {"install": 'pip install "fake-methods[plot]"', "modules": ["no-such-dist"]}
    assert package == {"name": "fake-methods", "version": "1.5", "missing": {"plot": remedy}}
    assert "cpu" in document["devices"]
    assert document["memory_left"]["cpu"] is None or document["memory_left"]["cpu"] > 0
    assert "gone" in document["broken"]
    done = fusion("doctor")
    assert done.code == 0
    assert 'pip install "fake-methods[plot]"  # brings no-such-dist' in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_nothing(fakes, tmp_path):
    words = [sys.executable, "-m", "fusion_core", "demo", "slow", "-o", tmp_path / "out" / "page"]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_ctrl_c
    )
    end = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".page*/.slow*/started")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_kill_leaves_the_earlier_results(fakes, tmp_path):
    out = earlier(tmp_path / "page")
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = [sys.executable, "-m", "fusion_core", "demo", "slow", "-o", out]
    assert kill_when(words, tmp_path / ".page*" / ".slow*" / "started") != 0
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def made(function, name="made"):
    return demo.Method(name, "no-such-package", "Title", "Paper", "javascript:alert(1)", "Summary", function)


def test_run_demo_passes_options_and_returns_the_document(tmp_path, capsys):
    def function(out, *, full=False, seed=0, device="cpu"):
        table = Comparison({"loss": {"better": "lower"}}, "plain", [seed])
        table.add("plain", "loss", seed, 0.25)
        return demo.Demo(
            [table], [Claim("C", "", False, "No.")], settings={"device": device, "x": float("nan")}
        )

    document = demo.run_demo(made(function), tmp_path / "out", full=True, seed=7, device="meta")
    assert document["settings"] == {"device": "meta", "x": None}
    assert (document["mode"], document["seed"], document["status"]) == ("full", 7, "ok")
    assert document["version"] == "not installed"
    assert document["seconds"] >= 0
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == document
    assert "javascript" not in (tmp_path / "out" / "report.html").read_text()
    text = capsys.readouterr().out
    assert "0.2500" in text
    assert "not shown: C No." in text


def test_run_demo_prints_one_json_document(tmp_path, capsys):
    document = demo.run_demo(made(lambda out, **_: demo.Demo(notes=["first"])), tmp_path / "out", json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["notes"] == document["notes"] == ["first"]
    assert printed.err == ""


def test_add_demo_gives_a_command_line_its_verb(tmp_path, monkeypatch):
    told = {}

    def function(out, *, full=False, seed=0, rows=0):
        told.update(full=full, seed=seed, rows=rows)
        return demo.Demo(notes=["first"])

    module = types.ModuleType("some_method.demo")
    module.method = made(function)
    monkeypatch.setitem(sys.modules, "some_method.demo", module)
    app = cli.new_app("some-method", "Some method.", "1.0")
    rows = Annotated[int, typer.Option("--rows", help="How many.")]
    demo.add_demo(app, "some-method", "What it shows.", "Everything (minutes).", rows=(rows, 7))
    main = lambda: cli.run(app)
    done = run_cli(main, "demo", "--out", tmp_path / "out", "--full", "--seed", "3", "--json", "--rows", 9)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["notes"] == ["first"]
    assert told == {"full": True, "seed": 3, "rows": 9}
    text = " ".join(run_cli(main, "demo", "--help").stdout.split())
    assert "What it shows. Example: some-method demo --out results" in text
    assert "Everything (minutes)." in text
    assert "some-method-demo" in text


def test_run_demo_that_raises_leaves_the_earlier_result(tmp_path):
    demo.run_demo(made(lambda out, **_: demo.Demo(notes=["first"])), tmp_path / "out")

    def fails(out, **_):
        raise InputError("needs the extra")

    with pytest.raises(InputError, match="needs the extra"):
        demo.run_demo(made(fails), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["notes"] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_figure_must_lie_in_out(tmp_path):
    figure = Figure(tmp_path / "elsewhere.png", "x")
    with pytest.raises(DataError, match=r"elsewhere\.png"):
        demo.run_demo(made(lambda out, **_: demo.Demo(figures=[figure])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_entry_points_are_warned_of(fakes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FusionWarning)
        methods = demo.discover()
    assert any("method gone cannot be loaded" in str(warning.message) for warning in caught)
    assert "good" in methods
    assert not {"odd", "alias"} & set(methods)


def test_the_page_can_be_walked_through_without_eyes_or_a_mouse(fakes, tmp_path):
    out = tmp_path / "page"
    fusion("demo", "good", "bad", "--out", out, "-q")
    for name in ("index.html", "good/report.html"):
        page = (out / name).read_text(encoding="utf-8")
        assert '<html lang="en">' in page
        assert page.index('class="skip" href="#content"') < page.index('<main id="content" tabindex="-1"')
        levels = [int(level) for level in re.findall(r"<h([1-6])\b", page)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels)), levels
        assert all(' alt="' in image for image in re.findall(r"<img [^>]*>", page))
        assert all(' scope="' in head for head in re.findall(r"<th\b[^>]*>", page))
        assert page.count("<table>") == page.count("<caption>") == page.count('tabindex="0" role="region"')
        targets = set(re.findall(r'href="#([\w-]+)"', page))
        assert targets <= set(re.findall(r'id="([\w-]+)"', page))
    page = (out / "index.html").read_text(encoding="utf-8")
    bar = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall(r'href="#([\w-]+)"', bar) == ["content", "method-good", "method-bad"]
    assert page.count('<section class="card"') == 2
    assert page.count('<li class="tile">') == 2
