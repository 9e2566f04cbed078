"""Latents described from a real run of a tiny model, against direct computations; and the cards made of them."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch.nn import functional as F

from saegrid.config.run_config import make_config
from saegrid.core.metrics import SINK_RATIO
from saegrid.data.collect import open_store
from saegrid.data.language_model import load_lm
from saegrid.errors import SaegridError
from saegrid.experiment import latents
from saegrid.formats.run_folder import load_folder
from saegrid.report import loading
from saegrid.report.pages import latents_page

VOCABULARY = 257  # tokens of the tokenizer; the model has room for three more
SPARSITY = {"TopK": {"k": 4}, "BatchTopK": {"k": 4}, "JumpReLU": {"threshold": 0.5}}
SPARSITY |= {arch: {"k": 4, "recipe": "improved"} for arch in ("ReLU", "Gated")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    tiny.save_dataset(root / "data")
    for layout in ("llama", "gpt2"):
        tiny.save_model(root / layout, layout)
    return root


def finished(root, layout, arch):
    config = make_config(
        **{"model": str(root / layout), "dataset": str(root / "data"), "layer": 1, "max_tokens": 48, "epochs": 2},
        **{"train_tokens": 400, "val_tokens": 150, "eval_prompts": 2, "batch_size": 64, "kernel": "reference"},
        **{"arch": arch, "expansion": 4, "seed": 1, **SPARSITY[arch]},
        **{"runs_dir": str(root / "runs"), "store_dir": str(root / "stores")},
    )
    return tiny.finished(config).folder, config


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def described(request, place):
    folder, config = finished(place, request.param, "TopK")
    return folder, config, latents.describe(folder, place / "stores", size=20)


def test_firing_and_contexts_are_those_of_the_rows(described):
    folder, config, data = described
    sae, store = load_folder(folder), open_store(config)
    x, meta = store.rows("val"), store.meta("val")
    acts = sae.encode(x)
    norms = x.norm(dim=1)
    quiet = acts * (norms <= SINK_RATIO * norms.median())[:, None]
    tokenizer = load_lm(config).tokenizer
    assert data["tokens_known"] and len(data["latents"]) == 20
    for entry in data["latents"]:
        own = quiet[:, entry["latent"]]
        assert entry["fired"] == (acts[:, entry["latent"]] > 0).sum() > 0
        assert entry["max_act"] == pytest.approx(own.max().item(), rel=1e-5)
        assert entry["contexts"][0]["acts"][entry["contexts"][0]["peak"]] == round(own.max().item(), 3)
        first = entry["contexts"][0]
        row = int(own.argmax())
        before = slice(row - first["peak"], row - first["peak"] + len(first["tokens"]))
        assert len(meta["prompts"][before].unique()) == 1
        assert "".join(first["tokens"]) == tokenizer.decode(meta["token_ids"][before])
        assert first["acts"] == [round(value, 3) for value in own[before].tolist()]
        peaks = [context["acts"][context["peak"]] for context in entry["contexts"]]
        assert peaks == sorted(peaks, reverse=True)


def test_what_a_latent_promotes_by_hand(described):
    folder, config, data = described
    sae, model = load_folder(folder), load_lm(config).model
    for entry in data["latents"][:5]:
        d = sae.W_dec[entry["latent"]]
        if hasattr(model, "transformer"):
            norm = model.transformer.ln_f
            state = F.layer_norm(d, d.shape, norm.weight, None, norm.eps)
        else:
            norm = model.model.norm
            state = norm.weight * d / (d.square().mean() + norm.variance_epsilon).sqrt()
        effect = (model.lm_head.weight @ state).detach()[:VOCABULARY]
        effect -= effect.mean()
        assert [value for _, value in entry["promoted"]] == pytest.approx(effect.topk(10).values.tolist(), abs=0.011)
        assert [value for _, value in entry["demoted"]] == pytest.approx(
            (-(-effect).topk(10).values).tolist(), abs=0.011
        )


def test_neighbours_have_the_largest_cosines(described):
    folder, _, data = described
    w = load_folder(folder).W_dec
    for entry in data["latents"]:
        cosines = F.cosine_similarity(w, w[entry["latent"]][None]).scatter(0, torch.tensor(entry["latent"]), -2.0)
        assert [cosine for _, cosine, _ in entry["neighbours"]] == [
            round(value, 3) for value in cosines.topk(latents.NEIGHBOURS).values.tolist()
        ]


def test_the_sample_spreads_over_the_range_and_leaves_the_dead():
    fired = np.concatenate([np.zeros(50, int), np.full(3000, 2), np.arange(1, 1000), np.full(500, 900)])
    chosen = latents.sample(fired, 240)
    assert len(set(chosen)) == 240 and (fired[chosen] > 0).all()
    assert (np.diff(fired[chosen]) >= 0).all()
    assert fired[chosen].min() == 1 and fired[chosen].max() > 990
    thirds = np.histogram(np.log(fired[chosen]), 3)[0]
    assert thirds.min() > 240 / 8  # most latents fire twice or 900 times; the sample is spread
    assert list(latents.sample(np.array([0, 5, 3]), 240)) == [2, 1]
    assert len(latents.sample(np.zeros(4, int), 240)) == 0


def test_rows_whose_tokens_are_not_known_have_no_contexts():
    unknown = {name: np.full(5, -1) for name in ("token_ids", "positions", "prompts")}
    assert latents.contexts(np.arange(5.0), unknown, {}) == []


def test_a_missing_run_is_one_line(tmp_path):
    with pytest.raises(SaegridError, match=r"config\.json"):
        latents.describe(tmp_path, tmp_path)
    with pytest.raises(SaegridError, match=r"latents.json.*saegrid latents"):
        latents_page.load(tmp_path)


@pytest.mark.parametrize("arch", SPARSITY)
def test_the_home_pages_code_runs_and_both_ways_agree(place, arch, monkeypatch):
    folder, _ = finished(place, "llama", arch)
    monkeypatch.chdir(place)
    row = pd.Series(json.loads((folder / "metrics.json").read_text()))
    own, plain = re.findall(r"```python\n(.*?)```", loading.from_run(row), flags=re.S)
    given = torch.randn(4, row["d_in"], generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn", lambda *shape: given)
    x_hats = []
    for code in (own, plain):
        names = {}
        exec(code, names)
        x_hats.append(names["x_hat"].detach())
    assert torch.allclose(*x_hats, rtol=1e-4, atol=1e-5)
    assert (x_hats[0] != 0).any()


# --- the cards


class Text(HTMLParser):
    """The tags and the text of a piece of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def data():
    context = {"tokens": ["<b>", " &amp", "\n"], "acts": [0.0, 2.0, 1.0], "peak": 1, "whole": False}
    entry = {"fired": 3, "fired_on_sinks": 1, "mean_act": 1.5, "max_act": 2.0, "contexts": [context]}
    entry |= {"promoted": [["<script>", 2.0]], "demoted": [['"x', -1.0]], "neighbours": [[1, 0.5, 3], [9, -0.2, 0]]}
    facts = {"name": "TopK_exp4x_k4", "label": "TopK 4x, K = 4", "arch": "TopK", "run_id": "run", "layer": 1}
    facts |= {"sinks": "apart", "d_sae": 64, "n_val_rows": 100, "n_alive": 45, "all_fired": [3] * 45 + [0] * 19}
    rows = [entry | {"latent": n} for n in range(45)]
    return facts | {"n_sink_rows": 2, "tokens_known": True, "latents": rows}


