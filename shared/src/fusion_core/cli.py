"""The command lines' common grammar: options of one name and meaning, one line per error, exit codes.

0 done, 1 unexpected, 2 bad input or a missing extra, 3 a gate that the user set was not met, 130 Ctrl-C.
stdout carries data only; bars, warnings and errors go to stderr.
"""

import inspect
import io
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    FusionError,
    FusionWarning,
    InputError,
    MissingExtraError,
    StoreError,
)

Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Where results go: a directory, or a file by its suffix.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0 or mps.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
Seed = Annotated[int, typer.Option("--seed", help="All random draws follow from it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N inputs only.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Items per forward pass.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in --out.")]
Shard = Annotated[
    str | None, typer.Option("--shard", help="i/n: every n-th input from the i-th on, counted from 0.")
]
NumWorkers = Annotated[
    int, typer.Option("--num-workers", min=0, help="Threads or processes beside the computation.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: name=value or part.name=value; repeat.")
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How many runs: --seed, the next number, and on.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=1, help="Most tokens of a text.")]
ShardGb = Annotated[float, typer.Option("--shard-gb", min=0.001, help="Most gigabytes of a shard.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed pairs per row.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Of the CPU, for both sides of a pair.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Rows whose name contains this; repeat.")]
Memory = Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peaks of memory too.")]

_LONGEST = 1000  # letters of a message
_EXPECTED = (InputError, CheckpointError, StoreError, MissingExtraError)


def new_app(name: str, help: str, version: str) -> typer.Typer:  # noqa: A002
    """A typer app with ``--version``, help when called without a verb, and plain tracebacks.

    Args:
        name: the console script.
        help: the first line says what the tool does.
        version: printed by ``--version``.
    """
    app = typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {version}")
            raise typer.Exit

    @app.callback()
    def common(  # pyright: ignore[reportUnusedFunction]
        _version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Print the version and stop.")
        ] = False,
    ) -> None:
        pass

    return app


def show_options(command: Callable[..., Any], options: Mapping[str, tuple[Any, Any]]) -> None:
    """Let typer see options of a command that takes them as ``**keywords``.

    Args:
        command: not yet registered; afterwards its signature is that of ``options``.
        options: name -> its ``Annotated`` type and its default; ``inspect.Parameter.empty`` for none.

    Example:
        >>> def command(**options): ...
        >>> show_options(command, {"seed": (Seed, 0)})
        >>> list(inspect.signature(command).parameters)
        ['seed']
    """
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in options.items()
    ]
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {name: kind for name, (kind, _) in options.items()}
    vars(command).pop("__wrapped__", None)  # else typer looks at the function inside


def fraction(text: str) -> float:
    """A number that may be written as a fraction.

    Args:
        text: such as ``"8/255"``, ``"0.5"`` or ``"1e-3"``.

    Raises:
        ConfigError: no finite number.

    Example:
        >>> fraction("1/4"), fraction("0.5")
        (0.25, 0.5)
    """
    top, mark, bottom = str(text).partition("/")
    try:
        found = float(top) / float(bottom) if mark else float(top)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{text!r} is no number, wanted one such as 8/255 or 0.5") from error
    if not math.isfinite(found):
        raise ConfigError(f"{text!r} is not finite, wanted a number such as 8/255 or 0.5")
    return found


def run(app: typer.Typer, *words: str) -> None:
    """Run an app as a console script: errors and warnings of the family are one line each on stderr.

    Args:
        app: of :func:`new_app`.
        *words: put before those of the command line, such as the verb of a script of its own.

    Raises:
        SystemExit: 2 for bad input, checkpoints, stores, missing extras and files that the system refuses, 1
            for others of the family and other errors of the system, 130 after Ctrl-C; typer's own codes
            otherwise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a sign shows "?" instead of failing
            stream.reconfigure(errors="replace")
    as_before = warnings.formatwarning

    def format_warning(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
        own = issubclass(category, FusionWarning)
        return f"warning: {_short(message)}\n" if own else as_before(message, category, *place, **line)

    warnings.formatwarning = format_warning
    # A notice from torch to torch, printed while its own modules load; users of a command cannot act on it.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
    # Of a configuration without words or units; what cannot be done with it is told as an error.
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
    try:
        app([*words, *sys.argv[1:]]) if words else app()
    except FusionError as error:
        sys.stderr.write(f"error: {_short(error) or type(error).__name__}\n")
        sys.exit(2 if isinstance(error, _EXPECTED) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a file that cannot be reached or written, a full disk
        if error.errno is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        sys.stderr.write(f"error: {_short(f'{place}{error.strerror}')}\n")
        sys.exit(1 if error.filename is None else 2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        sys.stderr.write(f"error: out of memory: {_short(error) or 'no more of it'}\n")
        sys.exit(1)
    finally:
        warnings.formatwarning = as_before


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from fusion_core.batching import is_out_of_memory

    return is_out_of_memory(error)


def _short(told: object) -> str:
    """A message on one line, without its middle where a value of the user's makes it very long."""
    line = " ".join(str(told).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-200:]}"


def emit(result: Any, json: bool, out: Path | None = None) -> None:
    """Print a result to stdout: one JSON document, or a table for people.

    Args:
        result: something with ``print()`` and ``to_dict()``, a mapping, mappings (rows), or text.
        json: what ``--json`` said.
        out: where the result's ``save`` writes it first; None writes nothing.
    """
    if out is not None:
        result.save(out)
    if json:
        from fusion_core.results import dump_json

        sys.stdout.write(dump_json(result))
    elif hasattr(result, "print"):
        result.print()
    elif isinstance(result, str):
        typer.echo(result)
    else:
        from fusion_core.report import print_rows
        from fusion_core.results import plain

        shown = plain(result)
        pairs = isinstance(shown, Mapping)
        print_rows([{"name": key, "value": value} for key, value in shown.items()] if pairs else shown)
