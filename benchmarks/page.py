"""The benchmark's page, made from results.json: tables, a plot of step times, and the learning curves.

python benchmarks/page.py [results.json] [benchmarks/_speed.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from page_plots import NAMES, curve_plot, step_plot

from saegrid.analysis.numbers import MISSING
from saegrid.report.tables import Markdown, html_block, markdown
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
QUALITY = {"val_mse": ".4g", "l0": ".1f", "dead_pct": ".1f"}
FLOOR = (
    "The floor is the encoder's product alone, in the step's own precision, and one read and write of the parameters "
    "and of Adam's moments at the bandwidth that the machine gives."
)
MEMORY = (
    "Resident memory of each contender's process. Weights, gradients and Adam's moments are in it, and four batches of "
    "rows; what is loaded at the first use counts too."
)
ALIKE = 0.01  # first-batch MSE within this share: the contenders solve the same problem


def make(results: Path, page: Path) -> None:
    """Write the page's Markdown. Sections whose numbers are missing say so."""
    content = json.loads(results.read_text(encoding="utf-8"))
    write_text(page, render(content))


def render(results: dict[str, Any]) -> Markdown:
    """The page as Markdown, from the content of results.json."""
    results = results | {part: sorted(results[part], key=_place) for part in ("races", "floors")}
    parts = [section("Ratio to the peers", by_machine(ratio_table, results), results["races"])]
    if results["races"]:
        parts += [step_plot(results), details(results)]
    parts += [not_measured(results), f"## How it was measured\n\n{introduction(results)}"]
    parts += [section("Over the floor", f"{FLOOR}\n\n{by_machine(floor_table, results)}", results["floors"])]
    parts += [f"## On a GPU\n\n{gpu(ROOT / 'benchmarks' / 'gpu.json')}"]
    parts += [section("Splice evaluation", splice_table(results), results.get("splice"))]
    parts += [section("A whole grid", grid_table(results), results.get("grid"))]
    parts += [section("Cost against size", scaling_table(results), results["scaling"])]
    parts += [section("Equal quality", quality_table(results), results["quality"])]
    if results["quality"]:
        parts.append(curve_plot(results))
    parts += [section("Peak memory of a step", f"{MEMORY}\n\n{by_machine(memory_table, results)}", results["races"])]
    return markdown(*parts)


def gpu(path: Path) -> str:
    """What `make gpu` measured, from its file."""
    if not path.exists():
        return "Not measured yet: `make gpu` does it, in ten minutes."
    found = json.loads(path.read_text(encoding="utf-8"))
    facts, rules = found["facts"], found["rules"]
    rates = f"{facts['bytes_per_s'] / 1e12:.2f} TB/s copied, {facts['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s in bf16"
    rows = [
        f"| {step['arch']}, {step['recipe']} | {step['shape'][0]}, {step['shape'][1]}x, K {step['shape'][2]} "
        f"| {step['shape'][3]:,} | {step['ms']:.2f} | {step['floor_ms']:.2f} | {step['ms'] / step['floor_ms']:.1f} |"
        for step in found["steps"]
        if step["who"] == "saegrid" and "ms" in step
    ]
    head = "| SAE | d_in, expansion, K | rows | ms per step | floor, ms | ratio |\n|---|---|--:|--:|--:|--:|"
    return "\n\n".join(
        [
            f"{facts['device']}, torch {facts['torch']}, {found['date']}: {rates}. After eight steps of each of the "
            f"{len(rules['apart'])} pairs of rule and recipe, the weights are within {rules['largest']:.0e} of the "
            "reference's on the processor, and no step waited for the device. " + found.get("note", ""),
            "\n".join([head, *rows]),
            "The floor: a step's five products at the measured rate, and one read and write of weights and moments.",
        ]
    )


def by_machine(part: Callable[[dict[str, Any]], str], results: dict[str, Any]) -> str:
    """A part of the page, once for each machine with results for it, under the machine's name."""
    parts = []
    for name in (found["name"] for found in results["machines"]):
        own = {kind: [record for record in results[kind] if record["machine"] == name] for kind in ("races", "floors")}
        if text := part(own):
            parts.append(f"### {name}\n\n{text}")
    return "\n\n".join(parts)


