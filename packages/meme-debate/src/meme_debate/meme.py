"""The records: a meme, a debate about it, and the JSON Lines files that hold them."""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from fusion_core.atomic import atomic_write, is_file
from fusion_core.errors import DataError, InputError, require_extra
from meme_debate.errors import DebateWarning

MAX_PIXELS = 50_000_000
"""Pictures of more pixels are refused before they are decoded."""

DEBATE_SCHEMA = "meme-debate.debate/1"
CARD_SCHEMA = "meme-debate.card/1"
SIDES = ("harmless", "harmful")
"""The side of each class: a label, verdict or prediction is an index of it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Meme:
    """A picture with words on it.

    Args:
        id: unique in its file.
        image: path, PIL image, or None.
        text: the words on the picture; may be empty and may hold newlines.
        caption: what another program says about the picture.
        label: 1 harmful, 0 harmless, None unknown.
        split: such as ``"train"``.
        group: whom the meme is about, for the audit.
        source: the data set it is from.

    Raises:
        DataError: no id, a text that is none, or another label; the message names the meme.

    Example:
        >>> Meme("m1", None, "when the coffee is cold again").label is None
        True
    """

    id: str
    image: Any
    text: str
    caption: str = ""
    label: int | None = None
    split: str | None = field(default=None, kw_only=True)
    group: str | None = field(default=None, kw_only=True)
    source: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_id(self.id, "meme")
        where = f"meme {self.id!r}"
        for name in ("text", "caption"):
            object.__setattr__(self, name, _check_text(where, name, getattr(self, name)))
        object.__setattr__(self, "label", _check_class(where, "label", self.label))
        for name in ("split", "group", "source"):
            object.__setattr__(self, name, _check_word(where, name, getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Debate:
    """The case for each side, and which one a language model found better supported.

    Args:
        id: the meme's.
        harmful: why the meme would be harmful; empty where that side was refused.
        harmless: why it would not.
        verdict: 1 harmful, 0 harmless, None where the model was not asked or did not agree with itself.
        agreement: whether both orders of the statements gave the same verdict; None where not asked.
        flags: what happened, such as ``refused_harmful`` or ``names_label``.
        record: the whole line of ``debates.jsonl``; None for a debate that was made by hand.

    Raises:
        DataError: as in :class:`Meme`.

    Example:
        >>> Debate("m1", "It mocks the host.", "It is a joke about a drink.", 0).side
        'harmless'
    """

    id: str
    harmful: str
    harmless: str
    verdict: int | None = None
    agreement: bool | None = field(default=None, kw_only=True, compare=False)
    flags: tuple[str, ...] = field(default=(), kw_only=True, compare=False)
    record: Mapping[str, Any] | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_id(self.id, "debate")
        where = f"debate {self.id!r}"
        for name in ("harmful", "harmless"):
            object.__setattr__(self, name, _check_text(where, name, getattr(self, name)))
        object.__setattr__(self, "verdict", _check_class(where, "verdict", self.verdict))
        if self.agreement not in (None, True, False):
            raise DataError(f"{where}: agreement is {self.agreement!r}, wanted true, false or null")
        object.__setattr__(self, "flags", _check_words(where, "flags", self.flags))

    @property
    def side(self) -> str | None:
        """The verdict's side, ``"harmful"`` or ``"harmless"``."""
        return None if self.verdict is None else SIDES[self.verdict]

    @property
    def empty(self) -> bool:
        """Neither side said anything: it counts as no debate."""
        return not self.harmful.strip() and not self.harmless.strip()


def _check_id(value: Any, kind: str) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{kind} has id {value!r}, wanted text that is not empty")
    if mend(value) != value:
        raise DataError(f"{kind} has id {value!r}, which holds half a surrogate pair; no file can hold that")


def _check_text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is a {type(value).__name__}, wanted text")
    return mend(value)


def _check_word(where: str, name: str, value: Any) -> str | None:
    """Text, or a number of a column of codes as text."""
    if value is None or isinstance(value, str):
        return value if value is None else mend(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: {name} is a {type(value).__name__}, wanted text or null")
    return str(value)


def _check_words(where: str, name: str, value: Any) -> tuple[str, ...]:
    words: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, str) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: {name} is {str(value)[:80]!r}, wanted a list of words")
    return tuple(map(mend, words))


