"""The benchmark's page, made from results.json: tables, a plot of step times, and the learning curves.

python benchmarks/page.py [results.json] [benchmarks/_speed.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from page_plots import NAMES, curve_plot, step_chart

from saegrid.analysis.numbers import MISSING
from saegrid.report.tables import Markdown, folded, from_template, markdown
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
QUALITY = {"val_mse": ".4g", "l0": ".1f", "dead_pct": ".1f"}
STEP = (
    "One chart per machine: how long a step of each peer takes, in units of this project's own step, and the floor. "
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
    quality = f"{curve_plot(results)}\n\n{quality_table(results)}" if results["quality"] else ""
    parts = [section("A training step", f"{STEP}\n\n{by_machine(step, results)}", results["races"])]
    parts += [details(results)] if results["races"] else []
    parts += [not_measured(results), f"## On a GPU\n\n{gpu(ROOT / 'benchmarks' / 'gpu.json')}"]
    parts += [section("Splice evaluation", splice_table(results), results.get("splice"))]
    parts += [section("A whole grid", grid_table(results), results.get("grid"))]
    parts += [section("Cost against size", scaling_table(results), results["scaling"])]
    parts += [section("Equal quality", quality, results["quality"])]
    parts += [section("Peak memory of a step", f"{MEMORY}\n\n{by_machine(memory_table, results)}", results["races"])]
    parts += [f"## How it was measured\n\n{introduction(results)}"]
    return markdown(*parts)


def gpu(path: Path) -> str:
    """What `make gpu` measured, from its file."""
    if not path.exists():
        return "Not measured yet: `make gpu` does it, in ten minutes."
    found = json.loads(path.read_text(encoding="utf-8"))
    facts, rules = found["facts"], found["rules"]
    rates = f"{facts['bytes_per_s'] / 1e12:.2f} TB/s copied, {facts['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s in bf16"
    own = [step for step in found["steps"] if step["who"] == "saegrid" and "ms" in step]
    own = [step for step in own if not step.get("eager") and "digit" not in step]
    over = [f"{least:.1f}" for least in sorted(step["ms"] / step["floor_ms"] for step in own)]
    ratios = [abs(ends["ratio"] - 1) for name, ends in found["quality"].items() if name != "passed"]
    chart, rows = [], []
    for step in own:
        d_in, expansion, k, batch = step["shape"]
        name = f"{step['arch']}, {step['recipe']}", f"{d_in:,} → {d_in * expansion:,}, K {k}, {batch:,} rows"
        others = [o for o in found["steps"] if o["who"] != "saegrid" and o["shape"] == step["shape"] and "ms" in o]
        others = {o["who"]: o["ms"] / step["ms"] for o in others if o["arch"] == step["arch"]}
        chart.append((*name, others | {"floor": step["floor_ms"] / step["ms"]}))
        rows.append((name, f"{step['ms']:.2f}", f"{step['floor_ms']:.2f}", f"{step['ms'] / step['floor_ms']:.1f}"))
    return "\n\n".join(
        [
            f"**A step takes {' to '.join(dict.fromkeys([over[0], over[-1]]))} times the floor** on {facts['device']} "
            f"(torch {facts['torch']}, {found['date']}; {rates}). {found.get('note', '')}",
            step_chart(
                chart,
                "The floor: a step's five products at the measured rate, and one read and write of "
                "weights and moments.",
            ),
            f"After eight steps of each of the {len(rules['apart'])} pairs of rule and recipe, the weights are within "
            f"{rules['largest']:.0e} of the reference's on the processor, and no step waited for the device. After a "
            f"short training in bf16 the validation error is within {max(ratios):.1%} of the reference's in fp32.",
            fold("Times of a step on the GPU", ["SAE", "Step (ms)", "Floor (ms)", "Step / floor"], rows),
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


def step(results: dict[str, Any]) -> str:
    """One machine's steps: a sentence, one chart with peers and floor, and the tables."""
    races, floors = results["races"], results["floors"]
    chart: dict[tuple, dict[str, float]] = {}
    for race in races:
        if "ratio" in race:
            chart.setdefault(shape_of(race), {})[race["peer"]] = race["ratio"]
    for record in floors:
        if record.get("over_floor"):
            chart.setdefault(shape_of(record), {})["floor"] = 1 / record["over_floor"]
    if not chart:
        return ""
    closest = [min(peers) for own in chart.values() if (peers := [own[name] for name in own if name != "floor"])]
    over = [1 / own["floor"] for own in chart.values() if "floor" in own]
    said = [f"is **{_range(closest)} times** as fast as the fastest peer in its fastest setting"] if closest else []
    said += [f"takes **{_range(over)} times** the floor"] if over else []
    caption = "Each peer in its fastest setting, and the floor; right of the line is slower than this project."
    return "\n\n".join(
        [
            f"A step {', and '.join(said)}.",
            step_chart([(*shape, own) for shape, own in chart.items()], caption),
            ratio_table(races),
            floor_table(floors),
        ]
    )


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values))))


