"""The README's pictures, of the site in `_site/`: `python docs/screenshots.py`. Needs Chromium on PATH."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SITE = Path("_site").resolve()
PICTURES = {
    "home-light": ("index.html#recommendation", "main"),
    "latents-dark": ("report/latents.html", ".latent-shown article"),
    "frontier-light": ("report/frontier.html#sparsity-against-fidelity", "figure.live"),
    "results-dark": ("report/results.html#loss-when-spliced-in", ".table-tools"),
}
"""Name and theme of each picture, with its page and what is on it once it is ready."""
SIZE = {"width": 1280, "height": 860}

chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not chromium or not (SITE / "index.html").exists():
    sys.exit("screenshots: needs Chromium on PATH, and the site: `make report` makes it")
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
    for name, (address, ready) in PICTURES.items():
        page = browser.new_context(color_scheme=name.rpartition("-")[2], viewport=SIZE).new_page()
        page.goto(f"{SITE.as_uri()}/{address}")
        page.wait_for_selector(ready)
        page.wait_for_timeout(500)  # the renderer marks the theme 50 ms after loading, fonts and charts settle
        Image.open(io.BytesIO(page.screenshot())).save(f"docs/{name}.webp", quality=82, method=6)
    browser.close()
