"""Run every benchmark and demo, one after the other, and keep what they find.

``python .ci/measure.py FOLDER``, on a machine that does nothing else. What the folder holds already is not
run again, so that a stopped call goes on; ``--again`` runs it anew. Then ``python .ci/evidence.py FOLDER``
makes EVIDENCE.md of it.

The folder gets bench/NAME.json, quick/NAME/result.json, full/NAME/result.json, the output of each step in
logs/, and steps.jsonl: when each step began, how long it took, and how busy the machine was without it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from workspace import packages

KINDS = ("bench", "quick", "full")
BUSY = 0.15
"""A machine whose processors work for more than this share of the time without us is called busy."""
_WATCH = 3.0


@dataclass(frozen=True)
class Step:
    """One call of a package's command line."""

    kind: str
    name: str
    words: tuple[str, ...]
    result: Path


def steps(folder: Path, names: list[str], kinds: list[str], merging: Path | None) -> list[Step]:
    """What is to be run: all benchmarks, then all quick demos, then all full ones."""
    made: list[Step] = []
    for kind in kinds:
        for name in names:
            if kind == "bench":
                result = folder / "bench" / f"{name}.json"
                words = (name, "bench", "--out", str(result))
                if name == "fusechat" and merging is not None:
                    words += ("--merging", str(merging))
            else:
                result = folder / kind / name / "result.json"
                words = (name, "demo", "--out", str(result.parent), *(["--full"] if kind == "full" else []))
            made.append(Step(kind, name, words, result))
    return made


def _ticks() -> tuple[int, int] | None:
    """Ticks of all processors so far, and those without work; None where the system does not tell."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    numbers = [int(word) for word in first.split()[1:9]]
    return sum(numbers), numbers[3] + numbers[4]


def busy(seconds: float = _WATCH) -> float | None:
    """The share of the processors' time that others use, in [0, 1], watched for so long."""
    before = _ticks()
    time.sleep(seconds if before is not None else 0.0)
    after = _ticks()
    if before is None or after is None:
        return None
    total, idle = after[0] - before[0], after[1] - before[1]
    return round(1 - idle / total, 3) if total else None


def run(step: Step, folder: Path) -> dict[str, object]:
    """Run a step, its output in FOLDER/logs; the line for ``steps.jsonl``."""
    step.result.parent.mkdir(parents=True, exist_ok=True)
    log = folder / "logs" / f"{step.kind}-{step.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    shares = [busy()]
    began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(step.words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    seconds = round(time.perf_counter() - start, 1)
    shares.append(busy())
    return {
        "kind": step.kind,
        "name": step.name,
        "command": " ".join((*step.words[:2], *(["--full"] if step.kind == "full" else []))),
        "began": began,
        "seconds": seconds,
        "busy": max((share for share in shares if share is not None), default=None),
        "code": code,
    }


def main() -> None:
    """Run what is missing; exit 1 if a step failed."""
    names = [member.name for member in packages()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"packages; all by default: {', '.join(names)}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--again", action="store_true", help="run what is there already, too")
    parser.add_argument("--merging", type=Path, help="folder with 4 GB of room: fusechat beside mergekit")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"no package is called {', '.join(unknown)}")
    folder = options.folder.resolve()
    failed: list[str] = []
    for step in steps(folder, options.names or names, options.kinds, options.merging):
        if step.result.is_file() and not options.again:
            continue
        sys.stderr.write(f"{step.kind} {step.name} ... ")
        sys.stderr.flush()
        line = run(step, folder)
        with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        share = line["busy"]
        others = ", the machine was BUSY" if isinstance(share, float) and share > BUSY else ""
        sys.stderr.write(f"{line['seconds']} s, code {line['code']}{others}\n")
        if line["code"]:
            failed.append(f"{step.kind} {step.name}")
    if failed:
        sys.exit(f"failed, see {folder / 'logs'}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
