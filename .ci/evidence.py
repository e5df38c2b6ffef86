"""Write EVIDENCE.md: claims, defects of the published code, and benchmarks of every package.

``python .ci/evidence.py FOLDER`` takes what ``.ci/measure.py FOLDER`` left, keeps the fields that the page
needs in evidence/NAME.json, and writes the page. Without FOLDER it writes the page from those files. The
table of defects comes from the section "How it differs" of each README, the only place to edit it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

from measure import BUSY
from workspace import ROOT, Member, packages

PAGE, KEPT = ROOT / "EVIDENCE.md", ROOT / "evidence"
SCHEMA = "fusion.evidence/1"
INTRODUCTION = """\
What each package shows of its paper's claims at a scale that one machine can run, what it mends in the
published code, and what it costs. `uv run python .ci/evidence.py` writes this page; nothing here is typed by
hand. The numbers come from the packages' demos and benchmarks (`uv run python .ci/measure.py FOLDER`), the
tables of defects from their READMEs. A claim that does not show is listed as such; "not tested" means
that this run does not touch it. No number here repeats a published table: those take data, models and hours
that no demo has."""
VERDICT = {True: "shown", False: "**not shown**", None: "not tested"}
MET = {True: "met", False: "**missed**", None: ""}
ROW = (
    "name", "device", "threads", "dtype", "ours_s", "reference_s", "reference", "ratio", "ratio_low",
    "ratio_high", "repeats", "ours_peak_bytes", "reference_peak_bytes", "target", "met", "note",
)  # fmt: skip


def read(path: Path, schema: str) -> dict[str, Any] | None:
    """A JSON document, or None where there is none.

    Raises:
        SystemExit: it is of another schema.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema") != schema:
        raise SystemExit(f"{path} is {found.get('schema')!r}, wanted {schema!r}")
    return found


def machine(environment: dict[str, Any]) -> dict[str, Any]:
    """The part of an environment that a reader asks for."""
    versions = environment["versions"]
    kept = {name: environment[name] for name in ("os", "cores", "accelerators", "python")}
    return {**kept, "torch": versions.get("torch")}


