"""Table of the PCA baseline, with as many components as an SAE has active latents. Does not import torch."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from saegrid.config.grid import Grid
from saegrid.errors import DamagedError, ResultsError
from saegrid.storage.checksums import check_sums, read_sealed

FILE = "results_baselines.csv"
COMPONENTS = (16, 32, 64, 128, 256)
MEASURES = ["fvu", "fvu_no_sink", "kl", "delta_loss", "frac_rec_pct", "loss_recovered_mean", "loss_recovered_zero"]
COLUMNS = ["store_id", "components", *MEASURES]


def load(grid: Grid, root: str | Path = ".") -> pd.DataFrame:
    """The `pca.json` records of all stores of a grid; none for a store without that file.

    Raises `ResultsError` for a damaged file or one of an older version.
    """
    folders = {run.store_id: Path(root) / run.store_dir / run.store_id for run in grid.runs()}
    records = []
    for path in (folder / "pca.json" for folder in folders.values()):
        try:
            made = read_sealed(path)["records"] if path.exists() else []
            records += [{name: record[name] for name in COLUMNS} for record in made]
        except DamagedError as error:
            raise ResultsError(f"{error}; delete the file, and it is made again") from None
        except KeyError as error:
            raise ResultsError(
                f"{path}: made by an older version (no {error}); delete it, and it is made again"
            ) from None
    return pd.DataFrame(records, columns=COLUMNS)


def read(results_dir: str | Path) -> pd.DataFrame:
    """Read `results_baselines.csv`; no rows if it is missing. Raises `ResultsError` if it is damaged.

    An older table has no `kl`.
    """
    path = Path(results_dir) / FILE
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    try:
        check_sums(path.parent, [path.name])
        table = pd.read_csv(path, dtype={"store_id": str})
        return table.assign(kl=table.get("kl", math.nan))[COLUMNS]
    except (DamagedError, KeyError, ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: {error}; `python -m saegrid tables GRID` makes it again") from None
