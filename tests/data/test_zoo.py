"""Other people's models: tiny random ones of many architectures, right to 1e-5 or refused in one line."""

import re

import pytest
import torch
import zoo
from tiny import replacing

from saegrid.config.run_config import SITES
from saegrid.data.language_model import hidden_at, logits_from, take_apart

LENGTHS = (24, 13, 7)
DOC = zoo.DOC.read_text()
pytestmark = pytest.mark.usefixtures("one_thread")


def alone(model, module, ids, x=None, before=False):
    """(output of a module, logits) of one text without padding, where x (T, d_in) is its output if given.

    `before`: its input instead of its output.
    """
    seen = []

    def change(rows):
        seen.append(rows.clone().reshape(1, len(ids), -1))
        return rows if x is None else x.reshape(rows.shape).clone()

    with replacing(module, change, before), torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits
    return seen[0][0], logits[0]


def agree(found, wanted, of=None, within=1e-5):
    """Whether two tensors differ by `within` of the largest value of `of` at most (by default, of `wanted`)."""
    return (found - wanted).abs().max() <= within * (wanted if of is None else of).abs().max()


@pytest.mark.parametrize("kind", zoo.RIGHT)
def test_a_model_taken_apart_is_the_model_that_transformers_runs(kind):
    lm = take_apart(zoo.zoo_model(kind, zoo.RIGHT[kind]), None, {}, zoo.LAYER)
    plain = zoo.zoo_model(kind, zoo.RIGHT[kind], "eager")
    plain.load_state_dict(lm.model.state_dict())
    assert zoo.right_row(kind, lm) in DOC.splitlines()
    names = {id(module): name for name, module in lm.model.named_modules()}
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(3, zoo.VOCAB - 2, mask.shape, generator=generator) * mask
    rows = {}
    for site in (site for site in SITES if zoo.has(lm, site)):
        point = (zoo.LAYER, site)
        module, before = plain.get_submodule(names[id(lm.module(*point))]), site == "resid_pre"
        x = rows[site] = hidden_at(lm, ids, mask, *point)
        other = torch.randn(x.shape, generator=generator) * x[mask.bool()].std()
        logits, replaced = logits_from(lm, x, ids, mask, *point), logits_from(lm, other, ids, mask, *point)
        for row, n in enumerate(LENGTHS):
            wanted_x, wanted = alone(plain, module, ids[row, :n], None, before)
            _, wanted_replaced = alone(plain, module, ids[row, :n], other[row, :n], before)
            assert agree(x[row, :n], wanted_x, rows["resid_post"]) and agree(logits[row, :n], wanted), site
            within = 1e-5 if site.startswith("resid") else 1e-4  # experts amplify the rounding
            assert agree(replaced[row, :n], wanted_replaced, None, within), site
            assert not agree(replaced[row, :n], wanted), site
    if len(rows) == len(SITES):
        assert agree((rows["resid_pre"] + rows["attn_out"] + rows["mlp_out"])[mask > 0], rows["resid_post"][mask > 0])
    changed = ids[-1, : LENGTHS[-1]].clone()
    changed[0] += 1
    assert not agree(alone(plain, module, changed)[1][-1], wanted[-1])  # earlier tokens matter


@pytest.mark.parametrize("kind", zoo.REFUSED)
def test_a_model_that_can_not_be_taken_apart_is_one_line(kind):
    line = zoo.row(kind)
    assert zoo.REFUSED[kind][1] in line and line in DOC.splitlines()


def test_the_docs_list_the_zoo():
    lines = [line for line in DOC.splitlines() if re.match(r"\| \w", line) and "`model_type`" not in line]
    rows = {line.split("`")[1]: line for line in lines if "`" in line}
    assert list(rows) == [*zoo.RIGHT, *zoo.REFUSED] and zoo.document(rows) == DOC, "python tests/zoo.py writes it anew"
    assert len(zoo.RIGHT) >= 40
