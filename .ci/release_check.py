"""Stop a release whose tag, metadata, code and changelog disagree: ``release_check.py PACKAGE VERSION``."""

from __future__ import annotations

import sys

from workspace import member


def disagreements(package: str, version: str) -> list[str]:
    """One sentence for each place that says another version than the tag."""
    target = member(package)
    said = {
        "pyproject.toml": target.version,
        "__version__": target.code_version(),
        "the top entry of CHANGELOG.md": target.changelog_version(),
    }
    return [
        f"{package}: the tag says {version}, {place} says {found or 'nothing'}"
        for place, found in said.items()
        if found != version
    ]


def main() -> None:
    """Compare the two arguments with the tree; status 1 and one line for each difference."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: release_check.py PACKAGE VERSION")
    wrong = disagreements(*sys.argv[1:])
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{sys.argv[1]} {sys.argv[2]}: tag, metadata, code and changelog agree")


if __name__ == "__main__":
    main()
