"""Known rigs: height and attitude of the cameras of public data sets (section 2.8).

The numbers are the paper's calibration from depth (its appendix L). KITTI and DrivingStereo publish none;
DDAD's official values disagree with its depth; Argoverse's and Waymo's agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from gvdepth.errors import CameraError

__all__ = ["KITTI_INTRINSICS", "PRESETS", "Preset", "preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """Height above the road, metres, and attitude, degrees (pitch > 0 looks up), of a known rig."""

    camera_height: float
    pitch_deg: float
    roll_deg: float = 0.0
    note: str = ""


_KITTI = Preset(1.659, -0.664, note="its pitch has several modes: the intrinsics differ between days")
# fy, cy of each recording day's left color camera; the pitch that goes with them is not published.
KITTI_INTRINSICS = MappingProxyType(
    {
        "2011_09_26": (721.54, 172.85),
        "2011_09_28": (707.05, 180.51),
        "2011_09_29": (718.34, 181.51),
        "2011_09_30": (707.09, 183.11),
        "2011_10_03": (718.86, 185.22),
    }
)
PRESETS: dict[str, Preset] = {
    "argoverse": Preset(1.678, 0.021, note="Argoverse Stereo"),
    "ddad": Preset(1.459, -0.519),
    "drivingstereo": Preset(1.739, -0.561),
    "kitti": _KITTI,
    "waymo": Preset(2.145, -0.331),
} | {f"kitti/{day}": _KITTI for day in KITTI_INTRINSICS}


def preset(name: str) -> Preset:
    """The preset of a name; a recording day such as ``"kitti/2011_09_26"`` may be given numbers of its own.

    To do so assign to ``PRESETS``; the days of KITTI start with the numbers of all.

    Raises:
        CameraError: unknown name.

    Example:
        >>> preset("kitti").camera_height
        1.659
    """
    found = PRESETS.get(name.lower())
    if found is None:
        raise CameraError(f"preset is {name!r}, wanted one of {', '.join(sorted(PRESETS))}")
    return found
