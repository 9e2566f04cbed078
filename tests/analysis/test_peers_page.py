import re

import numpy as np
import pandas as pd
import pytest

from saegrid.analysis import peers
from saegrid.report.pages import peers_section, recipes_page

CONTENDERS = [("saegrid", "BatchTopK", 0.00), ("saegrid", "JumpReLU", -0.01), ("sae-lens", "BatchTopK", 0.05)]


@pytest.fixture
def folder(tmp_path):
    """Three contenders at two K, three seeds and two learning rates; the second is better for all but the last."""
    rng = np.random.default_rng(0)
    clean = rng.uniform(40, 80, 20)
    runs, prompts = [], []
    for peer, arch, worse in CONTENDERS:
        for k in (16, 64):
            best = 1.0 if peer == "sae-lens" else 0.3333
            for seed, rate in ((0, 1.0), (0, 0.3333), (1, best), (2, best)):
                key = {"layer": 12, "dataset": "embedded:gsm_symbolic", "peer": peer, "arch": arch, "k": k}
                key |= {"rate": rate, "seed": seed}
                tuned = rate == best
                extra = 100 * (0.2 + worse + (0 if tuned else 0.1)) * 16 / k * rng.uniform(0.9, 1.1, 20)
                losses = {"ce_clean_sum": clean, "ce_spliced_sum": clean + extra}
                index = {"prompt": range(20), "template": [n // 2 for n in range(20)], "n_tokens": 100}
                fvu = (0.3 if tuned else 0.4) + worse
                errors = {"sq_error": fvu * rng.uniform(0.9, 1.1, 20), "sq_norm_centred": 1.0}
                prompts.append(pd.DataFrame({**index, **losses, **errors}).assign(**key))
                measures = {"l0_no_sink": k, "fvu_no_sink": fvu, "fvu_eval": errors["sq_error"].mean()}
                measures |= {"dead_pct_no_sink": 1.0, "delta_loss": extra.sum() / 2000}
                runs.append(key | measures)
    (tmp_path / "results/peers").mkdir(parents=True)
    pd.DataFrame(runs).to_csv(tmp_path / "results/peers/runs.csv", index=False)
    pd.concat(prompts).to_csv(tmp_path / "results/peers/prompts.csv", index=False)
    return tmp_path / "results/peers"


def test_the_best_learning_rate_of_each_is_compared(folder):
    runs, prompts = peers.read(folder)
    assert len(runs) == 18 and len(prompts) == 18 * 20
    rates = runs.assign(own=runs["peer"] != "sae-lens").groupby("own")["rate"].unique().map(list).to_dict()
    assert rates == {False: [1.0], True: [0.3333]}
    found = peers.compared(runs, prompts)
    base = found[found["is_base"]]
    assert list(base["k"]) == [16, 64] and set(base["arch"]) == {"JumpReLU"}
    for measure in ("delta_loss", "fvu_eval"):
        assert set(base[f"{measure}_more"]) == {(0.0, 0.0, 0.0, 1.0)}
        for _, row in found[~found["is_base"]].iterrows():
            more, low, high, _ = row[f"{measure}_more"]
            own = base[base["k"] == row["k"]][measure].item()
            assert more == pytest.approx(row[measure] - own) and low < more < high
        assert all(low > 0 for _, low, _, _ in found[found["peer"] == "sae-lens"][f"{measure}_more"])


def test_a_difference_that_is_not_significant_is_not_called_none(folder):
    found, _ = peers.at_each(folder)
    for name in ("fvu_eval_more", "delta_loss_more"):
        found[name] = [more._replace(p=1.0) for more in found[name]]
    assert "of the others, no difference is significant (corrected for all 4" in peers_section.stand(found)


def test_seeds_that_a_contender_lacks_and_rates_that_were_not_chosen_are_left_out(folder):
    runs = pd.read_csv(folder / "runs.csv")
    lacks = (runs["peer"] == "sae-lens") & (runs["k"] == 16) & (runs["seed"] == 1)
    runs.loc[(runs["arch"] == "JumpReLU") & (runs["seed"] == 2), "rate"] = 1.0  # of an earlier search
    runs[~lacks].to_csv(folder / "runs.csv", index=False)
    found = peers.compared(*peers.read(folder)).set_index("k")
    assert set(found.loc[16, "seeds"]) == {1} and set(found.loc[64, "seeds"]) == {2}


def test_the_page_has_its_table_and_its_verdict(folder):
    page = recipes_page.page(folder.parents[1])
    ours = next(line for line in page.splitlines() if "K = 16, FVU without sinks" in line)
    assert ">0.290 (JumpReLU)<" in ours and ">0.350 (sae-lens BatchTopK)<" in ours and ">+0.055 [" in ours
    assert "corrected for all 4 comparisons" in page
    assert "The learning rate is the best of 2 by FVU" in page and "Means over 3 seeds" in page
    row = next(line for line in page.splitlines() if '<th scope="row">sae-lens BatchTopK' in line)
    assert len(re.findall(r">\+0\.\d{3} to \+0\.\d{3}<", row)) == 2
    assert "Not measured yet: `make peer-quality` does it." not in page


def test_kl_is_compared_where_all_have_it(folder):
    """One comparison more at each K; half of delta loss has half its interval, and the figure shows it."""
    for name, half in (("runs.csv", "delta_loss / 2"), ("prompts.csv", "(ce_spliced_sum - ce_clean_sum) / 2")):
        table = pd.read_csv(folder / name)
        column = "kl" if name == "runs.csv" else "kl_sum"
        table.assign(**{column: table.eval(half)}).to_csv(folder / name, index=False)
    found = peers.compared(*peers.read(folder))
    for row in found.to_dict("records"):
        assert [2 * value for value in row["kl_more"][:3]] == pytest.approx(row["delta_loss_more"][:3])
    table = peers.against_best(found)
    assert list(table["measure"]) == ["fvu_no_sink", "kl", "delta_loss"] * 2
    page = recipes_page.page(folder.parents[1])
    assert "corrected for all 6 comparisons" in page and "KL (nats/token) over the realised L0" in page


def test_stability_is_shown_where_it_was_measured(folder):
    page = recipes_page.page(folder.parents[1])
    assert "Stable latents" not in page[page.index("## Other libraries") :]
    runs = pd.read_csv(folder / "runs.csv")
    runs.assign(stable_pct=runs["seed"] + 1.5, matched_cosine=0.25).to_csv(folder / "runs.csv", index=False)
    page = recipes_page.page(folder.parents[1])
    row = next(line for line in page.splitlines() if '<th scope="row">sae-lens BatchTopK' in line)
    assert "Stable latents" in page and ">2.50<" in row and ">0.250<" in row


def test_another_layer_is_judged_by_itself(folder):
    """The same SAEs with twice the FVU at layer 24 on other prompts, at one K, with one seed and without JumpReLU."""
    before = recipes_page.page(folder.parents[1])
    for name in ("runs.csv", "prompts.csv"):
        table = pd.read_csv(folder / name)
        more = table[(table["k"] == 64) & (table["arch"] != "JumpReLU") & (table["seed"] == 0)]
        more = more.assign(layer=24, dataset="org/other")
        measured = [column for column in ("fvu_no_sink", "fvu_eval", "sq_error") if column in more]
        more[measured] *= 2
        if name == "prompts.csv":
            more = more[more["prompt"] < 18].assign(n_tokens=90)
        pd.concat([table, more]).to_csv(folder / name, index=False)
    most, others = peers.at_each(folder)
    assert list(most["where"].unique()) == ["K = 16", "K = 64"]
    assert list(others["where"].unique()) == ["layer 24, org/other"] and set(others["arch"]) == {"BatchTopK"}
    base = others[others["is_base"]].iloc[0]
    assert base["fvu_no_sink"] == pytest.approx(0.6)
    page = recipes_page.page(folder.parents[1])
    section = page[page.index("### At other layers") :]
    assert "Run there, at K = 64: saegrid BatchTopK and sae-lens BatchTopK." in section
    assert "corrected for all 2 comparisons" in section and "Not run" not in section
    assert "at layer 24, org/other" in section and "Means over 1 to 3 seeds" in section
    shown = before[before.index("## Other libraries") : before.index("Each library's released code")]
    assert shown.strip() in page  # the first table stays as it is


def test_without_the_runs_the_page_says_what_makes_them(tmp_path):
    assert "Not measured yet: `make peer-quality` does it." in recipes_page.page(tmp_path)