def test_the_histogram_leaves_the_dead_out_and_says_how_many(data):
    page = latents_page.firing(data)
    assert "the median live latent on 3.0% of the validation rows. 19 of 64 are dead" in page and "<svg" in page
    assert latents_page.firing(data | {"all_fired": []}) == ""


def test_tokens_are_escaped_wherever_they_stand(data):
    html = latents_page.card(data["latents"][0], data) + latents_page.browser(data, "latents/")
    read = Text(html.replace("```{=html}", ""))
    assert not {"script", "b"} & set(read.tags)
    words = "".join(read.words)
    assert "<b> &amp↵" in words and "<script>" in words and '"x' in words
    assert "−1.0" in words and "1 (0.50)" in words and "9 (−0.20, dead)" in words
    assert 'title="2.00"> &amp;amp</strong>' in html and "Fires on <strong>3.0%</strong>" in html


def test_pieces_hand_over_every_card_once_and_old_ones_go(data, tmp_path):
    (tmp_path / "chunk-99.js").write_text("old")
    latents_page.write_chunks(data, tmp_path)
    pieces = sorted(tmp_path.glob("chunk-*.js"))
    assert [piece.name for piece in pieces] == ["chunk-00.js", "chunk-01.js", "chunk-02.js"]
    cards = {}
    for piece in pieces:
        part = json.loads(re.fullmatch(r"saegridLatents\((.*)\)\n", piece.read_text(), flags=re.S)[1])
        assert len(part) <= latents_page.CHUNK
        cards |= part
    assert sorted(map(int, cards)) == list(range(45))
    assert 'href="#latent-1"' in cards["0"] and 'href="#latent-9"' in cards["0"]
    rows = re.findall(r'data-latent="(\d+)" data-chunk="(\d\d)"', latents_page.browser(data, "latents/"))
    assert all(f'"{latent}": ' in (tmp_path / f"chunk-{chunk}.js").read_text() for latent, chunk in rows)


def test_latents_that_were_not_learnt_are_named(data):
    for changes, named in (({}, True), ({"sinks": "keep"}, False), ({"n_sink_rows": 0}, False)):
        assert ("Latents 0 and 1 were not learnt" in latents_page.how(data | changes)) == named


def test_what_can_not_be_shown_is_said(data):
    entry = data["latents"][0] | {"contexts": [], "max_act": 0.0}
    assert "attention sinks only" in latents_page.card(entry, data)
    assert "tokens are not known" in latents_page.card(entry, data | {"tokens_known": False})
    assert "article" not in latents_page.gallery(data | {"latents": []})
