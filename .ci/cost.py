"""What an installed package costs: seconds of its import beside PyTorch's, megabytes beside PyTorch's.

Nothing of PyTorch counts, neither its own time nor the distributions that only it needs. ``budget.toml``
says how much a package may cost.
"""

from __future__ import annotations

import json
import re
import statistics
import tomllib
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from trial import Environment, distribution
from workspace import HEAVY, Member

BUDGET = Path(__file__).with_name("budget.toml")
_REPEATS = 3
_PROBE = """
import importlib, importlib.metadata, json, sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), set(sys.modules)
module = importlib.import_module({module!r})
end, after = time.process_time(), set(sys.modules)
for name in module.__all__ if {names} else ():
    getattr(module, name)
print(json.dumps({{
    "torch_seconds": middle - start,
    "seconds": end - middle,
    "names_seconds": time.process_time() - end,
    "modules": len(after - before),
    "heavy": [name for name in {heavy!r} if name in after],
    "versions": [module.__version__, importlib.metadata.version({name!r})],
    "file": module.__file__,
}}))
"""


@dataclass(frozen=True)
class Cost:
    """What one package costs in an environment that holds it and what it needs.

    Attributes:
        name: the distribution.
        seconds: CPU seconds of ``import package`` after ``import torch``.
        torch_seconds: CPU seconds of ``import torch`` in the same processes.
        names_seconds: CPU seconds to load every public name after that.
        modules: modules that ``import package`` adds to those of ``import torch``.
        megabytes: size of the package and of what it needs, without what only PyTorch needs.
        distributions: how many distributions these are.
    """

    name: str
    seconds: float
    torch_seconds: float
    names_seconds: float
    modules: int
    megabytes: float
    distributions: int


def probe(environment: Environment, target: Member, *, names: bool = False) -> dict[str, Any]:
    """Import the package, with ``names`` all that it exports, in a fresh process; what it says and took."""
    code = _PROBE.format(module=target.module, name=target.name, heavy=HEAVY, names=names)
    return json.loads(environment.run("python", "-c", code).stdout)


def closure(packages: Path, name: str, *, leaf: str = "torch") -> dict[str, Distribution]:
    """The installed distributions that one needs, itself included, without ``leaf`` and its needs."""
    installed = {distribution(found.name): found for found in distributions(path=[str(packages)])}
    needed: dict[str, Distribution] = {}
    todo, seen = [(distribution(name), "")], {("", "")}
    while todo:
        current, extra = entry = todo.pop()
        if entry in seen or current == leaf or current not in installed:
            continue
        seen.add(entry)
        needed[current] = installed[current]
        for line in installed[current].requires or ():
            requirement, _, marker = line.partition(";")
            conditions = re.findall(r"extra\s*==\s*['\"]([^'\"]+)", marker) or [""]
            if extra in conditions:
                asked = re.search(r"\[(.*?)\]", requirement)
                extras = ["", *(asked.group(1).replace(" ", "").split(",") if asked else ())]
                todo += [(distribution(requirement), further) for further in extras]
    return needed


def files(found: Distribution) -> list[Path]:
    """The files that the distribution's record lists and that are there."""
    return [path for file in found.files or () if (path := Path(str(found.locate_file(file)))).is_file()]


def strays(packages: Path) -> list[str]:
    """Names in the environment's directory that no installed distribution owns; a clean one has none.

    Empty folders do not count: some wheels bring one (``pyerfa.libs``), and a record lists files only.
    """
    own = {
        file.parts[0]
        for found in distributions(path=[str(packages)])
        for file in found.files or ()
        if file.parts[0] != ".."
    }
    known = own | {"__pycache__", "_virtualenv.py", "_virtualenv.pth"}
    return sorted(
        path.name
        for path in packages.iterdir()
        if path.name not in known and (path.is_file() or any(each.is_file() for each in path.rglob("*")))
    )


def measure(environment: Environment, target: Member) -> Cost:
    """Import the package in several fresh processes, and weigh what is installed."""
    runs = [probe(environment, target, names=last) for last in (*[False] * (_REPEATS - 1), True)]
    needed = closure(environment.packages, target.name)
    size = sum(path.stat().st_size for found in needed.values() for path in files(found))
    return Cost(
        name=target.name,
        seconds=statistics.median(run["seconds"] for run in runs),
        torch_seconds=statistics.median(run["torch_seconds"] for run in runs),
        names_seconds=runs[-1]["names_seconds"],
        modules=runs[0]["modules"],
        megabytes=size / 1e6,
        distributions=len(needed),
    )


def exceeded(cost: Cost, budget: dict[str, Any] | None = None) -> list[str]:
    """One sentence for each budget that the package exceeds."""
    budget = budget or tomllib.loads(BUDGET.read_text(encoding="utf-8"))
    found: list[str] = []
    allowed = budget["import"]["seconds"] * cost.torch_seconds / budget["import"]["torch_seconds"]
    if cost.seconds > allowed:
        found.append(
            f"{cost.name}: the import adds {cost.seconds:.2f} CPU s to torch's {cost.torch_seconds:.2f}, "
            f"the budget is {allowed:.2f} here"
        )
    limit = budget["megabytes"].get(cost.name)
    if limit is None:
        found.append(f"{cost.name} has no budget of megabytes in {BUDGET.name}")
    elif cost.megabytes > limit:
        found.append(f"{cost.name}: {cost.megabytes:.0f} MB beside torch, the budget is {limit} MB")
    return found


def table(costs: list[Cost]) -> str:
    """The costs, one line a package; the seconds are CPU time."""
    head = ("import s", "torch s", "all names s", "modules", "MB", "distributions")
    lines = [f"{'package':<15}{head[0]:>10}{head[1]:>9}{head[2]:>13}{head[3]:>9}{head[4]:>6}{head[5]:>15}"]
    lines += [
        f"{cost.name:<15}{cost.seconds:>10.3f}{cost.torch_seconds:>9.2f}{cost.names_seconds:>13.2f}"
        f"{cost.modules:>9}{cost.megabytes:>6.0f}{cost.distributions:>15}"
        for cost in sorted(costs, key=lambda cost: cost.name)
    ]
    return "\n".join(lines)
