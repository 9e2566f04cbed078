"""The README's pictures, from the committed table of the full grid: `python docs/figures.py`."""

from pathlib import Path

from saegrid.experiment import results
from saegrid.report.figures import plots

df = results.read_tidy("results/full")
pictures = {
    "frontier": plots.frontier(df, y="delta_loss"),
    "dead_latents": plots.dead_latents(df),
    "delta_loss": plots.heatmap(df, metric="delta_loss"),
}
for name, ax in pictures.items():
    Path(f"docs/{name}.svg").write_text(plots.standalone_svg(ax), encoding="utf-8")
