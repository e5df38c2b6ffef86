"""Commands and readers of mantis-photoz."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "mantis_photoz.cli:main"
PROVENANCE = (rb'"(?:[a-z_]*seconds|[a-z_]*time|objects_per_s|network_share|peak[a-z_]*)": [^\n]+',)
FORMATS = {"csv": "ascii.csv", "fits": "fits", "parquet": "parquet", "vot": "votable"}


def inputs(place: Path) -> None:
    """Simulated galaxies, catalogues of every format, a tiny model, recalibrations, a prior, densities."""
    import torch
    from astropy.table import Table

    from mantis_photoz.config import EARLY, FusionConfig, TrainConfig
    from mantis_photoz.fusion import FusionModel
    from mantis_photoz.simulate import model_inputs

    do(MAIN, "simulate", "12", "--out", place / "sky", "--seed", "1", "-q")
    catalog = Table.read(place / "sky" / "catalog.ecsv")
    for suffix, form in FORMATS.items():
        catalog.write(place / f"catalog.{suffix}", format=form)
    tiny = FusionConfig(
        inputs=model_inputs(),
        encoders={EARLY: "small-4"},
        bins=24,
        z_max=1.2,
        hidden=16,
        size=32,
        align="wcs",
        scaling="noise",
    )
    torch.manual_seed(0)
    FusionModel(tiny).eval().save_pretrained(place / "model")
    TrainConfig(
        model=tiny, epochs=2, batch_size=4, optimizer="adamw", schedule="constant", sampler="natural"
    ).save(place / "train.toml")
    do(
        MAIN,
        "calibrate",
        *SKY,
        "--cutouts",
        place / "sky",
        "--model",
        place / "model",
        "--device",
        "cpu",
        "-q",
        "--out",
        place / "mend.json",
        at=place,
    )
    do(
        MAIN,
        "pack",
        place / "sky" / "catalog.ecsv",
        "--cutouts",
        place / "sky",
        "--model",
        place / "model",
        "--out",
        place / "packed.h5",
        "-q",
    )
    do(MAIN, *ESTIMATE, "--out", place / "z.ecsv", "--pdf", place / "z.hdf5", at=place)
    (place / "prior.json").write_text(json.dumps({"z": [0, 0.4, 1.2], "n": [1, 1, 0]}))
    (place / "prior.csv").write_text("z,n\n0,1\n0.4,1\n1.2,0\n")


def official(place: Path) -> None:
    """A checkpoint under the authors' names."""
    import torch

    from mantis_photoz.config import EARLY, FusionConfig
    from mantis_photoz.convert import to_official
    from mantis_photoz.training import new_model

    model: Any = new_model(
        FusionConfig.official("early", encoders={EARLY: "convnext_atto"}, bins=8, hidden=6), 0
    )
    torch.save(to_official(model.state_dict(), model.config), place / "best_early.pt")


SKY = ("{in}/sky/catalog.ecsv",)
MODEL = ("--model", "{in}/model", "--device", "cpu", "-q")
ESTIMATE = ("estimate", *SKY, "--cutouts", "{in}/sky", "--batch-size", "3", *MODEL)
TRAIN = (
    "train",
    "{in}/train.toml",
    "--catalog",
    *SKY,
    "--cutouts",
    "{in}/sky",
    "--device",
    "cpu",
    "-q",
    "--out",
    "run",
)
FETCH = (
    "fetch",
    *SKY,
    "--limit",
    "2",
    "--out",
    "cutouts",
    "--rate",
    "1000",
    "--retries",
    "1",
    "--cache",
    "cache",
    "-q",
    "--service",
    "viewer={url}/viewer",
    "--service",
    "ps1names={url}/names",
    "--service",
    "ps1cut={url}/cut",
)


def services() -> Any:
    """The services that fetch asks, on this machine."""
    import numpy as np
    from astropy.io import fits

    from fusion_core.testing.server import Reply
    from mantis_photoz.wcs import Tan

    def image(query: dict[str, str], planes: int) -> bytes:
        size, scale = int(query["size"]), float(query.get("pixscale", 0.25))
        tan = Tan.centered(float(query["ra"]), float(query["dec"]), pixels=size, scale=scale)
        header = fits.Header({**tan.cards(), "EXPTIME": 40.0})
        if planes > 1:
            header["BANDS"] = {"galex": "nf"}.get(query["layer"], "12")
        else:
            header["HIERARCH FPA.FILTER"] = f"{query['red'][-6]}.00000"
        data, buffer = np.full((planes, size, size), float(query["ra"]), np.float32), io.BytesIO()
        fits.PrimaryHDU(data[0] if planes == 1 else data, header).writeto(buffer)
        return buffer.getvalue()

    def answer(request: Any) -> Any:
        parts = urlsplit(request.path)
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        if parts.path != "/names":
            return Reply(body=image(query, 1 if parts.path == "/cut" else 2), content_type="image/fits")
        found = re.search(rb"text/plain\r\n\r\n(.*?)\r\n--", request.body, re.DOTALL)
        rows = ["projcell subcell ra dec filter mjd type filename shortname badflag"]
        for line in found[1].decode().splitlines() if found else ():
            ra, dec = line.split()
            number = int(float(ra) * 1e6)  # of the position, whatever else is asked
            rows += [f"{number} 07 {ra} {dec} {b} 0 stack /rings/{number}.{b}.fits x 0" for b in "grizy"]
        return Reply(body="\n".join(rows), content_type="text/plain")

    return answer


