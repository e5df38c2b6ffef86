"""Readers: every one yields :class:`Sample` (image, depth, valid, camera, id)."""

from gvdepth.data.base import Sample, Samples, Subset, open_data, read_depth, write_depth
from gvdepth.data.folder import Folder
from gvdepth.data.kitti import KITTI
from gvdepth.data.simulated import RIGS, Simulated, write_frames

__all__ = [
    "KITTI",
    "RIGS",
    "Folder",
    "Sample",
    "Samples",
    "Simulated",
    "Subset",
    "open_data",
    "read_depth",
    "write_depth",
    "write_frames",
]
