"""Progress bars on stderr, where a person looks; none where nobody does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(
    iterable: Iterable[T], text: str, total: int | None = None, enabled: bool | None = None
) -> Iterator[T]:
    """Iterate with a progress bar on stderr.

    Args:
        iterable: what to go through.
        text: what is being done, before the bar.
        total: number of items where ``len(iterable)`` does not tell.
        enabled: None shows the bar on a terminal only.

    Example:
        >>> list(track([1, 2], "counting"))
        [1, 2]
    """
    if enabled is False or (enabled is None and not sys.stderr.isatty()):
        yield from iterable
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        yield from bar.track(iterable, total=total, description=escape(text))
