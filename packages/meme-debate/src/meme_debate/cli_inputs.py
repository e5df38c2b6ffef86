"""What the commands share: options, memes with their debates, and the list of what could not be done."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from fusion_core.errors import ConfigError, InputError

Debates = Annotated[
    Path | None, typer.Option("--debates", help="debates.jsonl of these memes; without it there are none.")
]
JudgeFolder = Annotated[Path, typer.Option("--judge", help="Folder that `judge train` wrote.")]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Harmful from this score on; the judge's own by default.")
]
OnError = Annotated[
    str, typer.Option("--on-error", help="skip: do the others, list the bad ones, end with 2; raise: stop.")
]
MANIFEST = "manifest.jsonl"


class Inputs(NamedTuple):
    """Memes, their debates, and place and reason of the memes that were left out."""

    memes: Any
    debates: Any
    left_out: list[tuple[str, str]]


def read(
    path: Path, debates: Path | None, on_error: str, limit: int | None = None, *, pictures: bool = False
) -> Inputs:
    """Memes and debates of files.

    Args:
        path: of the memes.
        debates: of the debates, None = without.
        on_error: ``"raise"``, or ``"skip"`` leaves memes out that cannot be used.
        limit: most memes.
        pictures: whether a picture that cannot be decoded makes a meme unusable, as for a judge that looks.
    """
    from meme_debate.meme import load_debates

    memes, left_out = read_memes(path, on_error, limit, pictures=pictures)
    said = [] if debates is None else load_debates(debates)
    if limit is not None:
        known = {meme.id for meme in memes}
        said = [debate for debate in said if debate.id in known]
    said = [debate for debate in said if debate.id not in memes.skipped_ids]
    return Inputs(memes, said, left_out)


def read_memes(
    path: Path, on_error: str, limit: int | None = None, *, pictures: bool = False
) -> tuple[Any, list[tuple[str, str]]]:
    """Memes of a file, and place and reason of those that were left out; see :func:`read`."""
    from meme_debate.errors import DebateWarning
    from meme_debate.meme import load_memes

    if on_error not in ("raise", "skip"):
        raise ConfigError(f"--on-error is {on_error!r}, wanted raise or skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DebateWarning)  # they are listed one by one
        memes = load_memes(path, on_error=on_error, limit=limit, pictures=pictures)  # type: ignore[arg-type]
    return memes, [(place, why.removeprefix(f"{place}: ")) for place, why in memes.skipped]


def looks(judge: Any) -> bool:
    """Whether a judge looks at pictures."""
    return judge.fusion not in (None, "none") and judge.settings.image


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{' '.join(line.split())}\n")


def of_split(memes: Any, debates: Any, name: str) -> tuple[Any, Any]:
    """The memes of a split with their debates.

    Raises:
        InputError: there are none.
    """
    chosen = [meme for meme in memes if meme.split == name]
    if not chosen:
        splits = sorted({str(meme.split) for meme in memes})
        raise InputError(f"no meme has the split {name!r}; there are {', '.join(splits)}")
    ids = {meme.id for meme in chosen}
    return chosen, [debate for debate in debates if debate.id in ids]


def finish(
    verb: str, source: Path, out: Path | None, left_out: Sequence[tuple[str, str]], *, whole: bool = True
) -> None:
    """List what could not be done on stderr and in ``manifest.jsonl`` beside the results; then exit with 2.

    What an earlier call of the same command on the same file listed, and this one did, is marked as done.

    Args:
        verb: the command.
        source: the file or folder that it read.
        out: the file or folder that it wrote; None writes no manifest.
        left_out: place or id and reason of each.
        whole: whether all of the source was looked at.
    """
    from fusion_core.store import Manifest

    for key, reason in left_out:
        say(f"error: left out {key}: {reason}")
    path = None if out is None else (out if out.is_dir() else out.parent) / MANIFEST
    if path is not None and (left_out or path.exists()):
        manifest, facts = Manifest(path), {"verb": verb, "source": source.name}
        bad = dict(left_out)
        for key in manifest.failures():
            mine = {name: manifest.entries[key].get(name) for name in facts} == facts
            if whole and mine and key not in bad:
                manifest.add(key, **facts)
        for key, reason in bad.items():
            manifest.add(key, **facts, error=reason)
    if left_out:
        raise typer.Exit(2)
