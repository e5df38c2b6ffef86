import csv
import json
import math
import re
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from rich.console import Console
from scipy import stats

from fusion_core import report
from fusion_core.errors import DataError, InputError, MissingExtraError
from fusion_core.report import Claim, Comparison, Figure, Page, Report

EVIL = '<script>alert("x")</script>'
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478da63f8cfc000000301"
    "010018dd8db00000000049454e44ae426082"
)
ACCURACY = {"accuracy": {"better": "higher", "percent": True}}


@pytest.fixture
def comparison():
    made = Comparison({**ACCURACY, "loss": {"better": "lower"}}, "plain", [0, 1, 2], "On digits")
    for seed, accuracy in enumerate([0.90, 0.91, 0.92]):
        made.add("plain", "accuracy", seed, accuracy)
        made.add("ours", "accuracy", seed, accuracy + 0.01 + 0.001 * seed)
        made.add("plain", "loss", seed, 1.0)
        made.add("ours", "loss", seed, 1.5)
    made.add("teacher", "accuracy", 0, 0.925)
    return made


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "source" / "curve.png"
    path.parent.mkdir()
    path.write_bytes(PNG)
    return Figure(path, 'a "rising" curve', "Accuracy <rises>")


CLAIMS = [
    Claim("Ours beats plain", "table 1", True, "+1.1 points."),
    Claim("Ours beats the teacher", "", False, "It does not."),
    Claim("It scales", "section 5", None, "Needs a cluster."),
]


def text_of(console_call):
    stream = StringIO()
    console_call(Console(file=stream, width=200, highlight=False))
    return stream.getvalue()


def test_rows_hold_the_statistics(comparison):
    rows = {(row["method"], row["metric"]): row for row in comparison.rows()}
    assert len(rows) == 5
    ours, plain = rows["ours", "accuracy"], rows["plain", "accuracy"]
    wanted = stats.ttest_rel(ours["values"], plain["values"])
    assert ours["p"] == pytest.approx(wanted.pvalue)
    assert ours["difference"] == pytest.approx(0.011)
    assert (ours["mean"], ours["std"]) == pytest.approx(
        (np.mean(ours["values"]), np.std(ours["values"], ddof=1))
    )
    assert ours["difference_low"] < 0.011 < ours["difference_high"]
    assert ours["low"] < ours["mean"] < ours["high"]
    assert plain["difference"] is plain["p"] is None
    teacher = rows["teacher", "accuracy"]
    assert teacher["values"] == [0.925, None, None]
    assert teacher["difference"] == pytest.approx(0.025)
    assert teacher["std"] is teacher["p"] is None


def test_document_round_trips_and_is_the_schema(comparison):
    document = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert list(document) == ["schema", "title", "baseline", "seeds", "metrics", "rows"]
    assert document["schema"] == "fusion.comparison/1"
    assert document["metrics"]["loss"] == {"better": "lower", "percent": False}
    assert list(document["rows"][0]) == [
        "method", "metric", "values", "mean", "std", "low", "high",
        "difference", "difference_low", "difference_high", "p",
    ]  # fmt: skip
    assert Comparison.from_dict(document | {"unknown": 1}).to_dict() == document


def test_a_diverged_run_stays_visible():
    made = Comparison(ACCURACY, "plain", [0, 1])
    for seed in (0, 1):
        made.add("plain", "accuracy", seed, 0.5)
        made.add("ours", "accuracy", seed, math.nan if seed else 0.9)
    document = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert document["rows"][1]["values"] == [0.9, None]
    assert document["rows"][1]["mean"] is None
    assert Comparison.from_dict(document).to_dict() == document
    assert [cells[0]["text"] for _, cells in made.cells()[1]] == ["50.00 ± 0.00", "-"]
    assert [cells[0]["best"] for _, cells in made.cells()[1]] == [True, False]


def test_cells_mark_the_best_of_each_metric(comparison):
    heads, lines = comparison.cells()
    assert heads == ["method", "accuracy % ↑", "loss ↓"]
    assert dict(lines)["plain"][0]["note"] == "baseline"
    best = {method: [cell["best"] for cell in cells] for method, cells in lines}
    assert best == {"plain": [False, True], "ours": [False, False], "teacher": [True, False]}
    assert dict(lines)["ours"][0]["text"] == "92.10 ± 1.10"
    assert re.fullmatch(r"\+1\.10, p 0\.003", dict(lines)["ours"][0]["note"])
    assert dict(lines)["ours"][1]["note"] == "+0.500, p < 0.001"
    assert dict(lines)["teacher"][1]["text"] == "-"


