"""Simulated driving: a street of boxes on level ground, seen by any rig, with exact depth.

The world has Y down and the ground at Y = 0; the camera stands at (0, -camera_height, 0) and is turned by
``Rx(pitch) Rz(roll)``. A pixel's ray has z = 1 in camera axes, so the ray parameter of a hit IS its depth.
Rendering is NumPy; every image follows from ``(seed, index)`` alone, so one street can be seen by several
cameras.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import check_range
from gvdepth.camera import Camera

Array = NDArray[np.float64]

SKY, ROAD, SHOULDER, BUILDING, POLE, VEHICLE, PEDESTRIAN = range(7)
"""What a pixel shows, in :attr:`Frame.labels`."""

FAR = 95.0
ROAD_HALF_WIDTH = 7.0
_LANES, _LANE_PROBS = (-3.6, 0.0, 3.6), (0.4, 0.25, 0.35)
_BEHIND = 0.3  # boxes that end nearer than this are not drawn
_PAIRS = 1 << 20  # ray-box pairs at once: bounds the memory
_SHADES = np.array([0.75, 1.0, 0.9])  # of the faces across X, Y and Z


@dataclass(frozen=True, slots=True)
class Scene:
    """A street: boxes that stand on the ground.

    Args:
        boxes: (boxes, 6), metres: x0, x1, y0, y1, z0, z1 in world axes; y1 is 0.
        colors: (boxes, 3) in [0, 1].
        kinds: (boxes,), of :data:`BUILDING` ... :data:`PEDESTRIAN`.
        seed: of the street.
        index: of the street.
    """

    boxes: Array
    colors: Array
    kinds: NDArray[np.int64]
    seed: int
    index: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a street with its exact depth.

    Args:
        image: (H, W, 3) uint8 RGB.
        depth: (H, W) float64, metres along the optical axis; 0 where there is sky.
        labels: (H, W) uint8, what each pixel shows.
        camera: who looked.
        id: ``"SEED-INDEX"``.
    """

    image: NDArray[np.uint8]
    depth: Array
    labels: NDArray[np.uint8]
    camera: Camera
    id: str

    @property
    def ground(self) -> NDArray[np.bool_]:
        """(H, W), where the ground plane is seen: road and shoulder."""
        return (self.labels == ROAD) | (self.labels == SHOULDER)


def _boxes(x: Array, z: Array, size: Array) -> Array:
    """Boxes from centres in X, near faces in Z, and (width, height, length)."""
    zero = np.zeros(len(x))
    return np.stack([x - size[:, 0] / 2, x + size[:, 0] / 2, -size[:, 1], zero, z, z + size[:, 2]], axis=1)


def _row(rng: np.random.Generator, side: float, size: float) -> Array:
    """A row of buildings on one side of the street."""
    count = 24  # 8 m each at the least: 24 always reach FAR
    length = rng.uniform(8.0, 20.0, count) * size
    gap = rng.uniform(0.0, 6.0, count)
    start = -10.0 + np.cumsum(length + gap) - length - gap
    setback = rng.uniform(7.5, 13.0) + rng.uniform(0.0, 2.0, count)
    height = rng.uniform(3.5, 11.0, count) * size
    there = (rng.random(count) < 0.8) & (start < FAR)
    depth = np.full(count, 8.0 * size)
    boxes = _boxes(side * (setback + depth / 2), start, np.stack([depth, height, length], axis=1))
    return boxes[there]


def _poles(rng: np.random.Generator, side: float, size: float) -> Array:
    """Poles along one side of the street."""
    z = np.cumsum(rng.uniform(10.0, 25.0, 10)) - 5.0
    x = side * rng.uniform(5.0, 7.0, 10)
    height = rng.uniform(4.0, 6.0, 10) * size
    thick = np.full(10, 0.22 * size)
    return _boxes(x, z, np.stack([thick, height, thick], axis=1))[z < FAR]


