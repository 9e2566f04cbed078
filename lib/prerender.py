"""Quarto's pre-render hook: pages that no run has made yet become pages that say how to make them. Needs no package."""

from pathlib import Path

from saegrid.report.site import prepare

for page in prepare(Path.cwd()):
    print(f"{page}: not made yet, a placeholder stands in")
