"""What the tables share: making inputs, and writing results that were measured before."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults.forking import load
from faults.kill import Command


def do(main: str, *argv: object, at: Path | None = None, url: str = "") -> None:
    """Run a command line while inputs are made; it has to succeed.

    Args:
        main: ``module:function``.
        *argv: its words.
        at: stands for ``{in}``.
        url: stands for ``{url}``.
    """
    from fusion_core.testing import run_cli

    words = [str(word).replace("{in}", str(at)).replace("{url}", url) for word in argv]
    done = run_cli(load(main), *words)
    assert done.code == 0, f"{words}: {done.stderr}"


def bench(package: str, *words: str) -> Command:
    """The verb ``bench``, whose numbers are made up: it is the writing that is killed."""
    module = package.replace("-", "_")
    argv = ("bench", "--out", "bench.json", *words)
    return Command(
        name=f"{package} bench",
        main=f"{module}.cli:main",
        argv=argv,
        patch=partial(_measured, package),
    )


def _measured(package: str, _inputs: Path) -> None:
    from fusion_core.bench import Bench, Row

    module: Any = importlib.import_module(f"{package.replace('-', '_')}.bench")
    found = Bench(package)
    for number in range(20):
        found.add(Row(name=f"row {number}", ratio=1.5, ours_s=1.0, reference_s=1.5, reference="plain"))
    assert callable(module.run)
    module.run = lambda *_, **__: found


def demo(package: str) -> Command:
    """The verb ``demo``: run once in earnest, and then with what it found, so that the writing is killed."""
    module = package.replace("-", "_")
    return Command(
        name=f"{package} demo",
        main=f"{module}.cli:main",
        argv=("demo", "--out", "demo"),
        make=demonstrated(package),
        patch=partial(_recorded, package),
        together=True,
        timeout=900,
        volatile={r"\.(json|html)$": (rb"\d+\.\d(?: |\xc2\xa0)s\b", rb"&#34;time&#34;: [^\n]+")},
    )


def demonstrated(package: str) -> Callable[[Path], None]:
    """What runs a package's demo and keeps it in a folder."""

    def make(place: Path) -> None:
        _demonstrated(package, place)

    make.__name__ = f"demo_of_{package}"
    return make


def _demonstrated(package: str, place: Path) -> None:
    """Run a demo and keep what it returned beside its pictures."""
    module = importlib.import_module(f"{package.replace('-', '_')}.demo")
    pictures = place / "pictures"
    pictures.mkdir()
    found = module.method.demo(pictures)
    (place / "demo.pickle").write_bytes(pickle.dumps(found))


def _recorded(package: str, inputs: Path) -> None:
    """Let the demo of a package return what it found before."""
    module: Any = importlib.import_module(f"{package.replace('-', '_')}.demo")
    module.method = dataclasses.replace(module.method, demo=partial(replay, inputs))


def replay(place: Path, out: Path, **_: Any) -> Any:
    """Copy the pictures of a demo that was run before, and give what it found."""
    for file in (place / "pictures").iterdir():
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    found = pickle.loads((place / "demo.pickle").read_bytes())
    figures = [dataclasses.replace(figure, path=out / Path(figure.path).name) for figure in found.figures]
    return dataclasses.replace(found, figures=figures)
