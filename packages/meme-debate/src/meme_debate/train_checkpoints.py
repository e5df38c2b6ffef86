"""Train the judges that the quick demo ships: ``python -m meme_debate.train_checkpoints --out DIR``.

About two minutes on two cores. Memes and debates are the demo's own for seed 0; each of three seeds has its
own debates, initialisation and order.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .experiment import train_seeds
from .shipped import FOLDER, checkpoint, save_judges
from .stand_in_work import SCALES, Worker


def main() -> None:
    """Train and write one file a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    scale = SCALES["quick"]
    with tempfile.TemporaryDirectory() as place, Worker(Path(place), scale, range(scale.seeds)) as worker:
        for seed, judges in train_seeds(worker).items():
            save_judges(judges, out / checkpoint(seed).name)


if __name__ == "__main__":
    main()
