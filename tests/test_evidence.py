"""EVIDENCE.md is what the kept measurements and the READMEs say, and measuring goes on where it stopped."""

import dataclasses
import json
import sys
from pathlib import Path

import evidence
import measure
import pytest
from workspace import Member, packages

ENVIRONMENT = {
    "python": "3.11.7",
    "os": "Linux x86_64",
    "cores": 2,
    "threads": 1,
    "devices": ["cpu"],
    "accelerators": [],
    "versions": {"torch": "2.15.0"},
}
CLAIM = {"text": "It | helps", "source": "table 1", "shown": False, "sentence": "By 0.1 points."}


def result(mode: str, status: str = "ok") -> dict:
    return {
        "schema": "fusion.result/1",
        "method": "adaea",
        "package": "adaea",
        "version": "0.1.0",
        "status": status,
        "error": None,
        "mode": mode,
        "seed": 0,
        "seeds": [0, 1],
        "seconds": 12.3,
        "environment": ENVIRONMENT,
        "settings": {"large": list(range(100))},
        "tables": [],
        "claims": [CLAIM],
        "figures": [],
        "notes": [],
    }


def bench_row(**changes) -> dict:
    row = dict.fromkeys(evidence.ROW)
    return (
        row
        | {
            "name": "exact",
            "device": "cpu",
            "threads": 1,
            "dtype": "float32",
            "ours_s": 0.00123456,
            "reference_s": 2.0,
            "reference": "plain",
            "ratio": 1.23456,
            "ratio_low": 1.2,
            "ratio_high": 1.3,
            "target": ">= 2",
            "met": False,
            "note": "",
        }
        | changes
    )


def write(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.slow
def test_the_page_is_what_its_inputs_say() -> None:
    page = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.page() == page, "run: uv run python .ci/evidence.py"
    for member in packages():
        assert f"\n## {member.name}\n" in page


@pytest.mark.parametrize("member", packages(), ids=lambda member: member.name)
def test_what_is_kept_is_small_and_has_verdicts(member: Member) -> None:
    path = evidence.KEPT / f"{member.name}.json"
    assert path.stat().st_size < 40_000
    found = evidence.read(path, evidence.SCHEMA)
    assert found is not None
    assert found["package"] == member.name
    for kind in {"quick", "full"} & set(found):
        assert found[kind]["claims"]
        for claim in found[kind]["claims"]:
            assert set(claim) == {"text", "source", "shown", "sentence"}
            assert claim["shown"] in (True, False, None)
            assert claim["sentence"]


@pytest.mark.parametrize("member", packages(), ids=lambda member: member.name)
def test_readmes_tell_differences_and_how_to_get_the_published_way(member: Member) -> None:
    head, rows = evidence.differences(member)
    assert len(rows) >= 5
    assert head[-1] in ("option", "here")
    assert any("here" in word for word in head)


def test_a_folder_becomes_numbers_with_their_state(tmp_path: Path) -> None:
    write(tmp_path / "quick" / "adaea" / "result.json", result("quick"))
    write(tmp_path / "full" / "adaea" / "result.json", result("full", "failed"))
    bench = {
        "schema": "fusion.bench/1",
        "package": "adaea",
        "version": "0.1.0",
        "date": "2026-11-26T20:30:44+00:00",
    }
    memory = bench_row(ours_s=None, reference_s=None, ratio_low=None, ours_peak_bytes=2**20, met=True)
    write(
        tmp_path / "bench" / "adaea.json",
        {**bench, "environment": ENVIRONMENT, "rows": [bench_row(), memory]},
    )
    lines = [
        {"kind": "bench", "name": "adaea", "busy": 0.9},
        {"kind": "bench", "name": "adaea", "busy": 0.01},
    ]
    lines.append({"kind": "quick", "name": "adaea", "busy": 0.7})
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    data = evidence.collect(tmp_path, "adaea")
    assert set(data) == {"schema", "package", "quick", "bench"}, "a failed run is no measurement"
    assert "settings" not in data["quick"]
    assert data["bench"]["rows"][0]["ratio"] == 1.235
    claims = "\n".join(evidence.claims("adaea", data))
    assert "| It \\| helps | table 1 | **not shown** | By 0.1 points. |" in claims
    assert "`adaea demo --seed 0`, seeds 0, 1, 12 s" in claims
    assert "BUSY with other work (70%)" in claims
    shown = "\n".join(evidence.benchmarks("adaea", data))
    assert "| exact | 1.23 ms / 2 s | plain | 1.24 [1.2, 1.3] | >= 2 | **missed** |" in shown
    assert "| 1.0 MiB /" in shown
    assert shown.count("idle") == 1
    assert "BUSY" not in shown
    assert "[adaea](#adaea) |  | 1 |  | 12 s | - | 1 | 1 |" in evidence.overview({"adaea": data})
    nothing = {"package": "adaea"}
    assert "not been measured" in evidence.claims("adaea", nothing)[0]
    assert "not been measured" in evidence.benchmarks("adaea", nothing)[0]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "quick" / "adaea" / "result.json", {"schema": "other/1"})
    with pytest.raises(SystemExit, match="other/1"):
        evidence.collect(tmp_path, "adaea")


FAKE = """import json, pathlib, sys
place = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
with open({log!r}, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "fails" in sys.argv[0]:
    sys.exit(3)
target = place if place.suffix else place / "result.json"
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text("{{}}")
"""


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    log = tmp_path / "calls.txt"
    for name in ("works", "fails"):
        (tmp_path / f"{name}.py").write_text(FAKE.format(log=str(log)), encoding="utf-8")
    folder = tmp_path / "kept"

    def steps(folder: Path, names: list[str], kinds: list[str], merging: Path | None) -> list[measure.Step]:
        made = original(folder, ["works", "fails"], kinds, merging)
        words = (sys.executable, str(tmp_path / "NAME.py"))
        return [
            dataclasses.replace(
                step, words=(*(word.replace("NAME", step.name) for word in words), *step.words[1:])
            )
            for step in made
        ]

    original = measure.steps
    monkeypatch.setattr(measure, "steps", steps)
    monkeypatch.setattr(measure, "busy", lambda: 0.5)
    monkeypatch.setattr(sys, "argv", ["measure.py", str(folder), "--kinds", "bench", "full"])
    with pytest.raises(SystemExit, match="bench fails, full fails"):
        measure.main()
    assert "the machine was BUSY" in capsys.readouterr().err
    calls = log.read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["bench", "bench", "demo", "demo"]
    assert calls[2].endswith("--full")
    assert (folder / "bench" / "works.json").is_file()
    assert (folder / "full" / "works" / "result.json").is_file()
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["code"] for line in lines] == [0, 3, 0, 3]
    assert all(line["busy"] == 0.5 for line in lines)
    with pytest.raises(SystemExit):
        measure.main()
    assert len(log.read_text().splitlines()) == 6, "only what failed runs again"


def test_every_package_is_measured_once_per_kind() -> None:
    names = [member.name for member in packages()]
    made = measure.steps(Path("kept"), names, list(measure.KINDS), Path("scratch"))
    assert [(step.kind, step.name) for step in made] == [
        (kind, name) for kind in measure.KINDS for name in names
    ]
    assert all(step.words[0] == step.name for step in made)
    assert [step.name for step in made if "--merging" in step.words] == ["fusechat"]
    share = measure.busy(0.05)
    assert share is None or 0 <= share <= 1
