"""Quarto's pre-render hook: for each missing page, a placeholder that says how to make it. Needs no package."""

from pathlib import Path

from saegrid.report.site import prepare

for page in prepare(Path.cwd()):
    print(f"{page}: not made yet, a placeholder stands in")
