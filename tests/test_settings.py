"""No number in the settings of the nine packages is without end: a wrong one is told where it is read."""

import copy
import importlib
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from workspace import packages

from fusion_core.config import Config
from fusion_core.errors import ConfigError

pytestmark = pytest.mark.slow

WRONG = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 2**64, -(2**64), 10**400)
ENDLESS = {
    ("logit_fusion.config.FusionConfig", "max_kl"): "the shift is not bounded",
    ("ot_fusion.config.FusionConfig", "reg_m"): "transport is balanced",
}
"""Fields that may be infinite, and what that means."""
REQUIRED: dict[str, dict[str, Any]] = {
    "mantis_photoz.config.SurveyInput": {"bands": 1, "pixels": 8, "pixel_scale": 0.5},
    "logit_fusion.config.MemberConfig": {"source": "folder"},
}
"""Values of the fields without default."""


def _classes() -> Iterator[str]:
    for member in packages():
        for file in sorted(member.source.rglob("*.py")):
            module = ".".join(file.relative_to(member.source.parent).with_suffix("").parts)
            found = re.findall(r"^class (\w+)\((?:Base)?Config\):", file.read_text(encoding="utf-8"), re.M)
            yield from (f"{module}.{name}" for name in found)


CLASSES = sorted(_classes())


def _class(name: str) -> type[Config]:
    module, _, found = name.rpartition(".")
    return getattr(importlib.import_module(module), found)


def _numbers(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:2]):
            yield from _numbers(inner, (*here, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield here


def _with(settings: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(settings)
    node = made
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return made


def test_the_classes_are_found():
    assert len(CLASSES) >= 20
    assert {place for place, _ in ENDLESS} | set(REQUIRED) <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_number_without_end_is_refused(name):
    kind = _class(name)
    settings = kind(**REQUIRED.get(name, {})).to_dict()
    optional = [
        (field,)
        for field, hint in get_type_hints(kind).items()
        if settings.get(field, 0) is None and {int, float} & set(get_args(hint))
    ]
    taken = {}
    for place in [*_numbers(settings), *optional]:
        for value in WRONG:
            try:
                kind.from_dict(_with(settings, place, value))
            except ConfigError:
                continue
            taken.setdefault(".".join(map(str, place)), []).append(str(value)[:8])
    endless = {field for place, field in ENDLESS if place == name}
    assert set(taken) == endless, taken
    assert not any("nan" in values for values in taken.values())