def section(title: str, body: str, numbers: Any) -> str:
    return f"## {title}\n\n{body if numbers else 'Not measured yet: `make bench` does it.'}"


def introduction(results: dict[str, Any]) -> str:
    rows = results["rows"]
    machines = "\n".join(machine_line(found, results) for found in results["machines"])
    return (
        "One training step, wall clock, of this project and of its peers' released packages, all of a race on one "
        f"machine:\n\n{machines}\n\n"
        f"Rows: {rows['n']:,} of {rows['model']}, layer {rows['layer']}. {rows['made']} The weights have had "
        f"{_train_steps(results)} steps of training; all contenders start from the "
        "same ones, and from the same "
        "moments where they use Adam. JumpReLU takes the BatchTopK weights with θ set so that L0 is K. Each contender "
        f"runs in a process of its own; they take turns of some seconds (one step at least), and a time is the "
        f"median of {_steps(results)} steps. A peer is measured in its default and in faster settings (bf16 autocast, "
        "torch.compile, fused Adam), and the ratio is to the faster one: the one that is fastest with "
        "a shape's first number of rows is measured with the others. No latent counts as dead yet in any "
        "peer, so none of them computes its auxiliary loss."
    )


def machine_line(machine: dict[str, Any], results: dict[str, Any]) -> str:
    """A machine, when it was measured, and with what."""
    records = [*results["races"], *results["floors"]]
    dates = sorted(record["date"][:10] for record in records if record["machine"] == machine["name"])
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    hardware = f"{machine['cores']} cores, {machine['memory_gib']:g} GiB, {machine['system']}"
    return f"- **{machine['name']}**: {hardware}; {when} with {versions}"


def _train_steps(results: dict[str, Any]) -> str:
    """Number of steps that the weights of the races and floors were trained for."""
    counts = {record["train_steps"] for record in [*results["races"], *results["floors"], results["settings"]]}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _steps(results: dict[str, Any]) -> str:
    """Number of steps per median time of the contenders."""
    counts = {c["steps"] for race in results["races"] for c in race["contenders"] if "steps" in c}
    return f"{min(counts)} to {max(counts)}" if counts else "all its"


def not_measured(results: dict[str, Any]) -> str:
    lines = "\n".join(f"- {line}" for line in results["not_measured"])
    return f"::: {{.callout-important}}\n## Not measured\n\n{lines}\n:::"


def ratio_table(results: dict[str, Any]) -> str:
    rows = []
    for race in results["races"]:
        setting = race.get("fastest_setting", MISSING)
        times = (text(race.get(name), ".1f") for name in ("saegrid_ms", "default_ms", "fastest_ms"))
        ratios = text(race.get("ratio_default"), ".1f"), bold(race.get("ratio"), ".1f")
        rows.append((*shape_of(race), NAMES[race["peer"]], *times, setting, *ratios))
    times = "This project (ms)", "Default (ms)", "Fastest (ms)", "Fastest setting"
    all_peers = table([*SHAPE, "Peer", *times, "Ratio to default", "Ratio to fastest"], rows)
    return f"{lowest(results)}\n\n{all_peers}"


def lowest(results: dict[str, Any]) -> str:
    """The main ratio, to the fastest of all peers: one line per shape and batch."""
    best: dict[tuple, dict] = {}
    for race in results["races"]:
        key = shape_of(race)
        if "ratio" in race and race["ratio"] < best.get(key, {"ratio": float("inf")})["ratio"]:
            best[key] = race
    if not best:
        return ""
    ratios = [race["ratio"] for race in best.values()]
    spread = " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (min(ratios), max(ratios))))
    rows = [(*shape_of(race), NAMES[race["peer"]], bold(race["ratio"], ".1f")) for race in best.values()]
    line = f"A training step is **{spread} times** as fast as the fastest peer in its fastest setting."
    return f"{line}\n\n{table([*SHAPE, 'Fastest peer', 'Ratio'], rows)}"


