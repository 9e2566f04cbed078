"""matplotlib's SVG adapted to a page of the report."""

from __future__ import annotations

import hashlib
import re
from html import escape


def page_svg(svg: str, ink: str, alt: str) -> str:
    """An SVG from matplotlib as part of a page.

    Ink becomes the page's text colour; ids become unique to the figure. If a group's id begins with `mark: `, the rest
    becomes its tooltip and the name of the link inside it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = svg.replace(ink, "currentColor")
    mark = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]  # unique ids in a page with several figures
    svg = re.sub(r'<g id="mark: ([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{mark}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#([^")]+)', rf"\1#{mark}-\2", svg)
    svg = re.sub(r"(<g><title>([^<]*)</title>(?:(?!</?g>).)*?<a )xlink:", r'\1aria-label="\2" ', svg, flags=re.S)
    svg = re.sub(r"\n\s*\n", "\n", svg.replace(' target="_blank"', ""))
    role = "group" if "<a " in svg else "img"
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    svg = re.sub(r'^<svg [^>]*?viewBox="[^"]*"[^>]*>', "", svg, count=1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" role="{role}" aria-label="{escape(alt)}">{svg}'
    )
