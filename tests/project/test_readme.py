"""The README's files and folders are those on the disk, its commands exist, its numbers are the tables'."""

import json
import math
import re
import subprocess
from pathlib import Path

import pandas as pd

from saegrid.analysis import peers
from saegrid.analysis.findings import HOLDS, all_findings
from saegrid.analysis.numbers import listed
from saegrid.analysis.origins.headlines import headlines
from saegrid.config.grid import load_grid
from saegrid.experiment import results

README = Path("README.md").read_text()
TEXT = " ".join(README.split())
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
    df, stable = results.read_tidy("results/full"), results.read_stability("results/full")
    assert f"the first {len(df)} of the 64 runs" in TEXT and len(load_grid("params/full.yaml").runs()) == 64
    assert (df["n_train_rows"] == 285_000).all() and (df["steps"] == 5_570).all()
    at_64 = df[(df["expansion"] == 8) & (df["k"] == 64)].groupby(["arch", "recipe", "freeze"])
    for (arch, recipe, freeze), rows in at_64:
        cells = [f"{rows['delta_loss'].mean():.3f}", f"{rows['kl'].mean():.3f}", f"{rows['dead_pct'].mean():.1f}%"]
        again = stable[(stable["arch"] == arch) & (stable["recipe"] == recipe)]["stable_pct"].item()
        name, last = (
            (f"{arch}, `{recipe}`", f"{again:.2f}% |") if freeze == "none" else (f"{arch}, `{recipe}`, frozen", "")
        )
        assert name in README and f"{' | '.join(cells)} | {last}" in README
    assert f"at most {stable['stable_pct'].max():.1f}% are found again" in TEXT
    loss = df[(df["recipe"] == "published") & (df["seed"] == 0) & (df["freeze"] == "none")]
    loss = loss.set_index(["arch", "expansion", "k"])["delta_loss"]
    for arch in ("TopK", "BatchTopK"):
        more = loss[arch, 16, 64] - loss[arch, 8, 64]
        assert f"{more:+.3f} ({arch})".replace("-", "−") in TEXT
    sweet = df[(df["arch"] == "BatchTopK") & (df["expansion"] == 4) & (df["k"] == 220)]["frac_rec_pct"].item()
    assert f"has a frac_rec of {sweet:.1f}%" in TEXT
    told = {finding.number: finding for finding in all_findings(df[df["freeze"] == "none"])}
    assert [number for number in told if told[number].verdict == HOLDS] == [4, 5] and "findings 4 and 5 hold" in TEXT
    assert f"in all {told[1].facts['pairs']} matched pairs" in TEXT and told[1].facts["delta_loss"] == 0
    changed = results.read_stability("results/stability").query("recipe == 'improved'")
    usual = changed.query("arch == 'BatchTopK' and lr == 0.002 and epochs == 3 and encoder_tie == 3")["stable_pct"]
    assert f"help: {usual.item():.2f}% to {changed['stable_pct'].max():.2f}% (4x, 3 epochs" in TEXT


def test_the_readmes_layers_and_texts_are_those_of_the_committed_tables():
    folder = Path("results/layers")
    found = {one.name: one for one in headlines(results.read_tidy(folder), results.read_prompts(folder))}
    topk, matryoshka = found["topk_loses_less"], found["matryoshka_loses_least"]
    for one in (topk, matryoshka):
        assert len(one.held) == 12 and all(held.told.value < 0 for held in one.held.values())
    assert f"at all 12 layers and texts of `results/layers`, shown at {len(topk.where(HOLDS))} with two seeds;" in TEXT
    assert f"`improved` Matryoshka loses least, shown at {len(matryoshka.where(HOLDS))})" in TEXT


def test_the_readmes_known_directions_are_those_of_the_committed_table():
    mcc = pd.read_csv("results/ground_truth/runs.csv").groupby(["recipe", "freeze", "arch", "rows"])["mcc"].mean()
    assert f"(MCC {mcc['published'].mean():.2f}, chance;" in TEXT
    improved = mcc["improved", "none"]
    assert f"`improved` {improved.min():.2f} to {improved.max():.2f}," in TEXT


def test_the_readmes_peers_are_those_of_the_committed_tables():
    """At each K, this project's SAE of the lowest FVU beside the best of the others in each measure."""
    found, elsewhere = peers.at_each(Path("results/peers"))
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
    table = peers.against_best(elsewhere)
    kl = table[table["measure"] == "kl"]
    own, theirs = ([f"{value:.3f}" for value in kl[name]] for name in ("own", "theirs"))
    where = ("layer 6, gsm_symbolic", "layer 24, gsm_symbolic", "layer 12, python_docs")
    assert tuple(kl["where"]) == where
    assert f"its KL is {listed(own)}; theirs is {listed(theirs)} at best (Holm, {len(table)} tests, all shown)." in TEXT
    assert (table["p"] < 0.05).all() and (table["more"] > 0).all()


def test_the_published_settings_row_is_that_of_the_rehearsal():
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