def details(results: dict[str, Any]) -> str:
    """What failed, and whether all contenders solved the same problem."""
    failures, unlike = {}, []
    for race in results["races"]:
        errors = [c.get("mse") for c in race["contenders"] if "mse" in c]
        if errors and max(errors) - min(errors) > ALIKE * min(errors):
            unlike.append(f"{race['machine']}: {' '.join(shape_of(race))}, {race['peer']}")
        for contender in race["contenders"]:
            if "failure" in contender:
                failures[race["machine"], contender["contender"], contender["setting"]] = contender["failure"]
    if unlike:
        same = f"The first batch's MSE differs by more than {ALIKE:.0%} between contenders at: {'; '.join(unlike)}."
    else:
        same = (
            f"On the first batch all contenders of a race have the same MSE within {ALIKE:.0%}: they solve one problem."
        )
    lines = [f"- {where}: {NAMES[name]}, {flags}: `{why}`" for (where, name, flags), why in sorted(failures.items())]
    return same + ("\n\nSettings that did not run:\n\n" + "\n".join(lines) if lines else "")


def floor_table(results: dict[str, Any]) -> str:
    names = ("saegrid_ms", "saegrid_fp32_ms", "product_ms", "memory_ms", "floor_ms", "bandwidth_gb_s")
    rows = [
        (*shape_of(record), *(text(record.get(name), ".1f") for name in names), bold(record.get("over_floor"), ".2f"))
        for record in results["floors"]
    ]
    heads = "Step (ms)", "Step, fp32 product (ms)", "Product (ms)", "Memory (ms)", "Floor (ms)", "Bandwidth (GB/s)"
    return table([*SHAPE, *heads, "Step / floor"], rows) if rows else ""


def splice_table(results: dict[str, Any]) -> str:
    splice = results.get("splice")
    if not splice:
        return ""
    rows = [("this project", text(splice["saegrid_s"], ".1f"), text(splice["baseline_s"], ".1f"), MISSING)]
    lines = []
    if "peer_s" in splice:
        rows.append(("sae-lens, run_evals", text(splice["peer_s"], ".1f"), MISSING, bold(splice["ratio"], ".1f")))
        apart = max(splice["apart"].values())
        lines.append(f"The two give the same clean, spliced and zero-ablated losses within {apart:.1g} nats/token.")
    if "bf16_delta_apart" in splice:
        apart = splice["bf16_delta_apart"]
        lines.append(
            f"With the language model in bfloat16 (`lm_dtype`), no SAE's delta loss moves by more than {apart:.2g} "
            "nats/token; the default stays float32."
        )
    heads = ["Evaluator", f"{splice['saes']} SAEs (s)", "of which shared passes (s)", "Ratio"]
    return (
        f"{splice['saes']} SAEs (d_sae {splice['d_sae']:,}) spliced into the model over the same {splice['tokens']:,} "
        f"tokens, in {splice['contexts']} contexts; loading is not timed. This project runs the blocks before the "
        "splice, and the clean and ablated passes, once for all SAEs, and restarts the model after the hooked block "
        "for each; `run_evals` runs three whole passes per SAE. Machine: "
        f"{splice['machine']}.\n\n{table(heads, rows)}\n\n" + " ".join(lines)
    )


def grid_table(results: dict[str, Any]) -> str:
    grid = results.get("grid")
    if not grid:
        return ""
    rows = []
    for run in grid["runs"]:
        times = (text(run[name], ".0f") for name in ("reference_ms", "auto_ms"))
        rows.append((run["name"], f"{run['steps']:,}", *times, text(run["reference_ms"] / run["auto_ms"], ".1f")))
    heads = "Run", "Steps", "Reference (ms per step)", "Own kernel (ms per step)", "Ratio"
    return (
        f"Training all runs of `{grid['grid']}` one after another on one thread, by the measured step times: "
        f"**{grid['reference_hours']:.1f} h** with the reference kernel, **{grid['auto_hours']:.1f} h** with this "
        f"machine's own, {grid['reference_hours'] / grid['auto_hours']:.1f} times less. Machine: "
        f"{grid['machine']}.\n\n{table(heads, rows)}"
    )


