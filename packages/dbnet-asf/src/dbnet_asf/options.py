"""Options that several verbs of the command line share."""

from typing import Annotated, Any

import typer

from fusion_core.errors import InputError

Model = Annotated[
    str, typer.Option("--model", "-m", help="nano (inside the package), a folder, or OWNER/NAME of the hub.")
]
DATA = "Folder or file, FORMAT:PATH, or rendered:COUNT[:SEED] for synthetic scenes."
Data = Annotated[str, typer.Argument(help=DATA)]
Format = Annotated[
    str | None, typer.Option("--format", help="icdar2015, totaltext, paddleocr or synthtext; else guessed.")
]
Polygon = Annotated[bool, typer.Option("--polygon", help="Free outlines instead of rotated boxes.")]
Thresh = Annotated[float | None, typer.Option("--thresh", help="A pixel is text above this probability.")]
BoxThresh = Annotated[float | None, typer.Option("--box-thresh", help="Keep regions that score this much.")]
Unclip = Annotated[float | None, typer.Option("--unclip", help="How far regions are grown.")]
ShortSide = Annotated[int | None, typer.Option("--short-side", min=1, help="Resize the short side to this.")]
LongSide = Annotated[int | None, typer.Option("--long-side", min=1, help="Resize the long side to this.")]
Native = Annotated[bool, typer.Option("--native", help="Keep the pixels as they are.")]
Tile = Annotated[int | None, typer.Option("--tile", help="Tiles of this side for larger pictures.")]
Overlap = Annotated[int, typer.Option("--overlap", help="Of neighboring tiles, in pixels.")]
Score = Annotated[str | None, typer.Option("--score", help="fast, slow or component.")]
Size = Annotated[int, typer.Option("--size", min=64, help="Side of the scenes, in pixels.")]
Protocol = Annotated[str, typer.Option("--protocol", help="iou (ICDAR 2015) or deteval (Total-Text).")]


def detector(model: str, device: str, dtype: str, **options: Any) -> Any:
    """The detector that a command line describes; options that are None keep the model's own settings.

    Raises:
        InputError: two size rules.
        CheckpointError: no such model.
    """
    from dbnet_asf.detect import TextDetector

    sizes = {
        "short": options.pop("short_side", None),
        "long": options.pop("long_side", None),
        "native": options.pop("native", False),
    }
    asked = [name for name, value in sizes.items() if value]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} exclude each other; give one size rule")
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if asked:
        settings["resize"] = asked[0]
        if asked[0] != "native":
            settings[f"{asked[0]}_side"] = sizes[asked[0]]
    return TextDetector.from_pretrained(model, device=device, dtype=dtype, **settings)
