"""KITTI in its original layout: raw drives and the annotated depth maps."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from fusion_core.atomic import PathLike, is_file
from fusion_core.errors import DataError, InputError, naming
from fusion_core.images import read_image
from gvdepth.camera import Camera
from gvdepth.data.base import Sample, make_sample, read_depth

_SIDES = {"l": 2, "r": 3, "2": 2, "3": 3}
_DEPTH_ROOTS = ("", "train", "val", "data_depth_annotated/train", "data_depth_annotated/val")


class KITTI:
    """KITTI raw drives with annotated depth.

    ``ROOT/DATE/DRIVE/image_0S/data/FRAME.png``, ``ROOT/DATE/calib_cam_to_cam.txt``, and depth maps
    ``DRIVE/proj_depth/groundtruth/image_0S/FRAME.png`` below ROOT, ROOT/DATE, ROOT/train, ROOT/val or
    ROOT/data_depth_annotated. Height and pitch are the calibrated preset of the recording's date: KITTI
    publishes
    none (section 2.8).

    Args:
        root: of the raw data.
        split: a file of lines ``DATE/DRIVE FRAME SIDE``, such as the Eigen split; by default every frame of
            ``cameras`` that has a depth map.
        cameras: which, where there is no split: 2 = left, 3 = right.
        depth_root: where the annotated depth is, if not below ``root``.
        labeled: False takes frames without depth, whose maps are then all 0.

    Raises:
        InputError: no such folder, nothing in it, or a line of the split that cannot be read or found.
    """

    def __init__(
        self,
        root: PathLike,
        *,
        split: PathLike | None = None,
        cameras: tuple[int, ...] = (2,),
        depth_root: PathLike | None = None,
        labeled: bool = True,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"kitti root {str(root)!r} is no folder")
        self.depth_roots = [Path(depth_root)] if depth_root is not None else []
        self.depth_roots += [self.root / name for name in _DEPTH_ROOTS]
        self.labeled = labeled
        self.frames = self._all(cameras) if split is None else self._listed(Path(split))
        if not self.frames:
            raise InputError(
                f"kitti root {str(root)!r} holds no frame DATE/DRIVE/image_02/data/*.png with depth"
            )

    def _all(self, cameras: tuple[int, ...]) -> list[tuple[str, str, str, int]]:
        found: list[tuple[str, str, str, int]] = []
        for camera in cameras:
            for path in self.root.glob(f"*/*_sync/image_{camera:02d}/data/*"):
                if path.suffix in (".png", ".jpg"):
                    drive = path.parents[2]
                    found.append((drive.parent.name, drive.name, path.stem, camera))
        return sorted(f for f in found if not self.labeled or self._depth(*f) is not None)

    def _listed(self, split: Path) -> list[tuple[str, str, str, int]]:
        try:
            lines = split.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"split {str(split)!r} cannot be read: {error}") from error
        found: list[tuple[str, str, str, int]] = []
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words:
                continue
            if (
                len(words) != 3
                or words[2] not in _SIDES
                or words[0].count("/") != 1
                or not words[1].isdigit()
            ):
                raise InputError(
                    f"split {split}, line {number}: {line!r}, wanted DATE/DRIVE FRAME SIDE such as "
                    "'2011_09_26/2011_09_26_drive_0002_sync 0000000069 l'"
                )
            date, drive = words[0].split("/")
            frame = (date, drive, words[1].zfill(10), _SIDES[words[2]])
            if self._image(*frame) is None:
                raise InputError(
                    f"split {split}, line {number}: the image of {line!r} is not below {self.root}"
                )
            if self.labeled and self._depth(*frame) is None:
                continue  # the annotated maps lack some frames at the ends of each drive
            found.append(frame)
        return found

    def _image(self, date: str, drive: str, frame: str, camera: int) -> Path | None:
        base = self.root / date / drive / f"image_{camera:02d}" / "data"
        return next((p for s in (".png", ".jpg") if is_file(p := base / f"{frame}{s}")), None)

    def _depth(self, date: str, drive: str, frame: str, camera: int) -> Path | None:
        inner = Path(drive, "proj_depth", "groundtruth", f"image_{camera:02d}", f"{frame}.png")
        places = [root / part / inner for root in self.depth_roots for part in ("", date)]
        return next((path for path in places if is_file(path)), None)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        date, drive, frame, side = self.frames[index]
        path = self._image(date, drive, frame, side)
        if path is None:
            raise DataError(f"the image of frame {frame} of {drive} is gone")
        image = read_image(path)
        depth = self._depth(date, drive, frame, side)
        values = np.zeros(image.shape[:2], np.float32) if depth is None else read_depth(depth)
        camera = _camera(
            self.root / date / "calib_cam_to_cam.txt", side, date, image.shape[1], image.shape[0]
        )
        return make_sample(image, values, camera, f"{date}/{drive}/{frame}_{side}")


@lru_cache(maxsize=32)
def _camera(path: Path, side: int, date: str, width: int, height: int) -> Camera:
    from gvdepth.cameras import PRESETS

    preset = f"kitti/{date}" if f"kitti/{date}" in PRESETS else "kitti"
    with naming(path):
        return Camera.from_kitti(path, index=side, width=width, height=height).with_preset(preset)
