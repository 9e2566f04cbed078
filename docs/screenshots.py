"""The README's screenshots, of the site in `_site/`: `python docs/screenshots.py`. Needs Chromium on PATH."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SITE = Path("_site").resolve()
PAGES = {
    "home": ("index.html", "main"),
    "frontier": ("report/frontier.html", "figure.live"),
    "results": ("report/results.html", ".table-tools"),
    "run": ("", "main"),
    "latents": ("report/latents.html", ".latent-shown article"),
}
"""Page, and what is on it once it is ready; the run is the one that the home page recommends."""
SIZE = {"width": 1280, "height": 860}

chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not chromium or not (SITE / "index.html").exists():
    sys.exit("screenshots: needs Chromium on PATH, and the site: `make report` makes it")
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
    for theme in ("light", "dark"):
        page = browser.new_context(color_scheme=theme, viewport=SIZE).new_page()
        page.goto((SITE / "index.html").as_uri())
        run = page.locator(".headline a").first.get_attribute("href")
        for name, (path, ready) in PAGES.items():
            page.goto((SITE / (path or run)).as_uri())
            page.wait_for_selector(ready)
            page.wait_for_timeout(300)  # the renderer marks the theme 50 ms after loading, fonts and charts settle
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.save(f"docs/{name}-{theme}.webp", quality=82, method=6)
    browser.close()
