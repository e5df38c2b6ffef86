"""Which commands write and which files they read, package by package."""

from __future__ import annotations

import importlib
from typing import Any

PACKAGES = (
    "kd_trilateral",
    "logit_fusion",
    "fusechat",
    "ot_fusion",
    "dbnet_asf",
    "adaea",
    "gvdepth",
    "mantis_photoz",
    "meme_debate",
    "workspace",
)
_LISTS = {"kill": "COMMANDS", "garbage": "READERS", "load": "SERVERS"}


def of(verb: str) -> list[Any]:
    """The cases of ``kill``, ``garbage`` or ``load``."""
    tables = (importlib.import_module(f"faults.cases.{name}") for name in PACKAGES)
    return [case for table in tables for case in getattr(table, _LISTS[verb], [])]