def test_print_shows_the_table(comparison):
    text = text_of(comparison.print)
    assert "92.10 ± 1.10" in text
    assert "92.50 *" in text
    assert "On digits" in text
    assert "paired difference to plain" in text


def test_markup_in_names_is_text():
    made = Comparison({"m[bold]": {"better": "lower"}}, "[red]a[/red]", [0])
    made.add("[red]a[/red]", "m[bold]", 0, 1.0)
    text = text_of(made.print)
    assert "[red]a[/red]" in text
    assert "m[bold]" in text


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("ours", "speed", 0, 1.0), InputError, r"'speed'.*accuracy"),
        (("ours", "accuracy", 7, 1.0), InputError, r"7.*\[0, 1, 2\]"),
        (("plain", "accuracy", 0, 1.0), DataError, "already"),
    ],
)
def test_add_refuses(comparison, arguments, error, words):
    with pytest.raises(error, match=words):
        comparison.add(*arguments)


@pytest.mark.parametrize(
    ("metrics", "seeds"), [({}, [0]), (ACCURACY, []), (ACCURACY, [1, 1]), ({"a": {"better": "more"}}, [0])]
)
def test_comparison_refuses(metrics, seeds):
    with pytest.raises(InputError, match="metrics"):
        Comparison(metrics, "plain", seeds)


@pytest.mark.parametrize("document", [{"schema": "fusion.bench/1"}, {"schema": "fusion.comparison/1"}])
def test_from_dict_refuses(document):
    with pytest.raises(DataError):
        Comparison.from_dict(document)


class Audit(HTMLParser):
    def __init__(self, document):
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def full_page(comparison, figure):
    rows = [{"name": EVIL, "ok": True, "n": 3, "x": 0.123456789}, {"name": "b", "n": None}]
    page = Page(EVIL).heading(EVIL, anchor='a"b').text(EVIL).table(comparison).table(rows, caption=EVIL)
    return (
        page.figure(figure).claims([Claim(EVIL, EVIL, True, EVIL), *CLAIMS]).raw(Markup("<hr-own></hr-own>"))
    )


def test_page_is_self_contained_and_escapes(comparison, figure, tmp_path):
    comparison.add(EVIL, "loss", 0, 1.0)
    full_page(comparison, figure).save(tmp_path / "page.html")
    document = (tmp_path / "page.html").read_text(encoding="utf-8")
    audit = Audit(document)
    assert audit.open == []
    assert "script" not in audit.tags
    assert "link" not in audit.tags
    assert audit.sources[0] == "#content"
    assert audit.sources[1].startswith("data:image/png;base64,")
    assert len(audit.sources) == 2
    assert "url(" not in document
    assert "@import" not in document
    assert document.count("&lt;script&gt;") == 11
    assert 'alt="a &#34;rising&#34; curve"' in document
    assert "Accuracy &lt;rises&gt;" in document
    assert "<hr-own>" in document
    assert "prefers-color-scheme: dark" in document
    for word in ("✓ shown", "✗ not shown", "not tested", ">yes<", ">0.12346<"):
        assert word in document


def test_page_refuses_strings_as_markup_and_files_that_are_no_pictures(tmp_path):
    with pytest.raises(InputError, match="Markup"):
        Page("x").raw("<b>")
    with pytest.raises(InputError, match="cannot be read"):
        Page("x").figure(Figure(tmp_path / "a.png", "a"))
    with pytest.raises(InputError, match="picture file"):
        Page("x").figure(Figure(tmp_path / "a.exe", "a"))


