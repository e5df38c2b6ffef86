"""The nine public surfaces side by side: words of the Python APIs, options and verbs of the command lines.

``python .ci/surface.py`` prints the block of CONTRIBUTING.md, ``--write`` puts it there; the tests compare.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from workspace import ROOT, Member, packages

PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- surface: written by .ci/surface.py --write -->", "<!-- /surface -->"
WORDS = [
    "alpha",
    "axes",
    "ax",
    "batch_size",
    "beta",
    "cache",
    "config",
    "console",
    "data",
    "device",
    "device_map",
    "dtype",
    "epochs",
    "eta",
    "features",
    "fusion",
    "generator",
    "labels",
    "lam",
    "limit",
    "logits",
    "log_probs",
    "lr",
    "mask",
    "max_grad_norm",
    "mixed_precision",
    "normalize",
    "num_workers",
    "out",
    "overwrite",
    "preset",
    "probs",
    "progress",
    "report",
    "resume",
    "schedule",
    "score",
    "seed",
    "seeds",
    "shard",
    "size",
    "solver",
    "steps",
    "strategy",
    "targets",
    "temperature",
    "threshold",
    "top_k",
    "trace",
    "warmup_steps",
    "weight",
    "weight_decay",
    "weights",
]
"""The shared vocabulary: words that mean one thing wherever they stand, or whose meanings are told apart."""
MANY = 3
"""An option with more help sentences than this says itself what it takes; the table has one row for all."""


@dataclass(frozen=True)
class Option:
    """One option or argument of a verb."""

    name: str
    letters: tuple[str, ...]
    default: str
    help: str

    @property
    def is_argument(self) -> bool:
        """Whether it is given by place."""
        return not self.name.startswith("--")


@dataclass(frozen=True)
class Verb:
    """One verb of a command line."""

    package: str
    name: str
    help: str
    options: tuple[Option, ...]


def shown(value: Any) -> str:
    """A default in few letters."""
    if isinstance(value, PurePath):
        return str(value)
    if value is None or value is inspect.Parameter.empty:
        return ""
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__name__
    text = str(value) if isinstance(value, str) and value else repr(value)
    text = re.sub(r"<.*?>|\b\w*(?:Path|Config)\(.*\)", lambda found: found[0].partition("(")[0], text)
    return text if len(text) <= 40 else f"{text[:37]}..."


def verbs(member: Member) -> list[Verb]:
    """The verbs of a package, groups written out as ``judge train``."""
    from typer.main import get_command

    app = importlib.import_module(f"{member.module}.cli").app
    return sorted(_verbs(member.name, "", get_command(app)), key=lambda verb: verb.name)


def _verbs(package: str, prefix: str, command: Any) -> Iterator[Verb]:
    for name, found in command.commands.items():
        if hasattr(found, "commands"):
            yield from _verbs(package, f"{prefix}{name} ", found)
        else:
            options = tuple(_option(one) for one in found.params if one.name != "help")
            yield Verb(package, prefix + name, found.help or "", options)


def _option(found: Any) -> Option:
    if found.param_type_name == "argument":
        name = (found.metavar or found.name).upper() + ("..." if found.nargs == -1 else "")
        return Option(name, (), shown(found.default), found.help or "")
    long = [word for word in found.opts if word.startswith("--")]
    short = tuple(word for word in found.opts if not word.startswith("--"))
    name = "/".join([long[0], *found.secondary_opts[:1]])
    return Option(name, short, shown(found.default), found.help or "")


def callables(member: Member) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions, classes and methods of a package, by dotted name."""
    module = importlib.import_module(member.module)
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.ismodule(found):
            for inner in getattr(found, "__all__", [word for word in vars(found) if word[0] != "_"]):
                own = found.__name__ if not hasattr(found, "__all__") else member.module
                yield from _own(f"{name}.{inner}", getattr(found, inner), own)
        else:
            yield from _own(name, found, member.module)