COMMANDS = [
    *(
        Command(
            name=f"mantis-photoz estimate ({suffix})",
            main=MAIN,
            make=inputs,
            again=("--resume",),
            argv=(*ESTIMATE, "--out", f"z.{suffix}", "--pdf", "z.hdf5"),
            volatile={"provenance": PROVENANCE},
        )
        for suffix in ("ecsv", "fits", "parquet")
    ),
    Command(
        name="mantis-photoz fetch",
        main=MAIN,
        make=inputs,
        argv=FETCH,
        again=("--resume",),
        serve=services,
        # Lines as they come; and the cache lacks what was already in its place when the run was killed.
        ignore=r"(^|/)cache/|manifest\.jsonl$",
    ),
    Command(
        name="mantis-photoz pack",
        main=MAIN,
        make=inputs,
        look=("inspect", "packed.h5", "--json"),
        argv=("pack", *SKY, "--cutouts", "{in}/sky", "--model", "{in}/model", "--out", "packed.h5", "-q"),
    ),
    Command(
        name="mantis-photoz evaluate",
        main=MAIN,
        make=inputs,
        argv=("evaluate", *SKY, "--cutouts", "{in}/sky", *MODEL, "--out", "page"),
    ),
    *(
        Command(
            name=f"mantis-photoz calibrate ({kind})",
            main=MAIN,
            make=inputs,
            argv=(
                "calibrate",
                *SKY,
                "--cutouts",
                "{in}/sky",
                *MODEL,
                "--kind",
                kind,
                "--out",
                f"mend.{suffix}",
            ),
        )
        for kind, suffix in (("temperature,pit", "json"), ("calpit", "safetensors"))
    ),
    Command(
        name="mantis-photoz explain",
        main=MAIN,
        make=inputs,
        argv=("explain", *SKY, "--cutouts", "{in}/sky", *MODEL, "--out", "use"),
    ),
    Command(
        name="mantis-photoz train",
        main=MAIN,
        make=inputs,
        argv=TRAIN,
        again=("--resume",),
        look=("estimate", *SKY, "--cutouts", "{in}/sky", "--model", "run", "--device", "cpu", "-q"),
    ),
    Command(
        name="mantis-photoz simulate",
        main=MAIN,
        make=inputs,
        argv=("simulate", "4", "--out", "sky", "-q"),
        together=True,
    ),
    Command(
        name="mantis-photoz simulate --overwrite",
        main=MAIN,
        make=inputs,
        before=("simulate", "3", "--seed", "5", "--out", "sky", "-q"),
        argv=("simulate", "4", "--out", "sky", "--overwrite", "-q"),
    ),
    Command(
        name="mantis-photoz convert",
        main=MAIN,
        make=official,
        argv=("convert", "{in}/best_early.pt", "--out", "model"),
        together=True,
        look=("inspect", "model", "--json"),
    ),
    bench("mantis-photoz"),
    demo("mantis-photoz"),
]


def _reader(name: str, argv: tuple[str, ...], file: str, kind: str, *named: str) -> Reader:
    return Reader(
        name=f"mantis-photoz {name}", main=MAIN, make=inputs, argv=argv, file=file, kind=kind, named=named
    )


def _catalog(suffix: str, kind: str) -> Reader:
    argv = ("estimate", f"{{in}}/catalog.{suffix}", *ESTIMATE[2:], "--limit", "3")
    return _reader(
        f"estimate CATALOG ({suffix})", argv, f"catalog.{suffix}", kind, "row ", "column", "catalogue"
    )


FIRST = (*ESTIMATE, "--limit", "2")
PACKED = ("estimate", *SKY, "--cutouts", "{in}/packed.h5", *MODEL, "--limit", "3")

READERS = [
    _catalog("csv", "fields"),
    _catalog("fits", "fits table"),
    _catalog("parquet", "parquet"),
    _catalog("vot", "votable"),
    _reader(
        "estimate CATALOG (ecsv)",
        (*ESTIMATE, "--limit", "3"),
        "sky/catalog.ecsv",
        "ecsv",
        "row ",
        "column",
        "catalogue",
    ),
    _reader("estimate --cutouts (FITS)", FIRST, "sky/sim1-000000.ps1.fits", "fits"),
    _reader("estimate --cutouts (HDF5)", PACKED, "packed.h5", "hdf5"),
    _reader("inspect FITS", ("inspect", "{in}/sky/sim1-000000.ps1.fits"), "sky/sim1-000000.ps1.fits", "fits"),
    _reader("inspect HDF5", ("inspect", "{in}/packed.h5"), "packed.h5", "hdf5"),
    _reader("inspect config.json", ("inspect", "{in}/model"), "model/config.json", "json", "model"),
    _reader("estimate model.safetensors", FIRST, "model/model.safetensors", "safetensors", "model"),
    _reader("estimate --recalibrate", (*FIRST, "--recalibrate", "{in}/mend.json"), "mend.json", "json"),
    _reader("estimate --prior (JSON)", (*FIRST, "--prior", "{in}/prior.json"), "prior.json", "json"),
    _reader("estimate --prior (CSV)", (*FIRST, "--prior", "{in}/prior.csv"), "prior.csv", "fields"),
    _reader("evaluate --pdf", ("evaluate", *SKY, "--pdf", "{in}/z.hdf5", "-q"), "z.hdf5", "hdf5"),
    _reader("train CONFIG", (*TRAIN, "--set", "epochs=1"), "train.toml", "toml", "z_max"),
    Reader(
        name="mantis-photoz convert CHECKPOINT",
        main=MAIN,
        make=official,
        kind="pickle",
        file="best_early.pt",
        argv=("convert", "{in}/best_early.pt", "--out", "model"),
    ),
]