def test_report_saves_whole(comparison, figure, tmp_path):
    report = Report(title="T", comparison=comparison, figures=[figure], claims=CLAIMS)
    report.save(tmp_path / "out")
    names = ["curve.png", "report.html", "report.json", "table.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["tables"] == [comparison.to_dict()]
    assert document["claims"][1]["shown"] is False
    assert document["figures"] == [{"file": "curve.png", "alt": figure.alt, "caption": figure.caption}]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["plain", "plain", "ours", "ours", "teacher"]
    assert float(lines[2]["seed_1"]) == 0.91 + 0.011
    assert lines[4]["seed_1"] == ""


def test_report_into_a_run_keeps_its_files(comparison, tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    Report(rows=[{"a": 1}]).save(tmp_path)
    Report(comparison=comparison).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "weights"
    assert json.loads((tmp_path / "report.json").read_text())["tables"]


def test_report_with_a_missing_figure_writes_nothing(comparison, tmp_path):
    report = Report(comparison=comparison, figures=[Figure(tmp_path / "no.png", "none")])
    with pytest.raises((InputError, FileNotFoundError)):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_dataframe(comparison, monkeypatch):
    frame = Report(comparison=comparison).to_dataframe()
    assert frame.shape == (5, 13)
    assert frame["mean"][0] == pytest.approx(0.91)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match='pip install "pandas"'):
        Report(rows=[{"a": 1}]).to_dataframe()


def test_report_prints_and_shows_in_notebooks(comparison):
    report = Report(title="T", comparison=comparison, rows=[{"a": 1}], claims=CLAIMS)
    text = text_of(report.print)
    for word in (
        "92.10",
        "not shown: Ours beats the teacher It does not.",
        "shown: Ours beats plain (table 1)",
    ):
        assert word in text
    fragment = report._repr_html_()
    assert fragment.startswith('<div class="fusion">')
    assert "<html" not in fragment
    # The style of a notebook stays its own.
    style = re.search(r"<style>(.*?)</style>", fragment, re.S).group(1)
    for rule in re.findall(r"^\s*([^\s@:{}][^{};]*)\{", style, re.M):
        assert all(part.strip().startswith(".fusion") for part in rule.split(",")), rule


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme):
    style = (Path(report.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, _, dark = style.partition("prefers-color-scheme: dark")
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    assert len(colors) == 13
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ink in ("ink", "muted", "accent"):
        for ground in ("paper", "ground", "tint"):
            assert contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
    for kind in ("good", "bad", "plain"):
        assert contrast(colors[kind], colors[f"{kind}-tint"]) >= 4.5, kind


def test_cards_fill_the_contents_bar(comparison):
    part = Page("One method").table(comparison)
    page = Page("All").card(part, "method-one", "one").html()
    assert '<a href="#method-one">one</a>' in page
    assert '<section class="card" id="method-one" aria-labelledby="method-one-title">' in page
    assert '<h2 id="method-one-title">One method</h2>' in page
    assert "<nav" not in part.html()


def test_comparisons_of_different_seeds_are_joined():
    metrics = {"nll": {"better": "lower"}}
    first, second = Comparison(metrics, "plain", [3], "both"), Comparison(metrics, "plain", [1, 2], "other")
    first.add("plain", "nll", 3, 0.5)
    first.add("ours", "nll", 3, math.nan)
    second.add("plain", "nll", 1, 0.25)
    second.add("late", "nll", 2, 1.0)
    whole = first.joined(second)
    assert (whole.seeds, whole.title, whole.methods) == ([3, 1, 2], "both", ["plain", "ours", "late"])
    assert {row["method"]: row["values"] for row in whole.rows()} == {
        "plain": [0.5, 0.25, None], "ours": [None, None, None], "late": [None, None, 1.0],
    }  # fmt: skip
    with pytest.raises(DataError, match="has 'nll' for seed 3 already"):
        whole.add("ours", "nll", 3, 0.0)  # a run that diverged is one that was made
    assert first.methods == ["plain", "ours"]
    with pytest.raises(InputError, match="none twice"):
        first.joined(Comparison(metrics, "plain", [3]))
    with pytest.raises(InputError, match="baseline of other is 'ours', wanted 'plain'"):
        first.joined(Comparison(metrics, "ours", [4]))


def test_hidden_words_of_a_wide_table_do_not_widen_the_page(comparison, tmp_path):
    page = Page("wide")
    page.table(comparison)
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert re.search(r'<div class="scroll"[^>]*>\s*<table.*class="unseen".*</table>', text, re.DOTALL)
    assert re.search(r"\.unseen \{ position: absolute;", text)
    assert re.search(r"\.scroll \{ position: relative; overflow-x: auto;", text)
