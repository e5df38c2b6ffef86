"""What to cite: the BibTeX keys of the works that a run used, and their entries.

``citations`` has this module, not one of its own name, because a lazy public name equal to its submodule is
the submodule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusion_core.errors import InputError

# key -> (type, fields); the identifiers are the arXiv number or the ADS bibliographic code.
REFERENCES: dict[str, tuple[str, dict[str, str]]] = {
    "engel2025mantis": (
        "article",
        {
            "author": "Engel, Andrew and Byler, Nell and Tsou, Adam and Narayan, Gautham and Bonilla, "
            "Emmanuel and Smith, Ian",
            "title": "Mantis Shrimp: Exploring Photometric Band Utilization in Computer Vision Networks for "
            "Photometric Redshift Estimation",
            "year": "2025",
            "eprint": "2501.09112",
        },
    ),
    "engel2024preliminary": (
        "article",
        {
            "author": "Engel, Andrew and Narayan, Gautham and Byler, Nell",
            "title": "Preliminary Report on Mantis Shrimp: a Multi-Survey Computer Vision Photometric "
            "Redshift Model",
            "year": "2024",
            "eprint": "2402.03535",
        },
    ),
    "martin2005galex": (
        "article",
        {
            "author": "Martin, D. Christopher and others",
            "title": "The Galaxy Evolution Explorer: A Space Ultraviolet Survey Mission",
            "year": "2005",
            "journal": "ApJ",
            "volume": "619",
            "pages": "L1",
        },
    ),
    "chambers2016panstarrs": (
        "article",
        {
            "author": "Chambers, K. C. and others",
            "title": "The Pan-STARRS1 Surveys",
            "year": "2016",
            "eprint": "1612.05560",
        },
    ),
    "lang2014unwise": (
        "article",
        {
            "author": "Lang, Dustin",
            "title": "unWISE: Unblurred Coadds of the WISE Imaging",
            "year": "2014",
            "journal": "AJ",
            "volume": "147",
            "pages": "108",
        },
    ),
    "chiang2023csfd": (
        "article",
        {
            "author": "Chiang, Yi-Kuan",
            "title": "Corrected SFD: A More Accurate Galactic Dust Map with Minimal Extragalactic "
            "Contamination",
            "year": "2023",
            "journal": "ApJ",
            "volume": "958",
            "pages": "118",
        },
    ),
    "planck2014dust": (
        "article",
        {
            "author": "{Planck Collaboration}",
            "title": "Planck 2013 results. XI. All-sky model of thermal dust emission",
            "year": "2014",
            "journal": "A\\&A",
            "volume": "571",
            "pages": "A11",
        },
    ),
    "walmsley2023zoobot": (
        "article",
        {
            "author": "Walmsley, Mike and others",
            "title": "Zoobot: Adaptable Deep Learning Models for Galaxy Morphology",
            "year": "2023",
            "journal": "JOSS",
            "volume": "8",
            "pages": "5312",
        },
    ),
    "dey2022calpit": (
        "article",
        {
            "author": "Dey, Biprateep and others",
            "title": "Calibrated Predictive Distributions via Diagnostics for Conditional Coverage",
            "year": "2022",
            "eprint": "2205.14568",
        },
    ),
    "saerens2002adjusting": (
        "article",
        {
            "author": "Saerens, Marco and Latinne, Patrice and Decaestecker, Christine",
            "title": "Adjusting the Outputs of a Classifier to New a Priori Probabilities: A Simple "
            "Procedure",
            "year": "2002",
            "journal": "Neural Computation",
            "volume": "14",
            "pages": "21",
        },
    ),
}

_PAPERS = ("engel2025mantis", "engel2024preliminary")
_SURVEYS = {"galex": "martin2005galex", "ps1": "chambers2016panstarrs", "unwise": "lang2014unwise"}
_DUST = {"csfd": "chiang2023csfd", "planck": "planck2014dust"}


def citations(used: Any = None) -> list[str]:
    """The BibTeX keys of what a run really used, the two papers first.

    Args:
        used: None for the papers alone; a result with a ``provenance``, that provenance, or words: names of
            surveys (``galex``, ``ps1``, ``unwise``), dust maps (``csfd``, ``planck``), ``zoobot`` for
            encoders that started from its weights, ``calpit`` and ``prior`` for those corrections.

    Returns:
        Keys of :data:`REFERENCES`, without repeats. :func:`bibtex` gives their entries.

    Raises:
        InputError: ``used`` is none of these.

    Example:
        >>> citations(["ps1", "calpit"])
        ['engel2025mantis', 'engel2024preliminary', 'chambers2016panstarrs', 'dey2022calpit']
    """
    words = _words(used)
    table = {
        **_SURVEYS,
        **_DUST,
        "zoobot": "walmsley2023zoobot",
        "calpit": "dey2022calpit",
        "prior": "saerens2002adjusting",
    }
    return list(dict.fromkeys([*_PAPERS, *(table[word] for word in words if word in table)]))


def _words(used: Any) -> list[str]:
    if used is None:
        return []
    provenance = getattr(used, "provenance", used)
    if isinstance(provenance, Mapping):
        return list(provenance.get("uses", ()))
    if isinstance(provenance, str) or not isinstance(provenance, Iterable):
        raise InputError(f"used is {used!r}, wanted a result, its provenance or a list of words")
    return [str(word) for word in provenance]


def bibtex(keys: Iterable[str]) -> str:
    """The BibTeX entries of some keys.

    Raises:
        InputError: an unknown key.

    Example:
        >>> print(bibtex(["lang2014unwise"]).splitlines()[0])
        @article{lang2014unwise,
    """
    entries: list[str] = []
    for key in keys:
        if key not in REFERENCES:
            raise InputError(f"{key!r} is no key of REFERENCES, wanted some of {', '.join(REFERENCES)}")
        kind, fields = REFERENCES[key]
        if "eprint" in fields:
            fields = {**fields, "archivePrefix": "arXiv"}
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        entries.append("\n".join([f"@{kind}{{{key},", *lines, "}"]))
    return "\n".join(entries)
