"""The reference's pages: what ``__all__`` of each package names, by kind, and its public submodules.

Nothing is imported: Griffe reads the sources, in which each lazy name stands under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import griffe
from workspace import CORE, Member, packages

BESIDE_ALL = {"kd_trilateral": ("integrations.transformers",), "ot_fusion": ("spec",)}
"""Public submodules that ``__all__`` does not name, since few users need them."""

KINDS = ("Functions", "Classes", "Settings", "Results", "Errors", "Data")
_BARE = {"members": False, "show_root_heading": False}
_ROOTS = {
    "fusion_core.config.Config": "Settings",
    "fusion_core.results.Result": "Results",
    "fusion_core.report.Report": "Results",
    "Exception": "Errors",
    "UserWarning": "Errors",
}


@functools.cache
def loaded() -> dict[str, griffe.Module]:
    """The import packages of all members, by name."""
    everyone = (CORE, *packages())
    loader = griffe.GriffeLoader(search_paths=[member.directory / "src" for member in everyone])
    found: dict[str, Any] = {member.module: loader.load(member.module) for member in everyone}
    loader.resolve_aliases(implicit=True, external=False)
    return found


def target(obj: Any) -> Any:
    """What a name stands for."""
    return obj.final_target if obj.is_alias else obj


def exported(module: griffe.Module) -> list[str]:
    """The public names of a module: its ``__all__``, or what it defines itself with a docstring."""
    if module.exports is not None:
        return [str(name) for name in module.exports if str(name) != "__version__"]
    return [
        name
        for name, obj in module.members.items()
        if not name.startswith("_") and not obj.is_alias and not obj.is_module and obj.docstring
    ]


def submodules(member: Member) -> list[str]:
    """The public submodules of a package, relative to it; all of the core's."""
    package = loaded()[member.module]
    if member == CORE:
        return sorted(_below(package))
    named = [name for name in exported(package) if target(package[name]).is_module]
    return sorted([*named, *BESIDE_ALL.get(member.module, ())])


def _below(module: griffe.Module, prefix: str = "") -> Iterator[str]:
    for name, obj in module.members.items():
        if not obj.is_alias and obj.is_module and not name.startswith("_"):
            yield prefix + name
            yield from _below(obj, f"{prefix}{name}.")


def bases(cls: griffe.Class) -> Iterator[str]:
    """Full names of all classes above one."""
    for base in cls.bases:
        if isinstance(base, str):
            yield base
            continue
        yield base.canonical_path
    for above in cls.resolved_bases:
        if (found := target(above)).is_class:
            yield found.path
            yield from bases(found)


def kind(obj: Any) -> str:
    """The group that an object is listed in."""
    found = target(obj)
    if found.is_function:
        return "Functions"
    if not found.is_class:
        return "Data"
    return next((_ROOTS[name] for name in bases(found) if name in _ROOTS), "Classes")


def groups(member: Member) -> dict[str, list[str]]:
    """Heading -> full names as users write them; kinds first, then one group for each submodule."""
    package = loaded()[member.module]
    names = [name for name in exported(package) if not target(package[name]).is_module]
    found = {
        heading: [f"{member.module}.{name}" for name in names if kind(package[name]) == heading]
        for heading in KINDS
    }
    for name in submodules(member):
        full = f"{member.module}.{name}"
        found[full] = [f"{full}.{entry}" for entry in exported(package[name])]
    return {heading: entries for heading, entries in found.items() if entries}


def _once(pages: Iterable[str]) -> dict[str, str]:
    """Real object -> the first of the names by which it is listed."""
    first: dict[str, str] = {}
    for name in pages:
        package, _, rest = name.partition(".")
        first.setdefault(target(loaded()[package][rest]).path, name)
    return first


def reference_page(member: Member) -> str:
    """The Markdown of a package's reference, in the words of mkdocstrings."""
    listed = groups(member)
    first = _once(name for names in listed.values() for name in names)
    lines = [
        f"# {member.name}: API reference",
        "",
        f"::: {member.module}",
        *_options(1, **_BARE, show_root_toc_entry=False),
    ]
    for heading, names in listed.items():
        module = heading if heading.startswith(f"{member.module}.") else None
        lines += ["", f"## {heading}" if module is None else f"## `{heading}`", ""]
        if module is not None:
            lines += [f"::: {module}", *_options(2, **_BARE)]
        package = loaded()[member.module]
        again: list[str] = []
        for name in names:
            real = target(package[name.partition(".")[2]]).path
            if first[real] == name:
                lines += ["", f"::: {name}", *_options(3)]
            else:
                again.append(f"[`{name.rpartition('.')[2]}`][{first[real]}]")
        if again:
            lines += ["", f"Also here: {', '.join(again)}."]
    return "\n".join(lines) + "\n"


def _options(level: int, **others: bool) -> list[str]:
    chosen = {"heading_level": level, **others}
    return ["    options:", *(f"      {name}: {str(value).lower()}" for name, value in chosen.items())]


def known_names() -> list[str]:
    """Every full name that a link may lead to: what is listed, and the public members of listed classes."""
    found: set[str] = set()
    for member in (CORE, *packages()):
        for heading, names in groups(member).items():
            if "." in heading:
                found.add(heading)
            for name in names:
                obj = target(loaded()[member.module][name.partition(".")[2]])
                found |= {name, obj.path}
                if obj.is_class:
                    public = [n for n, m in obj.members.items() if not n.startswith("_") and m.docstring]
                    found |= {f"{path}.{entry}" for path in (name, obj.path) for entry in public}
    return sorted(found)


def anchors() -> dict[str, list[str]]:
    """Page -> the anchors that it has to have: every listed name, once where it is listed twice."""
    found: dict[str, list[str]] = {}
    for member in (CORE, *packages()):
        names = [name for entries in groups(member).values() for name in entries]
        found[f"{member.path}/api.html"] = list(_once(names).values())
    return found