def scaling_table(results: dict[str, Any]) -> str:
    scaling = results["scaling"]
    if not scaling:
        return ""
    base = scaling["base"]
    rows = []
    for axis, points in scaling["points"].items():
        sizes = " · ".join(f"{point['size']:,}" for point in points)
        for name in ("saegrid", "torch"):
            times = " · ".join(text(point.get(f"{name}_ms"), ".1f") for point in points)
            rows.append((axis, NAMES[name], sizes, times, bold(scaling["exponents"][axis][name], ".2f")))
    return (
        f"BatchTopK at d_in {base['d_in']}, d_sae {base['d_sae']:,}, K {base['k']}, {base['batch']} rows, one size "
        f"changed at a time; the exponent is the slope of log(step) over log(size). Machine: "
        f"{scaling['machine']}.\n\n" + table(["Size", "Contender", "Sizes", "Step (ms)", "Exponent"], rows)
    )


def quality_table(results: dict[str, Any]) -> str:
    if not results["quality"]:
        return ""
    rows = []
    for record in results["quality"]:
        reference = record["reference"]
        for own in record["own"]:
            pairs = (f"{reference[n]:{f}} → {own[n]:{f}}" for n, f in QUALITY.items())
            ratios = (text(own["ratios"][n], ".4f") for n in QUALITY)
            rows.append((record["arch"], f"{own['kernel']}, {own['matmul']}", *pairs, *ratios))
    heads = "Validation MSE (act²)", "L0 (latents/token)", "Dead (%)", "MSE ratio", "L0 ratio", "Dead ratio"
    return (
        "The reference kernel in fp32 → this machine's own kernel, by the precision of its product: same seed, rows, "
        f"order and steps; measured {record['date']}. Machine: {record['machine']}.\n\n"
        + table(["Architecture", "Kernel", *heads], rows)
    )


def memory_table(results: dict[str, Any]) -> str:
    rows = []
    for race in results["races"]:
        for c in race["contenders"]:
            if c.get("peak_rss_mib") and (c["contender"] != "saegrid" or race["peer"] == "torch"):
                step = c["peak_rss_mib"] - c["imported_rss_mib"]
                numbers = (text(value, ",.0f") for value in (step, c["peak_rss_mib"], c["imported_rss_mib"]))
                rows.append((*shape_of(race), NAMES[c["contender"]], c["setting"], *numbers))
    heads = "Peak above the imports (MiB)", "Peak of the process (MiB)", "Behind its imports (MiB)"
    return table([*SHAPE, "Contender", "Setting", *heads], rows) if rows else ""


SHAPE = ("d_in", "Expansion", "K", "Rows", "Architecture")
TEXT = ("Architecture", "Peer", "Fastest peer", "Fastest setting", "Contender", "Setting")


def shape_of(record: dict[str, Any]) -> tuple[str, ...]:
    """Cells of `SHAPE` for a race or a floor."""
    return str(record["d_in"]), f"{record['expansion']}x", str(record["k"]), f"{record['batch']:,}", record["arch"]


def _place(record: dict[str, Any]) -> tuple:
    """Sort key of a race or a floor on the page."""
    names = "d_in", "expansion", "batch", "arch", "machine"
    return *(record[name] for name in names), record.get("peer", "")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """A table that can also be scrolled by keyboard; `**text**` in a cell is strong."""
    kinds = [' class="text"' if name in TEXT else "" for name in heads]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = "\n".join(f"<tr>{''.join(map(cell, row, kinds))}</tr>" for row in rows)
    return html_block(
        f'<div class="table-scroll" role="region" tabindex="0" aria-label="{escape(", ".join(heads))}">\n'
        f'<table class="table results" data-quarto-disable-processing="true">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def cell(text: str, kind: str) -> str:
    strong = text.startswith("**")
    text = escape(text.strip("*"))
    return f"<td{kind}><strong>{text}</strong></td>" if strong else f"<td{kind}>{text}</td>"


def bold(value: float | None, form: str) -> str:
    return f"**{text(value, form)}**"


def text(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    make(*(given + [ROOT / "benchmarks/results.json", ROOT / "benchmarks/_speed.md"][len(given) :]))