def make_scene(seed: int = 0, index: int = 0, *, object_size: float = 1.0) -> Scene:
    """A street with buildings, poles, vehicles and pedestrians.

    Args:
        seed: of the series of streets.
        index: number of the street in it.
        object_size: multiplies the sizes of all objects ("another country"), in (0, 5].

    Raises:
        ConfigError: ``object_size`` out of range.

    Example:
        >>> len(make_scene(0, 3).boxes) > 10
        True
    """
    check_range("object_size", object_size, 0.0, 5.0)
    check_range("object_size", object_size, 0.0, float("inf"), open=True)
    rng = np.random.default_rng([seed, index])
    parts: list[tuple[int, Array]] = []
    for side in (-1.0, 1.0):
        parts += [(BUILDING, _row(rng, side, object_size)), (POLE, _poles(rng, side, object_size))]
    count = int(rng.integers(4, 10))
    car = rng.random(count) < 0.82
    sizes = np.where(
        car[:, None],
        np.array([1.8, 1.5, 4.3]) + rng.normal(size=(count, 3)) * np.array([0.08, 0.08, 0.3]),
        np.array([2.45, 3.1, 7.5]),
    )
    lane = rng.choice(_LANES, count, p=_LANE_PROBS) + rng.normal(scale=0.3, size=count)
    z = np.exp(rng.uniform(np.log(5.0), np.log(65.0), count))
    parts.append((VEHICLE, _boxes(lane, z, sizes * object_size)))
    count = int(rng.integers(1, 5))
    place = rng.uniform(-ROAD_HALF_WIDTH, ROAD_HALF_WIDTH, count)
    z = np.exp(rng.uniform(np.log(5.0), np.log(40.0), count))
    parts.append((PEDESTRIAN, _boxes(place, z, np.tile([0.55, 1.72, 0.4], (count, 1)) * object_size)))
    boxes = np.concatenate([part for _, part in parts])
    kinds = np.repeat([kind for kind, _ in parts], [len(part) for _, part in parts])
    colors = rng.uniform(0.15, 0.95, (len(boxes), 3))
    return Scene(boxes, colors, kinds, seed, index)


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Rays of a grid of pixels in world axes, and what they hit first."""

    rays: Array  # (3, H*W)
    depth: Array  # (H*W,), inf = nothing
    box: NDArray[np.int64]  # (H*W,), -1 = none
    face: NDArray[np.int64]  # (H*W,), axis across the face that was hit


def _trace(scene: Scene, camera: Camera, scale: int) -> _Pixels:
    """The first hit of every pixel; ``scale`` refines the grid, centres as ``Camera.resize`` puts them."""
    rows, columns = camera.height * scale, camera.width * scale
    u = ((np.arange(columns) + 0.5) / scale - 0.5 - camera.cx) / camera.fx
    v = ((np.arange(rows) + 0.5) / scale - 0.5 - camera.cy) / camera.fy
    turn = camera.rotation
    grid = turn[:, :1, None] * u + (turn[:, 1:2, None] * v[:, None]) + turn[:, 2:, None]
    rays = grid.reshape(3, -1)
    up = camera.require_height()
    with np.errstate(divide="ignore"):
        depth = np.where(rays[1] > 0, up / np.where(rays[1] > 0, rays[1], 1.0), np.inf)
    box = np.full(rays.shape[1], -1)
    face = np.ones(rays.shape[1], np.int64)
    found = _Pixels(rays, depth, box, face)
    chosen, rectangles = _rectangles(scene.boxes, camera, turn, rows, columns, scale)
    area = rectangles[:, 2] * rectangles[:, 3]
    groups = np.cumsum(area) // _PAIRS
    for group in np.unique(groups):  # one group, unless the image is large
        here = groups == group
        _hit(found, scene.boxes, chosen[here], rectangles[here], columns, up)
    return found


def _rectangles(
    boxes: Array, camera: Camera, turn: Array, rows: int, columns: int, scale: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The boxes in view, nearest last, and the pixels each may cover: row, column, height, width."""
    corners = np.stack(
        [boxes[:, [i, 2 + j, 4 + k]] for i in (0, 1) for j in (0, 1) for k in (0, 1)], axis=1
    ) + np.array([0.0, camera.require_height(), 0.0])
    seen = corners @ turn  # camera axes: the transpose of `turn` from the left
    z = seen[..., 2]
    front = z.max(axis=1) > _BEHIND
    whole = z.min(axis=1) <= _BEHIND
    safe = np.maximum(z, 1e-3)
    u = (camera.fx * seen[..., 0] / safe + camera.cx + 0.5) * scale - 0.5
    v = (camera.fy * seen[..., 1] / safe + camera.cy + 0.5) * scale - 0.5
    low_u, high_u = np.where(whole, 0, np.floor(u.min(1))), np.where(whole, columns, np.ceil(u.max(1)) + 1)
    low_v, high_v = np.where(whole, 0, np.floor(v.min(1))), np.where(whole, rows, np.ceil(v.max(1)) + 1)
    low_u, high_u = np.clip(low_u, 0, columns), np.clip(high_u, 0, columns)
    low_v, high_v = np.clip(low_v, 0, rows), np.clip(high_v, 0, rows)
    rectangle = np.stack([low_v, low_u, high_v - low_v, high_u - low_u], axis=1).astype(np.int64)
    keep = np.flatnonzero(front & (rectangle[:, 2] > 0) & (rectangle[:, 3] > 0))
    return keep, rectangle[keep]


