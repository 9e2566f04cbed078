"""Sparse probes: labels by hand, the choice of columns against a slow computation, and what the page says of them."""

import numpy as np
import pandas as pd
import probes
import pytest
import scipy.sparse

from saegrid.report.pages import trust_section


def test_labels_by_hand():
    pieces = ["Ann", " has", " ", *"120", " pears", ".", " Has", " Bob", "?", "\n", "120", " has", " (", "7", ")"]
    labels = probes.labelled(pieces)
    where = {name: np.flatnonzero(has).tolist() for name, has in labels.items()}
    assert where["digit"] == [3, 4, 5, 12, 15]
    assert where["capital letter"] == [0, 8, 9]
    assert where["name inside a sentence"] == [9]
    assert where["second or later digit"] == [4, 5, 12]
    assert where["number over 100"] == [3, 4, 5, 12]
    assert where["number seen before"] == [12]
    assert where["word seen before"] == [8, 13]
    assert where["first sentence"] == list(range(8))
    assert where["sentence that asks"] == [8, 9, 10, 11]
    assert where["after the first line"] == [12, 13, 14, 15, 16]
    assert where["in brackets"] == [15]
    assert where["punctuation"] == [7, 10]
    assert sum(not concept.from_token for concept in probes.CONCEPTS.values()) >= len(probes.CONCEPTS) / 2


def test_the_most_telling_columns_against_a_slow_computation():
    rng = np.random.default_rng(0)
    inputs = np.where(rng.random((200, 12)) < 0.3, rng.random((200, 12)), 0.0)
    inputs[:, 5] = 1.0  # constant
    has = inputs[:, 3] - inputs[:, 7] + 0.3 * rng.random(200) > 0.2
    slow = [abs(np.corrcoef(column, has)[0, 1]) if np.ptp(column) else 0.0 for column in inputs.T]
    for some in (inputs, scipy.sparse.csc_matrix(inputs)):
        assert probes.most_telling(some, has, 4).tolist() == np.argsort(-np.array(slow))[:4].tolist()


def test_auc_of_a_column_that_is_the_label_and_of_one_that_is_noise():
    rng = np.random.default_rng(0)
    has, test_has = rng.random(400) < 0.5, rng.random(300) < 0.2
    train, test = (np.column_stack([y, rng.random(len(y))]).astype(float) for y in (has, test_has))
    assert probes.auc(train, has, test, test_has, 1) == 1.0
    assert probes.auc(train[:, 1:], has, test[:, 1:], test_has, 1) == pytest.approx(0.5, abs=0.1)
    index = probes.balanced(test_has, seed=0)
    assert test_has[index].mean() == 0.5 and len(set(index)) == len(index) == 2 * test_has.sum()


def test_the_page_compares_with_pca_over_concepts(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for concept in range(12):
        base = 0.7 + 0.2 * rng.random()
        for inputs, more in (("residual", -0.05), ("PCA", 0.0), ("latents", 0.08), ("untrained SAE", 0.0)):
            for k in (1, 5, 16):
                told = {
                    "inputs": inputs,
                    "concept": f"c{concept}",
                    "k": k,
                    "auc": base + more * rng.uniform(0.8, 1),
                }
                told["auc"] += 0.001 * rng.standard_normal() if inputs == "untrained SAE" else 0.0
                rows.append(told | ({"arch": "TopK", "recipe": "improved"} if inputs == "latents" else {}))
        rows.append({"inputs": "residual", "concept": f"c{concept}", "k": 0, "auc": 0.95, "from_token": concept < 5})
    pd.DataFrame(rows).to_csv(tmp_path / "probes.csv", index=False)
    text = trust_section.probes(tmp_path)[1]
    assert "12 concepts with automatic labels, 7 of them" in text and "residual stream give 0.950" in text
    assert (
        "TopK improved has a significantly higher AUC than PCA; residual has a significantly lower AUC than PCA ("
        in text
    )
    assert "corrected for 3 comparisons)." in text
    assert text.count('<th scope="row">') == 4 + 12