def _of(caption: str, records: list[dict[str, Any]]) -> str:
    """A caption with the machine of the records."""
    return f"{caption}: {records[0]['machine']}" if records else caption


def ratio_table(races: list[dict[str, Any]]) -> str:
    rows = []
    for race in races:
        setting = race.get("fastest_setting", MISSING)
        times = (text(race.get(name), ".1f") for name in ("saegrid_ms", "default_ms", "fastest_ms"))
        ratios = text(race.get("ratio_default"), ".1f"), text(race.get("ratio"), ".1f")
        rows.append((shape_of(race), NAMES[race["peer"]], *times, setting, *ratios))
    heads = "This project (ms)", "Default (ms)", "Fastest (ms)", "Fastest setting", "Default / ours", "Fastest / ours"
    return fold(_of("Every race", races), ["Shape", "Peer", *heads], rows)


def details(results: dict[str, Any]) -> str:
    """What failed, and whether all contenders solved the same problem."""
    failures, unlike = {}, {}
    for race in results["races"]:
        errors = [c.get("mse") for c in race["contenders"] if "mse" in c]
        if errors and max(errors) - min(errors) > ALIKE * min(errors):
            unlike.setdefault((race["machine"], *shape_of(race)), []).append(NAMES[race["peer"]])
        for contender in race["contenders"]:
            if "failure" in contender:
                failures[race["machine"], contender["contender"], contender["setting"]] = contender["failure"]
    if unlike:
        races = "; ".join(f"{' and '.join(peers)} ({', '.join(race)})" for race, peers in unlike.items())
        same = f"On the first batch, the MSE of these differs from this project's by more than {ALIKE:.0%}: {races}."
    else:
        same = (
            f"On the first batch all contenders of a race have the same MSE within {ALIKE:.0%}: they solve one problem."
        )
    lines = [f"- {where}: {NAMES[name]}, {flags}: `{why}`" for (where, name, flags), why in sorted(failures.items())]
    return f"{same}\n\n{folded('Settings that did not run', chr(10).join(lines))}" if lines else same


def floor_table(floors: list[dict[str, Any]]) -> str:
    names = ("saegrid_ms", "saegrid_fp32_ms", "product_ms", "memory_ms", "floor_ms", "bandwidth_gb_s")
    rows = [
        (shape_of(record), *(text(record.get(name), ".1f") for name in names), text(record.get("over_floor"), ".2f"))
        for record in floors
    ]
    heads = "Step (ms)", "Step, fp32 product (ms)", "Product (ms)", "Memory (ms)", "Floor (ms)", "Bandwidth (GB/s)"
    return fold(_of("The floor in its parts", floors), ["Shape", *heads, "Step / floor"], rows)


