"""Cameras as section 8 draws them: f in [50, 3000], pitch within 20 degrees, roll 10, height in [0.2, 4]."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from gvdepth import Camera

TINY = {"allow_nan": False, "allow_infinity": False}


def floats(low, high):
    return st.floats(low, high, allow_subnormal=False, **TINY)


@st.composite
def cameras(draw, *, roll=True, pitch=True, road=False, sizes=(16, 96)):
    """Any camera; with ``road`` the horizon lies well above the last row."""
    width, height = draw(st.integers(*sizes)), draw(st.integers(*sizes))
    numbers = {
        "fx": draw(floats(50.0, 3000.0)),
        "fy": draw(floats(50.0, 3000.0)),
        "cx": draw(floats(-0.5, 1.5)) * width,
        "cy": draw(floats(-0.5, 1.5)) * height,
        "camera_height": draw(floats(0.2, 4.0)),
        "pitch_deg": draw(floats(-20.0, 20.0)) if pitch else 0.0,
        "roll_deg": draw(floats(-10.0, 10.0)) if roll else 0.0,
    }
    if road:
        # The principal point follows the pitch, so that the horizon runs through the middle of the image.
        pitch_deg, roll_deg = numbers["pitch_deg"] / 10, numbers["roll_deg"]
        numbers |= {"pitch_deg": pitch_deg, "cx": width / 2, "fx": max(numbers["fx"], 4.0 * width)}
        horizon = height * draw(floats(0.1, 0.6))
        shift = numbers["fy"] * math.tan(math.radians(pitch_deg)) / math.cos(math.radians(roll_deg))
        numbers["cy"] = min(max(horizon - shift, -1.9 * height), 2.9 * height)
    return Camera.exact(width=width, height=height, **numbers)


def double(x):
    return torch.as_tensor(x, dtype=torch.float64)


CAMERA = {
    "fx": 300.0, "fy": 310.0, "cx": 159.5, "cy": 60.0, "width": 320, "height": 200, "camera_height": 1.6,
    "pitch_deg": -0.5, "roll_deg": 1.5,
}  # fmt: skip