def loads(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last line of ``steps.jsonl`` about each step."""
    path = folder / "steps.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {(line["kind"], line["name"]): line for line in map(json.loads, lines)}


def collect(folder: Path, name: str) -> dict[str, Any]:
    """What the page needs of one package's measurements; parts that were not measured are missing."""
    made: dict[str, Any] = {"schema": SCHEMA, "package": name}
    steps = loads(folder)
    for kind in ("quick", "full"):
        found = read(folder / kind / name / "result.json", "fusion.result/1")
        if found is None or found["status"] != "ok":
            continue
        made[kind] = {
            **{key: found[key] for key in ("version", "mode", "seed", "seeds", "seconds", "claims")},
            "machine": machine(found["environment"]),
            "began": steps.get((kind, name), {}).get("began"),
            "busy": steps.get((kind, name), {}).get("busy"),
        }
    bench = read(folder / "bench" / f"{name}.json", "fusion.bench/1")
    if bench is not None:
        made["bench"] = {
            "version": bench["version"],
            "date": bench["date"],
            "machine": machine(bench["environment"]),
            "busy": steps.get(("bench", name), {}).get("busy"),
            "seconds": steps.get(("bench", name), {}).get("seconds"),
            "rows": [{key: _digits(row[key]) for key in ROW} for row in bench["rows"]],
        }
    return made


def _digits(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cell(text: str) -> str:
    """Text that keeps inside one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([cell(one) for one in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(member: Member) -> tuple[list[str], list[list[str]]]:
    """The table of the README's section "How it differs": its head and its rows, as they stand.

    Raises:
        SystemExit: there is none, or a row has another number of cells.
    """
    text = (member.directory / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## How it differs.*?$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\|(.*)\|[ ]*$", section[1], re.MULTILINE) if section else []
    split = [[part.strip() for part in re.split(r"(?<!\\)\|", line)] for line in lines]
    if len(split) < 3 or {len(row) for row in split} != {len(split[0])}:
        raise SystemExit(f"{member.path}/README.md: no whole table under 'How it differs'")
    return split[0], split[2:]


def state(busy: float | None) -> str:
    """Whether the machine did something else, in words."""
    if busy is None:
        return "not known whether idle"
    return (
        "idle" if busy <= BUSY else f"BUSY with other work ({busy:.0%}): seconds are too large, ratios rough"
    )


def place(facts: dict[str, Any]) -> str:
    """A machine in words."""
    names = [facts["os"], f"{facts['cores']} cores", *facts["accelerators"], f"Python {facts['python']}"]
    return ", ".join([*names, f"PyTorch {facts['torch']}"])


def cost(row: dict[str, Any], whose: str) -> str:
    """Seconds or bytes of one side of a benchmark's row."""
    seconds, size = row[f"{whose}_s"], row[f"{whose}_peak_bytes"]
    if seconds is None:
        return "" if size is None else f"{size / 2**20:.1f} MiB"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def count(values: list[Any], value: Any) -> str:
    """How many are so; blank for none."""
    found = sum(1 for one in values if one is value)
    return str(found) if found else ""


def overview(kept: dict[str, dict[str, Any]]) -> str:
    """One row per package."""
    rows: list[list[str]] = []
    for name, data in kept.items():
        demo = data.get("full") or data.get("quick")
        claims = [claim["shown"] for claim in demo["claims"]] if demo else []
        met = [row["met"] for row in data["bench"]["rows"]] if "bench" in data else []
        seconds = [f"{data[kind]['seconds']:.0f} s" if kind in data else "-" for kind in ("quick", "full")]
        rows.append([f"[{name}](#{name})", *(count(claims, value) for value in (True, False, None)), *seconds,
                     *(count(met, value) for value in (True, False))])  # fmt: skip
    head = ["package", "shown", "not shown", "not tested", "quick demo", "full demo", "targets met", "missed"]
    return table(head, rows)


def claims(name: str, data: dict[str, Any]) -> list[str]:
    """The part about the claims of the paper."""
    demo, full = data.get("full") or data.get("quick"), "full" in data
    if demo is None:
        return ["The demo has not been measured."]
    rows = [[one["text"], one["source"], VERDICT[one["shown"]], one["sentence"]] for one in demo["claims"]]
    seeds = f"seeds {', '.join(map(str, demo['seeds']))}" if demo["seeds"] else f"seed {demo['seed']}"
    said = (
        f"`{name} demo{' --full' if full else ''} --seed {demo['seed']}`, {seeds}, {demo['seconds']:.0f} s, "
    )
    said += f"version {demo['version']}; {place(demo['machine'])}; {state(demo['busy'])}."
    return [table(["claim", "source", "here", "numbers"], rows), said]


def benchmarks(name: str, data: dict[str, Any]) -> list[str]:
    """The part about speed and memory."""
    bench = data.get("bench")
    if bench is None:
        return ["The benchmark has not been measured."]
    rows: list[list[str]] = []
    for row in bench["rows"]:
        spread = "" if row["ratio_low"] is None else f" [{row['ratio_low']:.3g}, {row['ratio_high']:.3g}]"
        how = f"{row['device']}, {row['threads']} thread{'s' if row['threads'] != 1 else ''}"
        costs = f"{cost(row, 'ours')} / {cost(row, 'reference')}"
        notes = ", ".join(filter(None, (how, row["dtype"], row["note"])))
        verdict = [row["target"] or "", MET[row["met"]]]
        rows.append([row["name"], costs, row["reference"], f"{row['ratio']:.3g}{spread}", *verdict, notes])
    said = f"`{name} bench`, version {bench['version']}, {bench['date'][:10]}; {place(bench['machine'])}; "
    said += f"{state(bench['busy'])}. Ratio = reference / ours: more than 1 is a win."
    head = ["row", "ours / reference", "reference", "ratio [95 %]", "target", "", "how"]
    return [table(head, rows), said]


def page() -> str:
    """The whole page, from evidence/ and the READMEs."""
    kept = {
        member.name: read(KEPT / f"{member.name}.json", SCHEMA) or {"package": member.name}
        for member in packages()
    }
    parts = [
        "# Evidence",
        INTRODUCTION,
        overview(kept),
    ]
    for member in packages():
        data = kept[member.name]
        method = importlib.import_module(f"{member.module}.demo").method
        head, rows = differences(member)
        parts += [
            f"## {member.name}",
            f"{method.title}. [{method.paper}]({method.url})",
            "### Claims",
            *claims(member.name, data),
            "### Published code, and what happens here instead",
            table(head, rows).replace("\\\\|", "\\|"),
            "### Benchmarks",
            *benchmarks(member.name, data),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Keep what FOLDER holds, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of .ci/measure.py")
    folder = parser.parse_args().folder
    if folder is not None:
        KEPT.mkdir(exist_ok=True)
        for member in packages():
            path = KEPT / f"{member.name}.json"
            new = collect(folder, member.name)
            old = read(path, SCHEMA) or {}
            text = json.dumps({**old, **new}, indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
