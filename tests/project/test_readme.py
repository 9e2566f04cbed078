"""The README's files and folders are those on the disk, its commands exist, its numbers are the tables'."""

import json
import math
import re
import subprocess
from pathlib import Path

from saegrid.analysis import findings, peers, selection
from saegrid.analysis.ablation import by_recipe
from saegrid.experiment import results
from saegrid.report.pages import findings_page

README = Path("README.md").read_text()
LIB = Path("lib/saegrid")


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


def test_the_small_library_and_the_folders_are_those_on_disk():
    files = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert sorted(files) == sorted(path.name for path in (LIB / "core").glob("[a-z]*.py"))
    tree = re.search(r"```\nlib/saegrid/\n(.*?)```", README, re.S)[1]
    inside = re.findall(r"^    (\w+)/", tree, re.M)
    assert sorted(inside) == sorted(path.name for path in LIB.iterdir() if path.is_dir() and "__" not in path.name)
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith((".", "lib/"))}
    assert set(re.findall(r"^(\w+)/", tree, re.M)) == folders - {"runs"}


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert Path(target).exists(), target


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
    best = selection.recommend(df, math.inf)
    first = findings.batchtopk_beats_topk(df)
    verdicts = [finding.verdict for finding in findings.all_findings(df)]
    text = " ".join(README.split())
    assert f"**{best['name']} costs the model least, {best['delta_loss']:.3f} nats/token**" in text
    assert f"({len(df)} runs, {df['n_train_rows'].max():,} tokens, {df['epochs'].max()} epochs" in text
    assert f"by {first.effect:.3f} nats/token on average" in text
    assert "lower delta loss in 0" in findings_page.sentence(first) and "in all 9 settings" in text
    assert (verdicts.count("holds"), verdicts.count("fails")) == (1, 4)


def test_the_readmes_recipes_are_those_of_the_committed_table():
    table = by_recipe(results.read_tidy("results/recipes")).set_index(["arch", "recipe"])
    loss = table["delta_loss"].map("{:.3f}".format)
    told = f"from {loss['BatchTopK', 'published']} to {loss['BatchTopK', 'improved']} nats/token"
    assert f"{told}, and Matryoshka loses {loss['Matryoshka', 'improved']} " in " ".join(README.split())


def test_the_readmes_peers_are_those_of_the_committed_tables():
    """At each K, this project's SAE of the lowest FVU beside the best of the others in each measure."""
    found = peers.compared(*peers.read(Path("results/peers")))
    assert list(found["k"].unique()) == [16, 32, 64, 128]
    for k, group in found.groupby("k"):
        own, others = group[group["is_base"]].iloc[0], group[group["peer"] != peers.OWN]
        cells = [str(k)]
        for measure in ("fvu_no_sink", "delta_loss"):
            best = others.loc[others[measure].idxmin()]
            cells += [f"{own[measure]:.3f}", f"{best[measure]:.3f} ({best['peer']} {best['arch']})"]
        assert own["arch"] == "Matryoshka" and f"| {' | '.join(cells)} |" in README
    table = peers.against_best(found)
    shown = table[(table["p"] < 0.05) & (table["more"] > 0)].groupby("measure")["k"].agg(list)
    assert shown["fvu_no_sink"] == [16, 32, 64, 128] and shown["delta_loss"] == [16] and len(table) == 8
    assert "shown (Holm, 8 tests): FVU at each K, delta loss at K = 16:" in README


def test_the_published_settings_row_is_that_of_the_rehearsal(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    from rehearse import preset_row

    path = Path("results/rehearsal.json")
    row = preset_row(json.loads(path.read_text())) if path.exists() else "not run yet: needs the Hub"
    assert row in README


def test_the_readmes_speed_is_that_of_the_committed_benchmark():
    """Each race by its fastest contender, of the peers' and the plain loop's settings."""
    races, fastest = json.loads(Path("benchmarks/results.json").read_text())["races"], {}
    for race in races:
        key = tuple(race[name] for name in ("d_in", "expansion", "k", "batch", "arch"))
        fastest[key] = min(race["ratio"], fastest.get(key, math.inf))
    assert f"{min(fastest.values()):.1f}x to {max(fastest.values()):.1f}x faster than the fastest of them" in README
    assert f"({len(races)} races" in README
