import numpy as np
import pandas as pd
import pytest

from saegrid import evidence, peers

CONTENDERS = [("saegrid", "BatchTopK", 0.00), ("saegrid", "JumpReLU", -0.01), ("sae-lens", "BatchTopK", 0.05)]


@pytest.fixture
def folder(tmp_path):
    """Three contenders at two K and two learning rates, of which the second is better for all but the last."""
    rng = np.random.default_rng(0)
    clean = rng.uniform(40, 80, 20)
    runs, prompts = [], []
    for peer, arch, worse in CONTENDERS:
        for k in (16, 64):
            for rate in (1.0, 0.3333):
                key = {"peer": peer, "arch": arch, "k": k, "rate": rate, "seed": 0}
                tuned = (rate == 1.0) == (peer == "sae-lens")
                extra = 100 * (0.2 + worse + (0 if tuned else 0.1)) * 16 / k * rng.uniform(0.9, 1.1, 20)
                losses = {"ce_clean_sum": clean, "ce_spliced_sum": clean + extra}
                index = {"prompt": range(20), "template": [n // 2 for n in range(20)], "n_tokens": 100}
                fvu = (0.3 if tuned else 0.4) + worse
                errors = {"sq_error": fvu * rng.uniform(0.9, 1.1, 20), "sq_norm_centred": 1.0}
                prompts.append(pd.DataFrame({**index, **losses, **errors}).assign(**key))
                measures = {"l0_no_sink": k, "fvu_no_sink": fvu, "fvu_eval": errors["sq_error"].mean()}
                measures |= {"dead_pct_no_sink": 1.0, "delta_loss": extra.sum() / 2000}
                measures |= {"seconds": 9.0 if peer == "saegrid" else 50.0, "threads": 1}
                runs.append(key | measures)
    (tmp_path / "results/peers").mkdir(parents=True)
    pd.DataFrame(runs).to_csv(tmp_path / "results/peers/runs.csv", index=False)
    pd.concat(prompts).to_csv(tmp_path / "results/peers/prompts.csv", index=False)
    return tmp_path / "results/peers"


def test_the_best_learning_rate_of_each_is_compared(folder):
    runs, prompts = peers.read(folder)
    assert len(runs) == 6 and len(prompts) == 6 * 20
    assert set(runs[runs["peer"] == "sae-lens"]["rate"]) == {1.0} and set(runs[runs["peer"] != "sae-lens"]["rate"]) == {
        0.3333
    }
    found = peers.compared(runs, prompts)
    base = found[found["is_base"]]
    assert list(base["k"]) == [16, 64] and set(base["arch"]) == {"JumpReLU"}
    for measure in ("delta_loss", "fvu_eval"):
        assert set(base[f"{measure}_more"]) == {(0.0, 0.0, 0.0)}
        for _, row in found[~found["is_base"]].iterrows():
            more, low, high = row[f"{measure}_more"]
            own = base[base["k"] == row["k"]][measure].item()
            assert more == pytest.approx(row[measure] - own) and low < more < high
        assert all(low > 0 for _, low, _ in found[found["peer"] == "sae-lens"][f"{measure}_more"])


def test_the_page_has_its_table_and_its_verdict(folder):
    page = evidence.page(folder.parents[1])
    assert (
        "JumpReLU has an FVU without sinks of 0.290 against 0.350 of the best other one (sae-lens BatchTopK; +" in page
    )
    assert "seconds of a training on one thread, medians: saegrid 9, sae-lens 50." in page
    assert page.count("sae-lens BatchTopK") >= 6 and "best of 2 learning rates" in page
    assert "Not measured yet: `make peer-quality` does it." not in page


def test_without_the_runs_the_page_says_what_makes_them(tmp_path):
    assert "Not measured yet: `make peer-quality` does it." in evidence.page(tmp_path)
