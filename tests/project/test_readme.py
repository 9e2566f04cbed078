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
from saegrid.experiment import pca_table, results

README = Path("README.md").read_text()
TEXT = " ".join(README.split())
LIB = Path("lib/saegrid")
FROZEN = {
    "none": "",
    "decoder": ", frozen decoder",
    "encoder": ", frozen encoder",
    "soft": ", decoder kept near its start",
}


def span(values, digits):
    return f"{values.min():{digits}}% to {values.max():{digits}}%"


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
    assert f"{len(df)} of the 64 runs" in TEXT and len(load_grid("params/full.yaml").runs()) == 64
    assert (df["n_train_rows"] == 285_000).all() and (df["steps"] == 5_570).all()
    at_64 = df[(df["expansion"] == 8) & (df["k"] == 64)].groupby(["arch", "recipe", "freeze"])
    for (arch, recipe, freeze), rows in at_64:
        if freeze != "none" or len(rows) == 2:
            cells = [f"{rows[name].mean():.3f}" for name in ("kl", "delta_loss")]
            cells += [f"{rows['l0_eval'].mean():.1f}", f"{rows['dead_pct'].mean():.1f}%"]
            again = stable[(stable["arch"] == arch) & (stable["recipe"] == recipe)]["stable_pct"]
            name, last = (f"{arch}, `{recipe}`{FROZEN[freeze]}", f"{again.item():.2f}%" if freeze == "none" else "")
            row = f"{name} | {' | '.join(cells)} | {last} |".replace("|  |", "| |")
            assert f"| {row}" in README or f"| control: {row}" in README
    soft = df[df["freeze"] == "soft"]["kl"].item()
    assert f"within a cosine of 0.8 of its random start still has a KL of {soft:.3f}." in TEXT
    pca = pca_table.read("results/full").set_index("components").loc[64]
    assert f"PCA, 64 components | {pca['kl']:.3f} | {pca['delta_loss']:.3f} |" in README
    assert f"At most {stable['stable_pct'].max():.1f}% are found again" in TEXT
    told = {finding.number: finding for finding in all_findings(df)}
    holds = [number for number in told if told[number].verdict == HOLDS]
    assert f"{listed(map(str, holds))} hold" in TEXT
    first = told[1].facts
    assert f"of {first['pairs']} matched pairs BatchTopK has no more dead latents in {first['dead_pct']}," in TEXT
    assert f"the lower MSE in {first['val_mse']} and the lower delta loss in {first['delta_loss']}." in TEXT
    dead = told[2].facts["small"]["dead_pct"]
    assert f"K = 64 leaves {span(dead, '.0f')} dead" in TEXT
    sweet, rival = (told[3].facts[name].iloc[0] for name in ("best", "rival"))
    assert f"frac_rec of {sweet['frac_rec_pct']:.1f}% and a delta loss of {sweet['delta_loss']:.3f};" in TEXT
    assert f"{rival['arch']} {rival['expansion']}x with K = {rival['k']} has {rival['delta_loss']:.3f}." in TEXT
    low = told[4].facts["lowest"]
    kept, active = span(low["frac_rec_pct"], ".1f"), span(100 * low["l0"] / low["d_sae"], ".0f")
    assert f"frac_rec of {kept}, with {active} of its latents active." in TEXT
    more = [f"{told[5].facts['by_arch'][arch].mean:+.3f} ({arch})" for arch in ("TopK", "BatchTopK")]
    assert f"changes delta loss by {' and '.join(more)}.".replace("-", "−") in TEXT
    changed = results.read_stability("results/stability").query("recipe == 'improved'")
    usual = changed.query("arch == 'BatchTopK' and lr == 0.002 and epochs == 3 and encoder_tie == 3")["stable_pct"]
    assert f"help: {usual.item():.2f}% to {changed['stable_pct'].max():.2f}% (4x, 3 epochs, one pair" in TEXT


def test_the_readmes_layers_and_texts_are_those_of_the_committed_tables():
    folder = Path("results/layers")
    found = {one.name: one for one in headlines(results.read_tidy(folder), results.read_prompts(folder))}
    topk, improved, matryoshka = found.values()
    for one in (topk, matryoshka):
        assert len(one.held) == 12 and all(held.told.value < 0 for held in one.held.values())
    assert f"lower KL than BatchTopK at all 12 (significant at {len(topk.where(HOLDS))})" in TEXT
    assert f"lowest KL of four settings at all 12 (significant at {len(matryoshka.where(HOLDS))})" in TEXT
    assert f"at most a tenth of `published`'s KL at {len(improved.where(HOLDS))} of 12." in TEXT


def test_the_readmes_known_directions_are_those_of_the_committed_table():
    runs = pd.read_csv("results/ground_truth/runs.csv")
    trained = runs[runs["freeze"] == "none"].groupby(["recipe", "arch", "rows", "epochs"])["mcc"].mean()
    best, improved = trained["published"].max(), trained["improved"]
    chance = runs[runs["freeze"] == "decoder"]["mcc"].mean()
    assert f"(MCC {best:.2f}; chance {chance:.2f}; `improved` {improved.min():.2f} to {improved.max():.2f};" in TEXT


def test_the_readmes_probes_are_those_of_the_committed_table():
    found = pd.read_csv("results/probes/probes.csv").query("k == 5")
    names = found["inputs"].where(found["inputs"] != "latents", "`" + found["recipe"] + "` " + found["arch"])
    stated = re.findall(r"(0\.\d{3}) \((PCA|`\w+` \w+)\)", TEXT)
    auc = found.groupby(names)["auc"].mean()
    assert len(stated) == 4 and all(f"{auc[name]:.3f}" == value for value, name in stated)
    assert auc["PCA"] > auc.drop(["PCA", "residual"]).max()


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
    assert "significant (Holm, 8 tests): FVU at each K, delta loss at K = 16:" in README
    table = peers.against_best(elsewhere)
    kl = table[table["measure"] == "kl"]
    own, theirs = ([f"{value:.3f}" for value in kl[name]] for name in ("own", "theirs"))
    where = ("layer 6, gsm_symbolic", "layer 24, gsm_symbolic", "layer 12, python_docs")
    assert tuple(kl["where"]) == where
    places = [
        f"{value} {place}" for value, place in zip(own, ("at layer 6", "at layer 24", "on `python_docs`"), strict=True)
    ]
    assert f"the KL of our Matryoshka is {listed(places)}; that of the better of" in TEXT
    assert f"is {listed(theirs)} (all {len(table)} differences significant, Holm)." in TEXT
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
    assert f"{min(fastest.values()):.1f}x to {max(fastest.values()):.1f}x as fast as the fastest alternative" in README
    assert f"({len(races)} comparisons" in README
    steps = [one for one in json.loads(Path("benchmarks/gpu.json").read_text())["steps"] if "ms" in one]
    at = [one for one in steps if one["shape"] == [896, 8, 220, 4096] and one.get("recipe", "published") == "published"]
    ms = {(one["who"], one["arch"]): one["ms"] for one in reversed(at)}  # of trials with other digits, the first
    own = {arch: ms["saegrid", arch] for arch in ("BatchTopK", "TopK")}
    assert f"On an H200 it is {ms['torch', 'BatchTopK'] / own['BatchTopK']:.1f}x as fast as that loop" in README
    others = [ms["dictionary_learning", "BatchTopK"] / own["BatchTopK"], ms["sparsify", "TopK"] / own["TopK"]]
    assert f"and {others[0]:.0f}x and {others[1]:.0f}x as fast as dictionary_learning and sparsify" in README
