"""A plain folder: ``images/``, ``depth/`` and a camera file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusion_core.atomic import PathLike
from fusion_core.errors import InputError, naming
from fusion_core.images import list_images, read_image
from gvdepth.camera import Camera
from gvdepth.data.base import Sample, make_sample, read_depth

_CAMERAS = (".json", ".yaml", ".yml", ".txt", ".toml")


class Folder:
    """Images with depth maps of the same name and one camera file, or one for each image.

    ``ROOT/images/NAME.png|jpg``, ``ROOT/depth/NAME.png|npy``, ``ROOT/camera.json`` (any format that
    :meth:`Camera.load` reads) or ``ROOT/cameras/NAME.json``.

    Args:
        root: the folder.
        camera: instead of the camera file.
        labeled: False takes images without depth, whose maps are then all 0.

    Raises:
        InputError: no images, no camera, or an image without depth; the file is named.
        CameraError: a camera file that cannot be read, or does not say the height.
    """

    def __init__(self, root: PathLike, *, camera: Camera | None = None, labeled: bool = True) -> None:
        self.root = Path(root)
        place = self.root / "images"
        if not place.is_dir():
            raise InputError(f"{self.root} has no folder images/; wanted images/, depth/ and camera.json")
        self.images = list_images([place])
        self.labeled = labeled
        self.depths = [self._depth_of(path) for path in self.images]
        self._camera = camera
        if camera is None and not (self.root / "cameras").is_dir():
            self._camera = self._load(self.root / "camera")

    def _depth_of(self, image: Path) -> Path | None:
        base = self.root / "depth" / image.relative_to(self.root / "images")
        for suffix in (".png", ".npy"):
            if base.with_suffix(suffix).is_file():
                return base.with_suffix(suffix)
        if self.labeled:
            raise InputError(f"{image} has no depth: neither {base.with_suffix('.png')} nor .npy is there")
        return None

    @staticmethod
    def _camera_file(base: Path) -> Path:
        for suffix in _CAMERAS:
            if base.with_suffix(suffix).is_file():
                return base.with_suffix(suffix)
        raise InputError(f"there is no camera file {base}.json (or {', '.join(_CAMERAS[1:])})")

    def __len__(self) -> int:
        return len(self.images)

    def camera(self, index: int) -> Camera:
        """The camera of an image."""
        if self._camera is not None:
            return self._camera
        name = self.images[index].relative_to(self.root / "images")
        return self._load(self.root / "cameras" / name.with_suffix(""))

    def _load(self, base: Path) -> Camera:
        file = self._camera_file(base)
        with naming(file):
            camera = Camera.load(file)
            camera.require_height()
        return camera

    def __getitem__(self, index: int) -> Sample:
        path, depth = self.images[index], self.depths[index]
        image = read_image(path)
        values = np.zeros(image.shape[:2], np.float32) if depth is None else read_depth(depth)
        name = path.relative_to(self.root / "images").with_suffix("").as_posix()
        return make_sample(image, values, self.camera(index), name)
