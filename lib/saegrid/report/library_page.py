"""The page about the library: signatures and docstrings of `formats` and `core/`, read from the sources: no torch."""

from __future__ import annotations

import ast
import re
import textwrap
from importlib import resources

from saegrid.report.site import front_matter
from saegrid.report.tables import Markdown, markdown


def page(title: str) -> Markdown:
    """The page as Quarto's Markdown, front matter included."""
    parts = [front_matter(title, "Functions and classes that load, train, evaluate and export an SAE.")]
    parts += ["Modules of the package `saegrid`, from their docstrings. `saegrid.load_sae` is `formats.load_sae`."]
    core = sorted(path.name for path in resources.files("saegrid.core").iterdir() if path.name.endswith(".py"))
    for file in ("formats/__init__.py", *(f"core/{name}" for name in core)):
        text = resources.files("saegrid").joinpath(file).read_text(encoding="utf-8")
        module = ast.parse(text)
        parts += [f"## {file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}", prose(module)]
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                code = "\n".join(signature(node, text.splitlines()))
                parts += [f"### {node.name}", f"```python\n{code}\n```", prose(node)]
    return markdown(*filter(None, parts))


def signature(node: ast.stmt, source: list[str]) -> list[str]:
    """A function's arguments and result; a class's bases, public fields as in the source, and public methods."""
    if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return [f"{node.name}({ast.unparse(node.args)}){result}"]
    if isinstance(node, ast.ClassDef):
        inside = [f"    {line.strip()}" for part in node.body for line in signature(part, source)]
        return [f"class {node.name}({', '.join(map(ast.unparse, node.bases))})", *inside]
    is_field = isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_")
    return source[node.lineno - 1 : node.end_lineno] if is_field else []


def prose(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    """A docstring as Markdown: sections as lists, and nothing outside of code that would be markup."""
    found = []
    for block in (ast.get_docstring(node) or "").split("\n\n"):
        parts = re.split(r"(`[^`]*`)", block)
        block = "".join(part if n % 2 else re.sub(r"[*<>$]", r"\\\g<0>", part) for n, part in enumerate(parts))
        head, _, rest = block.partition("\n")
        if head in ("Args:", "Raises:"):
            items = re.sub(r"\n +", " ", textwrap.dedent(rest)).splitlines()
            block = "\n".join([f"**{head}**", "", *(f"- {item}" for item in items)])
        elif head in ("Returns:", "Yields:"):
            block = f"**{head}** {' '.join(rest.split())}"
        found.append(block)
    return "\n\n".join(found)
