"""Options that several commands share: the camera's, in one place."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.errors import InputError, reading
from gvdepth.camera import Camera
from gvdepth.errors import CameraError


def _number(flag: str, words: str) -> Any:
    return Annotated[float | None, typer.Option(flag, help=words, rich_help_panel="Camera")]


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "camera": (
        Annotated[
            Path | None,
            typer.Option(
                "--camera",
                help="Camera file: JSON, TOML, KITTI, ROS, OpenCV, nuScenes.",
                rich_help_panel="Camera",
            ),
        ],
        None,
    ),
    "camera_name": (
        Annotated[
            str | None,
            typer.Option(
                "--camera-name", help="Which, where a file holds several.", rich_help_panel="Camera"
            ),
        ],
        None,
    ),
    "preset": (
        Annotated[
            str | None,
            typer.Option(
                "--preset", help="Height and pitch of a known rig, such as kitti.", rich_help_panel="Camera"
            ),
        ],
        None,
    ),
    "fx": (_number("--fx", "Focal length along the rows, pixels."), None),
    "fy": (_number("--fy", "Focal length along the columns, pixels."), None),
    "cx": (_number("--cx", "Column of the principal point, pixels."), None),
    "cy": (_number("--cy", "Row of the principal point, pixels."), None),
    "hfov": (_number("--hfov", "Horizontal field of view in degrees, instead of --fx and --fy."), None),
    "camera_height": (_number("--camera-height", "Metres above the road."), None),
    "pitch_deg": (_number("--pitch-deg", "Degrees, > 0 looks ABOVE the horizon."), None),
    "roll_deg": (_number("--roll-deg", "Degrees, > 0 dips the right side."), None),
    "horizon_row": (
        _number("--horizon-row", "Row of the horizon in the middle, instead of --pitch-deg."),
        None,
    ),
    "pitch_sign": (
        Annotated[
            Literal["up", "down"],
            typer.Option(
                "--pitch-sign",
                help="down: pitch > 0 looks below the horizon, in the file and in --pitch-deg.",
                rich_help_panel="Camera",
            ),
        ],
        "up",
    ),
    "size": (
        Annotated[
            str | None,
            typer.Option(
                "--size", help="WIDTHxHEIGHT where no image tells, pixels.", rich_help_panel="Camera"
            ),
        ],
        None,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraFlags:
    """What the command line says of the camera."""

    camera: Path | None = None
    camera_name: str | None = None
    preset: str | None = None
    fx: float | None = None
    fy: float | None = None
    cx: float | None = None
    cy: float | None = None
    hfov: float | None = None
    camera_height: float | None = None
    pitch_deg: float | None = None
    roll_deg: float | None = None
    horizon_row: float | None = None
    pitch_sign: Literal["up", "down"] = "up"
    size: str | None = None

    @property
    def given(self) -> bool:
        """Whether anything was said at all."""
        return any(getattr(self, field.name) not in (None, "up") for field in fields(self))

    def image_size(self) -> tuple[int, int] | None:
        """``(height, width)`` of ``--size``.

        Raises:
            InputError: not WIDTHxHEIGHT.
        """
        if self.size is None:
            return None
        width, cross, height = self.size.lower().partition("x")
        if not (cross and width.isdigit() and height.isdigit()):
            raise InputError(f"--size is {self.size!r}, wanted WIDTHxHEIGHT such as 1242x375")
        return int(height), int(width)

    def resolve(self, size: tuple[int, int] | None = None, *, height_needed: bool = True) -> Camera:
        """The camera.

        Args:
            size: ``(height, width)`` of the image; ``--size`` comes first.
            height_needed: refuse a camera whose height is not known.

        Raises:
            CameraError: a number is missing (the flag is named), or no camera has such numbers.
        """
        size = self.image_size() or size
        found = self._from_file(size) if self.camera is not None else self._from_numbers(size)
        return self.mounted(found, height_needed=height_needed)

    def rectifier(self) -> Any:
        """What takes the lens distortion of the camera file out of images.

        Raises:
            CameraError: there is no camera file.
            CalibrationError: it holds no distortion.
        """
        from gvdepth.rectify import read_rectifier

        if self.camera is None:
            raise CameraError("--rectify needs --camera FILE: the file that holds the lens distortion")
        return read_rectifier(self.camera)

    def mounted(self, found: Camera, *, height_needed: bool = True) -> Camera:
        """A camera with the height and the attitude of the flags.

        Raises:
            CameraError: the height is missing, or two flags say the same.
        """
        if self.preset is not None:
            found = found.with_preset(self.preset)
        sign = -1.0 if self.pitch_sign == "down" else 1.0
        changes: dict[str, float] = {}
        if self.camera_height is not None:
            changes["camera_height"] = self.camera_height
        if self.roll_deg is not None:
            changes["roll_deg"] = self.roll_deg
        if self.pitch_deg is not None:
            if self.horizon_row is not None:
                raise CameraError("--pitch-deg and --horizon-row say the same; give one")
            changes["pitch_deg"] = sign * self.pitch_deg
        if self.horizon_row is not None:
            found = found.computed(
                pitch_deg=math.degrees(math.atan((self.horizon_row - found.cy) / found.fy))
            )
        found = found.replace(**changes) if changes else found
        if height_needed and found.camera_height is None:
            raise CameraError("the camera's height is missing: give --camera-height METRES, or --preset NAME")
        return found

    def _from_file(self, size: tuple[int, int] | None) -> Camera:
        assert self.camera is not None
        clash = [flag for flag in ("fx", "fy", "cx", "cy", "hfov") if getattr(self, flag) is not None]
        if clash:
            raise CameraError(f"--camera and --{clash[0]} both give intrinsics; give one")
        options: dict[str, Any] = {} if self.pitch_sign == "up" else {"pitch_sign": self.pitch_sign}
        try:
            return Camera.load(self.camera, camera_name=self.camera_name, **options)
        except InputError as error:
            # Some formats do not hold the image's size.
            if size is None or "size" not in str(error):
                raise
            options |= {"height": size[0], "width": size[1]}
            return Camera.load(self.camera, camera_name=self.camera_name, **options)

    def _from_numbers(self, size: tuple[int, int] | None) -> Camera:
        numbers = {name: getattr(self, name) for name in ("fx", "fy", "cx", "cy")}
        if self.hfov is None and all(value is None for value in numbers.values()):
            raise CameraError(
                "the camera is missing: give --camera FILE, or --fx --fy --cx --cy, or --hfov DEGREES; and "
                "--camera-height, --pitch-deg or --preset"
            )
        if size is None:
            raise CameraError("the image's size is missing: give --size WIDTHxHEIGHT")
        height, width = size
        if self.hfov is not None:
            if self.fx is not None or self.fy is not None:
                raise CameraError("--hfov and --fx say the same; give one")
            center = {name: numbers[name] for name in ("cx", "cy") if numbers[name] is not None}
            return Camera.from_fov(self.hfov, width, height, **center)
        missing = [f"--{name}" for name, value in numbers.items() if value is None]
        if missing:
            raise CameraError(f"the camera's {', '.join(missing)} is missing (pixels, of the image as it is)")
        return Camera(**numbers, width=width, height=height)


def camera_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the camera's options; it gets them as one argument ``flags``."""

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> Any:
        flags = CameraFlags(**{name: arguments.pop(name) for name in _OPTIONS})
        return function(flags=flags, **arguments)

    own = inspect.signature(function, eval_str=True).parameters
    options = {name: (own[name].annotation, own[name].default) for name in own if name != "flags"}
    cli.show_options(wrapper, options | _OPTIONS)
    return wrapper


def pair(text: str | None) -> tuple[float, float] | None:
    """The two numbers of ``--calib-std``.

    Raises:
        InputError: not METRES,DEGREES.
    """
    if text is None:
        return None
    try:
        height, pitch = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--calib-std is {text!r}, wanted METRES,DEGREES such as 0.02,0.1") from error
    return height, pitch


def read_depths(folder: Path, limit: int | None = None) -> dict[Path, Any]:
    """The depth maps below a folder by their files, sorted.

    Raises:
        InputError: there are none.
    """
    from gvdepth.data import read_depth

    files = (
        sorted(path for path in folder.rglob("*") if path.suffix in (".npy", ".png"))
        if folder.is_dir()
        else []
    )
    if not files:
        raise InputError(f"--depth {folder} is no folder with depth maps (.png of 16 bits, .npy)")
    return {path: read_depth(path) for path in files[:limit]}


def check_sizes(camera: Camera, pictures: Mapping[Path, Any]) -> None:
    """Look whether a camera fits pictures or maps (height, width, ...) of files.

    Raises:
        CameraError: one has another aspect; its file is named.
    """
    for path, picture in pictures.items():
        with reading(path):
            camera.for_image(*picture.shape[:2])
