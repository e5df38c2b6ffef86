"""Install one package's wheel with the core's wheel, and nothing else of the workspace, and try it.

``python .ci/isolation.py`` tries every member, ``... kd-trilateral`` one, ``... X --dist dist`` the wheels
of ``dist/`` instead of fresh ones. An environment outside the tree holds exactly one member and what it
needs; the next member gets the same one, emptied of all else, so that PyTorch is laid out and compiled
once. At the end stands what each member costs, and the run fails where ``budget.toml`` is exceeded.
Third-party versions are those of the workspace's ``exclude-newer``, because uv reads the root's settings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from cost import Cost, exceeded, measure, probe, strays, table
from trial import Environment, require, wheels
from workspace import CORE, ROOT, Member, member, members


def check_import(environment: Environment, target: Member) -> None:
    """Import the package in a fresh process and compare what it says of itself."""
    found = probe(environment, target)
    require(
        found["versions"] == [target.version] * 2,
        f"{target.name}: __version__ and installed are {found['versions']}, pyproject {target.version}",
    )
    require(
        not Path(found["file"]).is_relative_to(ROOT),
        f"{target.name} was imported from the checkout: {found['file']}",
    )
    require(not found["heavy"], f"import {target.module} loads {', '.join(found['heavy'])}")


def try_alone(target: Member, built: dict[str, Path], environment: Environment) -> Cost:
    """Install the member alone, look at it from outside, and measure what it costs."""
    environment.install("--exact", *dict.fromkeys([built[CORE.name], built[target.name]]))
    require(not (left := strays(environment.packages)), f"{target.name} alone: nobody owns {left}")
    check_import(environment, target)
    shown = environment.run(target.script, "--help").stdout
    require("Usage" in shown, f"{target.script} --help shows no usage")
    listed = environment.run("fusion", "list").stdout
    if target == CORE:
        others = [entry.name for entry in members() if entry.name in listed and entry != CORE]
        require(not others, f"fusion list names {others}, which are not installed")
    else:
        require(target.name in listed, f"fusion list does not name {target.name}:\n{listed}")
    return measure(environment, target)


def try_demo(target: Member, built: dict[str, Path], environment: Environment) -> None:
    """See that the demo names its extra, install that, and run the demo once."""
    out = environment.home / target.name
    bare = environment.run(target.script, "demo", "--out", out / "bare", expect=2)
    require(
        f"{target.name}[demo]" in bare.stderr,
        f"{target.script} demo without its extra does not say how to install it:\n{bare.stderr}",
    )
    environment.install("--exact", built[CORE.name], f"{target.name}[demo] @ {built[target.name].as_uri()}")
    check_import(environment, target)
    environment.run(target.script, "demo", "--out", out / "demo")
    result = json.loads((out / "demo" / "result.json").read_text(encoding="utf-8"))
    require(result["status"] == "ok", f"{target.script} demo: {result}")
    shutil.rmtree(out)


def main() -> None:
    """Try the named members, or all, as many at a time as there are environments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="PACKAGE")
    parser.add_argument("--dist", type=Path, help="take the wheels that are here")
    parser.add_argument("--no-demo", dest="demo", action="store_false", help="stop before the demo")
    parser.add_argument("--jobs", type=int, help="members at a time, of one thread each")
    arguments = parser.parse_args()
    chosen = [member(name) for name in arguments.names] or members()
    jobs = max(1, min(arguments.jobs or os.cpu_count() or 1, len(chosen)))
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")

    with tempfile.TemporaryDirectory(prefix="fusion-isolation-") as scratch:
        built = wheels(chosen, Path(scratch), arguments.dist)
        free: SimpleQueue[Environment] = SimpleQueue()
        for number in range(jobs):
            free.put(Environment(Path(scratch) / f"environment{number}").create())

        def attempt(target: Member) -> Cost:
            environment, start = free.get(), time.perf_counter()
            try:
                cost = try_alone(target, built, environment)
                if arguments.demo and target != CORE:
                    try_demo(target, built, environment)
            finally:
                free.put(environment)
            seconds = time.perf_counter() - start
            print(f"{target.name} {target.version} works alone ({seconds:.0f} s)", flush=True)
            return cost

        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(attempt, target) for target in chosen]
            try:
                costs = [done.result() for done in as_completed(running)]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    print(table(costs))
    if wrong := [line for cost in costs for line in exceeded(cost)]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
