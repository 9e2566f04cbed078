"""The README's picture, from the committed table: `python docs/frontier.py`."""

from pathlib import Path

from saegrid import plots, results

df = results.read_tidy("results/full")
svg = plots.standalone_svg(plots.frontier(df, y="delta_loss"))
Path("docs/frontier.svg").write_text(svg, encoding="utf-8")