def mend(text: str) -> str:
    """Text that every file and server takes: half a surrogate pair, as in scraped JSON, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_class(where: str, name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number not in (0, 1) or isinstance(value, bool):
        raise DataError(f"{where}: {name} is {value!r}, wanted 0 (harmless), 1 (harmful) or None")
    return number


def check_shown(meme: Meme) -> Meme:
    """A meme that has something to look at.

    Raises:
        DataError: no picture and no words.
    """
    if meme.image is None and not meme.text.strip():
        raise DataError(f"meme {meme.id!r} has no image and no text; give one of them")
    return meme


class Memes(list[Meme]):
    """Memes of a file; ``skipped`` holds the place and the reason of each record left out, if any."""

    skipped: tuple[tuple[str, str], ...] = ()
    skipped_ids: frozenset[str] = frozenset()


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a JSON Lines file (or ``.parquet``, extra ``parquet``), each with its place.

    Raises:
        InputError: no such file.
        DataError: a line that is no JSON object, or bytes that are no UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} is {'a folder' if file.is_dir() else 'not there'}, wanted a .jsonl file")
    if file.suffix == ".parquet":
        parquet: Any = require_extra("pyarrow.parquet", "parquet", "meme-debate")
        try:
            rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
            raise DataError(f"{file} is no Parquet file: {error}") from error
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{place} holds a {type(record).__name__}, wanted a JSON object")
            yield place, cast("dict[str, Any]", record)


def load_memes(
    path: str | os.PathLike[str],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    pictures: bool = False,
) -> Memes:
    """Read ``memes.jsonl``: ``id``, ``image`` (a path relative to the file, or null), ``text``, and further.

    Args:
        path: JSON Lines or Parquet.
        on_error: ``"skip"`` leaves out records that cannot be used, with one warning that counts them.
        limit: use the first ones only.
        pictures: decode each picture too, so that one that is cut off counts as an image that cannot be used.

    Returns:
        A list in the file's order, with ``skipped``.

    Raises:
        InputError: no such file, or no record in it.
        DataError: a record that cannot be used (an image that is not there, an id used twice, a label that
            is not 0, 1 or null, nothing to look at); the message names its line.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error is {on_error!r}, wanted 'raise' or 'skip'")
    folder = Path(path).parent
    found, skipped, seen, bad = Memes(), list[tuple[str, str]](), set[str](), set[str]()
    for place, record in read_lines(path):
        if limit is not None and len(found) >= limit:
            break
        try:
            meme = _meme(place, record, folder, seen)
            if pictures and meme.image is not None:
                _check_picture(place, meme)
        except DataError as error:
            if on_error == "raise":
                raise
            skipped.append((place, str(error)))
            bad.add(str(record.get("id")))
            continue
        seen.add(meme.id)
        found.append(meme)
    found.skipped, found.skipped_ids = tuple(skipped), frozenset(bad - seen)
    if skipped:
        warnings.warn(
            f"{path}: left out {len(skipped)} of {len(skipped) + len(found)} records, the first: "
            f"{skipped[0][1]}",
            DebateWarning,
            stacklevel=2,
        )
    if not found:
        raise InputError(f"{path} holds no meme" + (f": {skipped[0][1]}" if skipped else ""))
    return found


def _meme(place: str, record: dict[str, Any], folder: Path, seen: set[str]) -> Meme:
    try:
        image = record.get("image")
        if image is not None and not isinstance(image, str):
            raise DataError(f"image is a {type(image).__name__}, wanted a path or null")
        if image is not None and "://" in image:
            raise DataError(f"image is {image[:80]!r}; nothing is fetched, give a path")
        path = None if image is None else folder / image
        meme = Meme(
            record.get("id", ""), path, record.get("text", ""), record.get("caption") or "",
            record.get("label"), split=record.get("split"), group=record.get("group"),
            source=record.get("source"),
        )  # fmt: skip
        if meme.id in seen:
            raise DataError(f"id {meme.id!r} is there twice")
        if path is not None and not is_file(path):
            raise DataError(f"meme {meme.id!r}: image {str(path)!r} is not there")
        return check_shown(meme)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _check_picture(place: str, meme: Meme) -> None:
    from fusion_core.images import read_image

    try:
        read_image(meme.image, max_pixels=MAX_PIXELS)
    except InputError as error:
        raise DataError(f"{place}: meme {meme.id!r}: {error}") from error


