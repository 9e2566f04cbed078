"""The README's tree is what lies on the disk, and its commands exist."""

import json
import math
import re
import subprocess
from pathlib import Path

from saegrid.analysis import findings, peers, scaling, selection
from saegrid.analysis.ablation import beside, by_recipe
from saegrid.config.recipes import RECIPES
from saegrid.experiment import pca_table, results

README = Path("README.md").read_text()
TREE = re.search(r"## What is where\n\n```\n(.*?)```", README, re.S)[1]


def paths():
    """Paths that the tree names; a line's folder is the last one above it that is less indented."""
    folder = ""
    for line in TREE.splitlines():
        names = re.split(r" {3,}", line.strip())[0].split("  ")
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            yield from names
        else:
            yield from (folder + name for name in names)


def test_every_path_of_the_tree_exists():
    for path in paths():
        assert Path(path).exists(), path


def test_every_module_notebook_and_folder_is_in_the_tree():
    named = set(paths())
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    for path in tracked:
        parts = Path(path).parts
        if path.startswith(("lib/saegrid/", "notebooks/")) and "__" not in path and len(parts) > 1:
            assert path in named or f"lib/saegrid/{parts[2]}/" in named or path.endswith((".csv", "py.typed")), path
        elif not path.startswith((".", "lib/")):
            assert path in named or any(name.startswith(parts[0] + "/") for name in named), path


def test_the_papermill_line_finds_its_folder():
    """papermill makes no folder for its output, so the checkout has it."""
    output = re.search(r"^papermill notebooks/train.ipynb (\S+)", README, re.M)[1]
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    assert f"{Path(output).parent}/.gitkeep" in tracked


def test_the_make_targets_exist():
    makefile = Path("Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.M) + re.findall(r"`make (\w+)`", README)
    assert {"report", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_readmes_numbers_are_those_of_the_committed_table():
    df = results.read_tidy("results/full")
    best = selection.recommend(df)
    first = findings.batchtopk_beats_topk(df)
    verdicts = [finding.verdict for finding in findings.all_findings(df)]
    text = " ".join(README.split())
    assert f"**{best['name']} costs the model least, {best['delta_loss']:.3f} nats/token**" in text
    assert f"({len(df)} runs, {df['n_train_rows'].max():,} tokens, {df['epochs'].max()} epochs" in text
    assert f"by {first.effect:.3f} nats/token on average" in text
    assert "lower delta loss in 0" in first.sentence and "in all 9 settings" in text
    assert (verdicts.count("holds"), verdicts.count("fails")) == (1, 4)


def test_the_readmes_recipes_are_those_of_the_committed_table():
    table = by_recipe(results.read_tidy("results/recipes")).set_index(["arch", "recipe"])
    lines = [line.strip("| ").split(" | ") for line in README.splitlines() if line.count("|") == 7]
    shown = {(cells[0].split(",")[0], cells[1]): cells[2:] for cells in lines if len(cells) > 1 and cells[1] in RECIPES}
    assert set(shown) == set(table.index)
    for key, (l0, fvu, dead, delta) in shown.items():
        row = table.loc[key]
        assert [l0, fvu, dead, delta] == [
            f"{row['l0']:.1f}", f"{row['fvu_no_sink']:.3f}", f"{row['dead_pct']:.1f}%", f"{row['delta_loss']:.3f}"
        ]  # fmt: skip
    loss = table["delta_loss"].map("{:.3f}".format)
    told = f"from {loss['BatchTopK', 'published']} to {loss['BatchTopK', 'improved']} nats/token"
    assert f"{told}, and Matryoshka loses {loss['Matryoshka', 'improved']}." in " ".join(README.split())
    pca = pca_table.read("results/recipes").set_index("components").loc[64]
    assert f"| 64 | {pca['fvu_no_sink']:.3f} | | {pca['delta_loss']:.3f} |" in README


def test_the_readmes_ablation_is_the_committed_one():
    """What the costliest choices lose, and the only others that the intervals tell from none."""
    folder = "results/ablation"
    df = results.read_tidy(folder)
    found = beside(df, results.read_prompts(folder)).set_index("choice")
    whole = by_recipe(df).set_index("recipe").loc["improved", "delta_loss"]
    told = found.loc[found["low"] > 0, "delta_more"]
    assert list(told.index[:2]) == ["lr = 0.0001", "sinks = keep"]
    assert set(told.index[2:]) == {"encoder_tie = 0.0", "lr_schedule = cosine"}
    assert set(told[2:].round(2)) == {0.01} and not (found["high"] < 0).any()
    assert f"(Matryoshka loses {told.iloc[0] + whole:.2f} and {told.iloc[1] + whole:.2f} nats/token" in README


def test_the_readmes_scaling_is_the_committed_one():
    found = scaling.exponents(results.read_tidy("results/scaling"))
    found = found[found["measure"] == "delta_loss"].set_index("size")
    latents, tokens, k = (2 ** found.loc[size, "slope"] for size in ("d_sae", "n_train_rows", "k"))
    assert found.loc["d_sae", "low"] > 0
    assert f"twice as many multiply delta loss by {latents:.2f},\n" in README
    assert f"twice the tokens, and so the steps, by {tokens:.2f} and twice the K by {k:.2f} (" in README


def test_the_readmes_peers_are_those_of_the_committed_tables():
    """At each K, this project's SAE of the lowest FVU beside the best of the others in each measure."""
    found = peers.compared(*peers.read(Path("results/peers")))
    assert list(found["k"].unique()) == [16, 32, 64, 128]
    for k, group in found.groupby("k"):
        own, others = group[group["is_base"]].iloc[0], group[group["peer"] != peers.OWN]
        cells = [str(k)]
        for measure, on_prompts in (("fvu_no_sink", "fvu_eval"), ("delta_loss", "delta_loss")):
            best = others.loc[others[measure].idxmin()]
            cells += [f"{own[measure]:.3f}", f"{best[measure]:.3f} ({best['peer']} {best['arch']})"]
            more, low, high = best[f"{on_prompts}_more"]
            assert own["arch"] == "Matryoshka" and (low > 0) == (measure == "fvu_no_sink" or k < 128), (k, measure)
            assert more > 0 and high > 0
        assert f"| {' | '.join(cells)} |" in README


def test_the_published_settings_row_is_that_of_the_rehearsal(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    from rehearse import preset_row

    path = Path("results/rehearsal.json")
    row = preset_row(json.loads(path.read_text())) if path.exists() else "not run yet: needs the Hub"
    assert row in README


def test_the_readmes_speed_is_that_of_the_committed_benchmark():
    races = json.loads(Path("benchmarks/results.json").read_text())["races"]
    ratios, fastest = [race["ratio"] for race in races], {}
    for race in races:
        key = tuple(race[name] for name in ("d_in", "expansion", "k", "batch", "arch"))
        fastest[key] = min(race["ratio"], fastest.get(key, math.inf))
    assert f"{min(ratios):.1f}x to {max(ratios):.1f}x faster" in README
    assert f"{min(fastest.values()):.1f}x to {max(fastest.values()):.1f}x faster than the fastest of them" in README