def splice_table(results: dict[str, Any]) -> str:
    splice = results.get("splice")
    if not splice:
        return ""
    rows = [("this project", text(splice["saegrid_s"], ".1f"), text(splice["baseline_s"], ".1f"), MISSING)]
    lines = []
    if "peer_s" in splice:
        rows.append(("sae-lens, run_evals", text(splice["peer_s"], ".1f"), MISSING, text(splice["ratio"], ".1f")))
        apart = max(splice["apart"].values())
        lines.append(f"The two give the same clean, spliced and zero-ablated losses within {apart:.1g} nats/token.")
    if "bf16_delta_apart" in splice:
        apart = splice["bf16_delta_apart"]
        lines.append(
            f"With the language model in bfloat16 (`lm_dtype`), no SAE's delta loss moves by more than {apart:.2g} "
            "nats/token; the default stays float32."
        )
    heads = ["Evaluator", f"{splice['saes']} SAEs (s)", "of which shared passes (s)", "Ratio"]
    ratio = f"**{splice['ratio']:.1f} times as fast as sae-lens' `run_evals`.** " if "ratio" in splice else ""
    return (
        f"{ratio}{splice['saes']} SAEs (d_sae {splice['d_sae']:,}) spliced into the model over the same "
        f"{splice['tokens']:,} tokens, in {splice['contexts']} contexts; loading is not timed. This project runs the "
        "blocks before the splice, and the clean and ablated passes, once for all SAEs, and restarts the model after "
        "the hooked block for each; `run_evals` runs three whole passes per SAE. Machine: "
        f"{splice['machine']}. {' '.join(lines)}\n\n{fold('Times of both evaluators', heads, rows)}"
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
        f"{grid['machine']}.\n\n{fold('Step times of every run', ['Run', *heads[1:]], rows)}"
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
            rows.append((axis, NAMES[name], sizes, times, text(scaling["exponents"][axis][name], ".2f")))
    return (
        f"BatchTopK at d_in {base['d_in']}, d_sae {base['d_sae']:,}, K {base['k']}, {base['batch']} rows, one size "
        f"changed at a time; the exponent is the slope of log(step) over log(size). Machine: "
        f"{scaling['machine']}.\n\n"
        + str(table("Step time by size.", ["Size", "Contender", "Sizes", "Step (ms)", "Exponent"], rows))
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
            rows.append(((record["arch"], f"{own['kernel']}, {own['matmul']}"), *pairs, *ratios))
    heads = "Validation MSE (act²)", "L0 (latents/token)", "Dead (%)", "MSE ratio", "L0 ratio", "Dead ratio"
    return (
        "The reference kernel in fp32 → this machine's own kernel, by the precision of its product: same seed, rows, "
        f"order and steps; measured {record['date']}. Machine: {record['machine']}.\n\n"
        + fold("Measures of both kernels", ["Architecture", *heads], rows)
    )


def memory_table(results: dict[str, Any]) -> str:
    rows = []
    for race in results["races"]:
        for c in race["contenders"]:
            if c.get("peak_rss_mib") and (c["contender"] != "saegrid" or race["peer"] == "torch"):
                step = c["peak_rss_mib"] - c["imported_rss_mib"]
                numbers = (text(value, ",.0f") for value in (step, c["peak_rss_mib"], c["imported_rss_mib"]))
                rows.append((shape_of(race), NAMES[c["contender"]], c["setting"], *numbers))
    heads = "Peak above the imports (MiB)", "Peak of the process (MiB)", "After its imports (MiB)"
    return (
        fold(_of("Memory of every contender", results["races"]), ["Shape", "Contender", "Setting", *heads], rows)
        if rows
        else ""
    )


TEXT = ("Peer", "Fastest setting", "Contender", "Setting", "Sizes")


def shape_of(record: dict[str, Any]) -> tuple[str, str]:
    """Label and note of a race's or a floor's shape."""
    d_in, d_sae = record["d_in"], record["d_in"] * record["expansion"]
    return record["arch"], f"{d_in:,} → {d_sae:,}, K {record['k']}, {record['batch']:,} rows"


def _place(record: dict[str, Any]) -> tuple:
    """Sort key of a race or a floor on the page."""
    names = "d_in", "expansion", "batch", "arch", "machine"
    return *(record[name] for name in names), record.get("peer", "")


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A table; the first cell of a row is its header, a text or a label with a note. A head ends in its (unit)."""
    head = [(name, unit.rstrip(")"), "") for name, _, unit in (name.partition(" (") for name in heads)]
    shown = []
    for first, *others in rows:
        label, note = (first, "") if isinstance(first, str) else first
        cells = [
            {"column": name, "text": cell, "missing": cell == MISSING, "words": name in TEXT}
            | {"best": False, "theirs": ""}
            for name, cell in zip(heads[1:], others, strict=True)
        ]
        shown.append(({"text": label, "id": note, "href": ""}, cells))
    return from_template("table.html", caption=caption, note="", tools="", groups=[], heads=head, rows=shown)


def fold(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that is folded away behind its caption; empty without rows."""
    return str(folded(caption, table(f"{caption}.", heads, rows))) if rows else ""


def text(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    make(*(given + [ROOT / "benchmarks/results.json", ROOT / "benchmarks/_speed.md"][len(given) :]))