def load_debates(path: str | os.PathLike[str]) -> list[Debate]:
    """Read ``debates.jsonl``, or any JSON Lines with ``id``, ``harmful``, ``harmless`` and ``verdict``.

    Raises:
        InputError: no such file.
        DataError: another schema, a stance that is missing, an id used twice; the message names the line.
    """
    found: dict[str, Debate] = {}
    for place, record in read_lines(path):
        if (schema := record.get("schema", DEBATE_SCHEMA)) != DEBATE_SCHEMA:
            raise DataError(f"{place} has schema {schema!r}, wanted {DEBATE_SCHEMA!r}")
        for name in ("id", "harmful", "harmless"):
            if name not in record:
                raise DataError(
                    f"{place}: debate {record.get('id')!r} has no {name!r}; its id and both sides are needed"
                )
        try:
            debate = debate_of(record)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if debate.id in found:
            raise DataError(f"{place}: id {debate.id!r} is there twice")
        found[debate.id] = debate
    return list(found.values())


def debate_of(record: Mapping[str, Any]) -> Debate:
    """The debate of one record of ``debates.jsonl``."""
    return Debate(
        record["id"], record["harmful"], record["harmless"], record.get("verdict"),
        agreement=record.get("agreement"), flags=record.get("flags") or (), record=record,
    )  # fmt: skip


def pair(memes: Sequence[Meme], debates: Iterable[Debate] | None) -> list[tuple[Meme, Debate | None]]:
    """Each meme with its debate; None where it has none, or where neither side said anything.

    Raises:
        DataError: a debate about no meme of the list, or two about one.

    Example:
        >>> pair([Meme("a", None, "x")], [Debate("a", "", "")])[0][1] is None
        True
    """
    known = {meme.id for meme in memes}
    found: dict[str, Debate] = {}
    for debate in debates or ():
        if debate.id not in known:
            raise DataError(f"debate {debate.id!r} is about no meme of these {len(known)}; check the ids")
        if debate.id in found:
            raise DataError(f"debate {debate.id!r} is there twice")
        found[debate.id] = debate
    rows = [(meme, found.get(meme.id)) for meme in memes]
    return [(meme, None if debate is None or debate.empty else debate) for meme, debate in rows]


def line(record: Mapping[str, Any]) -> str:
    """One line of a JSON Lines file, strict JSON with its newline."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def save_memes(path: str | os.PathLike[str], memes: Iterable[Meme]) -> None:
    """Write ``memes.jsonl``, whole or not at all; image paths become relative to the file.

    Raises:
        InputError: an image that is no path.
    """
    folder = Path(path).resolve().parent

    def record(meme: Meme) -> dict[str, Any]:
        image = meme.image
        if image is not None and not isinstance(image, str | os.PathLike):
            raise InputError(
                f"meme {meme.id!r} holds a {type(image).__name__}; save the image, give its path"
            )
        place = None if image is None else Path(os.path.relpath(Path(image).resolve(), folder)).as_posix()
        names = ("text", "caption", "label", "split", "group", "source")
        return {"id": meme.id, "image": place, **{name: getattr(meme, name) for name in names}}

    save_lines(path, memes, record)


def save_debates(path: str | os.PathLike[str], debates: Iterable[Debate]) -> None:
    """Write ``debates.jsonl``, whole or not at all; a debate made by hand gets the four fields only."""
    names = ("id", "harmful", "harmless", "verdict")
    save_lines(
        path,
        debates,
        lambda d: d.record or {"schema": DEBATE_SCHEMA, **{name: getattr(d, name) for name in names}},
    )


def save_lines(
    path: str | os.PathLike[str], items: Iterable[T], record: Callable[[T], Mapping[str, Any]]
) -> None:
    """Write one JSON object a line, whole or not at all."""
    with atomic_write(path, "w") as file:
        for item in items:
            file.write(line(record(item)))
