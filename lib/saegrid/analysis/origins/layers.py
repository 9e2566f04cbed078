"""How each measure moves over layers, one line per architecture and recipe, and which layer is hardest."""

from __future__ import annotations

import pandas as pd

from saegrid.analysis.intervals import t_interval
from saegrid.analysis.selection import by_origin, cost, recipes, without_controls
from saegrid.config import settings

MEASURES = ("kl", "delta_loss", "loss_recovered_mean", "fvu_no_sink", "dead_pct", "stable_pct")
"""Measures that are drawn over layers, where the runs have them."""


def over_layers(df: pd.DataFrame) -> pd.DataFrame:
    """One row per measure, text, setting and layer: mean over seeds with its 95% t interval over seeds.

    Columns: `measure`, `text` (the origin but for its layer, as a label), `line` (the setting in words, but for its
    origin), `arch`, `recipe`, `layer`, `mean`, `low`, `high` (NaN with fewer than three seeds, where a t interval says
    next to nothing, and with equal values, as of stability, which is one value for all seeds) and `seeds`. Controls are
    left out.
    """
    df, found = without_controls(df), []
    measures = [name for name in MEASURES if name in df and df[name].notna().any()]
    for text, rows in by_origin(df, "layer").items():
        rows = rows.assign(line=lines(rows), recipe=recipes(rows))
        for (line, layer), runs in rows.groupby(["line", "layer"], sort=False):
            told = {"text": text, "line": line, **runs.iloc[0][["arch", "recipe"]], "layer": int(layer)}
            found += [told | {"measure": name} | _over_seeds(runs[name]) for name in measures]
    order = ["measure", "text", "line", "arch", "recipe", "layer", "mean", "low", "high", "seeds"]
    table = pd.DataFrame(found, columns=order)
    rank = {name: n for n, name in enumerate(measures)}
    return table.sort_values("measure", key=lambda names: names.map(rank), kind="stable", ignore_index=True)


def lines(df: pd.DataFrame) -> list[str]:
    """Each row's setting in words but for its origin and seed: `TopK (improved)`, size and K only where they vary."""
    rows = df.to_dict("records")
    also = [name for name in settings.unusual(rows) if name not in settings.ORIGIN]
    sizes = len({tuple(settings.axes(row).get(name) for name in ("expansion", "k", "threshold")) for row in rows}) > 1
    found = []
    for row in rows:
        name, _, rest = settings.label(row | {"seed": 0}, sizes).partition(", ")
        more = [*filter(None, [rest]), *(f"{axis} {row[axis]}" for axis in also)]
        found.append(f"{name} ({', '.join(more)})" if more else name)
    return found


def hardest(df: pd.DataFrame) -> pd.DataFrame:
    """The layer with the highest mean cost (`selection.cost`), and with the highest FVU without sinks, of each line.

    Columns: `measure`, `text`, `line`, `layer`, `mean`, and `next`, the highest mean of its other layers. No rows if
    the layer does not vary.
    """
    found = []
    table = over_layers(df)
    for name in dict.fromkeys([cost(without_controls(df)), "fvu_no_sink"]):
        for (text, line), rows in table[table["measure"] == name].groupby(["text", "line"], sort=False):
            ranked = rows.sort_values("mean", ascending=False)
            if len(ranked) > 1:
                first, second = ranked.iloc[0], ranked.iloc[1]
                found.append((name, text, line, first["layer"], first["mean"], second["mean"]))
    return pd.DataFrame(found, columns=["measure", "text", "line", "layer", "mean", "next"])


def _over_seeds(values: pd.Series) -> dict[str, float]:
    values, n = values.astype(float), len(values)
    error = float(values.std(ddof=1)) / n**0.5 if n > 2 else 0.0
    mean, low, high, _ = t_interval(float(values.mean()), error, n - 1 if error else 0)
    return {"mean": mean, "low": low, "high": high, "seeds": n}