def _own(name: str, found: Any, module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    if not callable(found) or not str(getattr(found, "__module__", "")).startswith(module):
        return
    yield name, found
    if inspect.isclass(found):
        for inner, method in vars(found).items():
            method = getattr(found, inner) if isinstance(method, classmethod | staticmethod) else method
            if callable(method) and not inner.startswith("_"):
                yield f"{name}.{inner}", method


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a callable that a caller can name; none where Python cannot tell."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    hidden = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [one for one in found if one.name not in ("self", "cls") and one.kind not in hidden]


def kind_of(parameter: inspect.Parameter) -> str:
    """The annotation of a parameter, without the names of modules."""
    kind = parameter.annotation
    if kind is inspect.Parameter.empty:
        return ""
    text = kind if isinstance(kind, str) else kind.__name__ if inspect.isclass(kind) else str(kind)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", text).replace("NoneType", "None")


def word_rows() -> list[list[str]]:
    """Word, type, default and who has it so, for the words of the vocabulary."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = defaultdict(dict)
    for member in packages():
        for name, function in callables(member):
            for one in parameters(function):
                if one.name in WORDS:
                    given = one.default is not inspect.Parameter.empty
                    default = (shown(one.default) or "None") if given else "required"
                    found[one.name, kind_of(one), default].setdefault(member.name, []).append(name)
    order = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]), item[0]))
    return [[f"`{word}`", f"`{kind}`" if kind else "", f"`{default}`", _users(users)]
            for (word, kind, default), users in order]  # fmt: skip


def _users(users: dict[str, list[str]]) -> str:
    parts: list[str] = []
    for package, names in users.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        parts.append(f"{package}: {', '.join(names[:2])}{more}")
    return "; ".join(parts)


def option_rows(listed: list[Verb]) -> list[list[str]]:
    """Option, default, help and the verbs that have it so, for the options of two packages or more."""
    found: dict[str, list[tuple[Option, Verb]]] = defaultdict(list)
    for verb in listed:
        for option in verb.options:
            if not option.is_argument:
                found[option.name].append((option, verb))
    rows: list[list[str]] = []
    for name, users in sorted(found.items()):
        if len({verb.package for _, verb in users}) < 2:
            continue
        many = len({option.help for option, _ in users}) > MANY
        ways: dict[tuple[str, str, str], list[Verb]] = defaultdict(list)
        for option, verb in users:
            text = "(as the verb says)" if many else option.help
            ways[", ".join(option.letters), option.default, text].append(verb)
        for (letters, default, text), verbs_of in sorted(
            ways.items(), key=lambda item: (-len(item[1]), item[0])
        ):
            marks = f"`{name}`" + (f" `{letters}`" if letters else "")
            rows.append([marks, f"`{default}`" if default else "", text, _by_package(verbs_of)])
    return rows


def _by_package(users: list[Verb]) -> str:
    grouped: dict[str, list[str]] = defaultdict(list)
    for verb in users:
        grouped[verb.package].append(verb.name)
    if len(grouped) == len(packages()):
        return "all" if all(len(names) == 1 for names in grouped.values()) else f"all ({len(users)} verbs)"
    return "; ".join(f"{package} {', '.join(names)}" for package, names in grouped.items())


def verb_rows(listed: list[Verb]) -> list[list[str]]:
    """Package, verb, arguments and options."""
    rows: list[list[str]] = []
    for verb in listed:
        arguments = " ".join(option.name for option in verb.options if option.is_argument)
        options = " ".join(f"`{option.name}`" for option in verb.options if not option.is_argument)
        rows.append([f"`{verb.package} {verb.name}`", arguments, options])
    return rows


def name_rows() -> list[list[str]]:
    """Package and its public names."""
    rows: list[list[str]] = []
    for member in packages():
        names = [name for name in importlib.import_module(member.module).__all__ if name != "__version__"]
        rows.append([f"`{member.module}`", ", ".join(f"`{name}`" for name in sorted(names, key=str.lower))])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def fold(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def block() -> str:
    """The whole block, with its marks."""
    listed = [verb for member in packages() for verb in verbs(member)]
    parts = [
        fold("Public names of each package", table(["import", "names"], name_rows())),
        fold("Words of the Python APIs", table(["word", "type", "default", "where"], word_rows())),
        fold(
            "Options of the command lines of two packages or more",
            table(["option", "default", "help", "verbs"], option_rows(listed)),
        ),
        fold("Verbs with their options", table(["verb", "arguments", "options"], verb_rows(listed))),
    ]
    return "\n\n".join([BEGIN, *parts, END])


def replaced(page: str) -> str:
    """The page with a fresh block.

    Raises:
        SystemExit: the marks are missing.
    """
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{PAGE.name} lacks {BEGIN} or {END}")
    return before + block() + after


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write it into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(block() + "\n")


if __name__ == "__main__":
    main()
