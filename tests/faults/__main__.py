"""The command: ``python tests/faults kill|garbage|load [--json FILE] ...``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults import forking

SCHEMA = "fusion.faults/1"


def main() -> int:
    """Run one of the three; 0 where nothing broke, 1 where something did."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, help_, words in (
        ("kill", "Kill every command that writes.", ("--kills", 20)),
        ("garbage", "Give every reader garbage.", ("--examples", 150)),
        ("load", "Load every server.", ("--seconds", 60)),
    ):
        made = verbs.add_parser(verb, help=help_)
        made.add_argument(words[0], type=int, default=words[1], dest="amount")
        if verb == "garbage":
            how = "every single change of the file instead of examples"
            made.add_argument("--every", action="store_const", const=0, dest="amount", help=how)
        made.add_argument("--only", action="append", default=[], help="commands whose name holds this")
        made.add_argument("--json", type=Path, help="the report")
        made.add_argument("--seed", type=int, default=0)
        made.add_argument("--work", type=Path, help="a folder to work in; a temporary one by default")
        made.add_argument("--list", action="store_true", help="print the names and stop")
    asked = parser.parse_args()
    forking.quiet_threads()
    from faults import cases

    chosen = [
        case
        for case in cases.of(asked.verb)
        if not asked.only or any(part in case.name for part in asked.only)
    ]
    if asked.list or not chosen:
        sys.stdout.write("".join(f"{case.name}\n" for case in chosen) or "nothing of that name\n")
        return 0 if chosen else 2
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = (asked.work or Path(folder)).resolve()
        good = _run(asked, chosen, place)
    return 0 if good else 1


def _run(asked: argparse.Namespace, chosen: list[Any], place: Path) -> bool:
    import importlib

    tool = importlib.import_module(f"faults.{asked.verb}")
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if asked.json is not None:
            document = {"schema": SCHEMA, "verb": asked.verb, "amount": asked.amount, "rows": rows}
            asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    return tool.run(chosen, place, asked.amount, asked.seed, report)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries that were imported for the forks have a lot to say at their end