def _hit(
    found: _Pixels,
    boxes: Array,
    chosen: NDArray[np.int64],
    rectangles: NDArray[np.int64],
    columns: int,
    camera_height: float,
) -> None:
    """Intersect boxes with the rays of their rectangles (slabs) and keep what is nearer than before."""
    area = rectangles[:, 2] * rectangles[:, 3]
    which = np.repeat(np.arange(len(chosen)), area)
    inside = np.arange(area.sum()) - np.repeat(np.cumsum(area) - area, area)
    top, left, _, wide = rectangles[which].T
    pixel = (top + inside // wide) * columns + left + inside % wide
    pair = chosen[which]
    origin = (0.0, -camera_height, 0.0)
    near = np.full(len(pair), -np.inf)
    far = np.full(len(pair), np.inf)
    face = np.zeros(len(pair), np.int64)
    for axis in range(3):
        ray = found.rays[axis, pixel]
        ray = np.where(ray == 0, 1e-300, ray)
        with np.errstate(over="ignore"):
            one = (boxes[pair, 2 * axis] - origin[axis]) / ray
            two = (boxes[pair, 2 * axis + 1] - origin[axis]) / ray
        first = np.minimum(one, two)
        face = np.where(first > near, axis, face)
        near = np.maximum(near, first)
        far = np.minimum(far, np.maximum(one, two))
    keep = np.flatnonzero((near < far) & (near > 0) & (near < found.depth[pixel]))
    keep = keep[np.argsort(-near[keep], kind="stable")]  # of repeated indices the last assignment stays
    place = pixel[keep]
    found.depth[place], found.box[place], found.face[place] = near[keep], pair[keep], face[keep]


def _hash(x: NDArray[np.int64], z: NDArray[np.int64], salt: int) -> Array:
    """Uniform numbers in [0, 1) that depend on two integers and a salt."""
    wrap = np.uint64(0xFFFFFFFF)
    h = (x.astype(np.uint64) * np.uint64(374761393) + z.astype(np.uint64) * np.uint64(668265263)) & wrap
    h = (h + np.uint64(salt * 2246822519 & 0xFFFFFFFF)) & wrap
    h = ((h ^ (h >> np.uint64(13))) * np.uint64(1274126177)) & wrap
    return (h ^ (h >> np.uint64(16))).astype(np.float64) / 2**32


def value_noise(x: Array, z: Array, cell: float, salt: int) -> Array:
    """Smooth noise in [0, 1) over the plane: hashed values on a lattice, joined bilinearly.

    Args:
        x: metres, any shape.
        z: metres, the same shape.
        cell: metres between lattice points.
        salt: another gives another noise.
    """
    column, row = np.floor(x / cell), np.floor(z / cell)
    a, b = x / cell - column, z / cell - row
    i, j = column.astype(np.int64), row.astype(np.int64)
    near = _hash(i, j, salt) * (1 - a) + _hash(i + 1, j, salt) * a
    beyond = _hash(i, j + 1, salt) * (1 - a) + _hash(i + 1, j + 1, salt) * a
    return near * (1 - b) + beyond * b


def _ground_color(x: Array, z: Array, salt: int) -> Array:
    """(pixels, 3): asphalt, shoulder, dashed and solid marks."""
    grain = 0.5 * value_noise(x, z, 0.35, salt) + 0.5 * value_noise(x, z, 2.0, salt + 1)
    side = np.abs(x)
    road = side <= ROAD_HALF_WIDTH
    tone = np.where(road[:, None], np.array([0.32, 0.32, 0.34]), np.array([0.42, 0.44, 0.30]))
    color = tone * (0.7 + 0.6 * grain[:, None])
    dashed = (np.abs(side - 1.8) < 0.08) & (np.mod(z, 9.0) < 3.0)
    solid = np.abs(side - 5.4) < 0.08
    color[dashed | solid] = 0.92
    return color


def _color(scene: Scene, camera: Camera, pixels: _Pixels) -> Array:
    """(pixels, 3) in [0, 1], without pixel noise."""
    rays = pixels.rays
    angle = np.arcsin(np.clip(-rays[1] / np.sqrt((rays**2).sum(0)), 0.0, 1.0))
    tone = np.clip(angle / 0.6, 0.0, 1.0)[:, None]
    color = np.array([0.82, 0.88, 0.95]) * (1 - tone) + np.array([0.35, 0.55, 0.85]) * tone
    ground = np.flatnonzero(np.isfinite(pixels.depth) & (pixels.box < 0))
    x, z = rays[0, ground] * pixels.depth[ground], rays[2, ground] * pixels.depth[ground]
    salt = (scene.seed * 7919 + scene.index * 104729) & 0xFFFF
    color[ground] = _ground_color(np.clip(x, -1e5, 1e5), np.clip(z, -1e5, 1e5), salt)
    solid = np.flatnonzero(pixels.box >= 0)
    place = rays[:, solid] * pixels.depth[solid]
    above = camera.require_height() - place[1]
    cells = np.floor(place / 0.5 + 0.123).sum(0)
    shade = _SHADES[pixels.face[solid]] * np.where(np.mod(cells, 2) == 0, 1.0, 0.8)
    color[solid] = scene.colors[pixels.box[solid]] * (shade * np.where(above < 0.25, 0.3, 1.0))[:, None]
    return color


def render(scene: Scene, camera: Camera, *, supersample: int = 1, noise: float = 0.02) -> Frame:
    """See a street through a camera.

    Args:
        scene: the street.
        camera: any rig: focal lengths, principal point, size, height, pitch and roll.
        supersample: colours are means of n x n rays; the depth is always that of the pixel's centre, exact.
        noise: standard deviation of the pixel noise, of [0, 1].

    Raises:
        ConfigError: ``supersample`` or ``noise`` out of range.
        CameraError: the camera's height is not known.

    Example:
        >>> from gvdepth import Camera
        >>> camera = Camera(fx=75, fy=75, cx=59.5, cy=21.4, width=120, height=48, camera_height=1.65)
        >>> frame = render(make_scene(0, 0), camera)
        >>> frame.image.shape, frame.depth.dtype.name
        ((48, 120, 3), 'float64')
    """
    check_range("supersample", supersample, 1, 8)
    check_range("noise", noise, 0.0, 1.0)
    rows, columns = camera.height, camera.width
    centers = _trace(scene, camera, 1)
    fine = centers if supersample == 1 else _trace(scene, camera, supersample)
    color = _color(scene, camera, fine).reshape(rows, supersample, columns, supersample, 3).mean((1, 3))
    rng = np.random.default_rng([scene.seed, scene.index, 1])
    color = color + rng.normal(scale=noise, size=color.shape) if noise else color
    image = (np.clip(color, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    depth = np.where(np.isfinite(centers.depth), centers.depth, 0.0)
    kinds = np.append(scene.kinds, SKY)[centers.box]
    across = np.abs(centers.rays[0] * depth)
    ground = np.where(across <= ROAD_HALF_WIDTH, ROAD, SHOULDER)
    kinds = np.where((depth > 0) & (centers.box < 0), ground, kinds)
    return Frame(
        image,
        depth.reshape(rows, columns),
        kinds.reshape(rows, columns).astype(np.uint8),
        camera,
        f"{scene.seed}-{scene.index:05d}",
    )


def simulate(
    camera: Camera,
    count: int,
    *,
    seed: int = 0,
    start: int = 0,
    object_size: float = 1.0,
    supersample: int = 1,
    noise: float = 0.02,
) -> Iterator[Frame]:
    """Frames of one camera in ``count`` different streets.

    Args:
        camera: the rig.
        count: how many frames.
        seed: of the streets; a frame depends on ``seed`` and its index only.
        start: index of the first.
        object_size: see :func:`make_scene`.
        supersample: see :func:`render`.
        noise: see :func:`render`.
    """
    for index in range(start, start + count):
        yield render(
            make_scene(seed, index, object_size=object_size), camera, supersample=supersample, noise=noise
        )
