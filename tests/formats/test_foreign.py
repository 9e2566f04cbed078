"""Configurations of other tools: each field is obeyed, known to change nothing, or the reason why a file is refused."""

import functools
import json
import os
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_formats import D_IN, D_SAE, FACTS, K, assert_same, make, rows
from tokenizers.processors import TemplateProcessing

from saegrid.config.run_config import make_config
from saegrid.core.sae import Gated, JumpReLU, ReLU
from saegrid.data.collect import _starts_alike, collect, open_store
from saegrid.data.prompts import Prompt
from saegrid.errors import SaeFileError
from saegrid.formats import dictionary_learning, export, load_sae, saelens, sparsify
from saegrid.formats.run_folder import save_sae
from saegrid.report.publish import upload

LENS, DICTIONARY, SPARSIFY = "saelens", "dictionary_learning", "sparsify"
CONFIG = {LENS: "cfg.json", DICTIONARY: "config.json", SPARSIFY: "cfg.json"}
OLD = {
    **{"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "apply_b_dec_to_input": False},
    **{"normalize_activations": "none", "finetuning_scaling_factor": False, "sae_lens_training_version": "5.9.1"},
    **{"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "hook_head_index": None},
    **{"context_size": 128, "prepend_bos": True, "dataset_path": "some/data", "dataset_trust_remote_code": True},
    **{"model_from_pretrained_kwargs": {"center_writing_weights": False}, "neuronpedia_id": None},
    **{"seqpos_slice": [None]},
}
"""What every folder of SAELens 3 to 5 has, whatever its architecture."""
TOPK_FN = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
RELU_FN = {"activation_fn_str": "relu", "activation_fn_kwargs": {}}


@functools.cache
def exported(format: str, arch: str) -> dict[str, bytes]:
    """The files of an export: made once, as every file is synced to the disk."""
    with tempfile.TemporaryDirectory() as folder:
        export(make(arch), folder, format, FACTS)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def written(folder: Path, format: str, arch: str = "TopK", edit=None) -> Path:
    """An exported folder whose configuration `edit` changes in place."""
    folder.mkdir(exist_ok=True)
    for name, data in exported(format, arch).items():
        (folder / name).write_bytes(data)
    path = folder / CONFIG[format]
    content = json.loads(path.read_text())
    if edit:
        edit(content)
    path.write_text(json.dumps(content))
    return folder


def old_lens(folder: Path, arch: str = "TopK", edit=None, **changes) -> Path:
    """The same as SAELens before 6.0 wrote it."""
    architecture = json.loads((written(folder, LENS, arch) / "cfg.json").read_text())["architecture"]
    content = {"architecture": architecture, **OLD, **(TOPK_FN if arch == "TopK" else RELU_FN), **changes}
    if edit:
        edit(content)
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def edited(format, arch="TopK", **changes):
    return lambda folder: written(folder, format, arch, lambda c: c.update(changes))


def edited_part(format, part, arch="TopK", **changes):
    return lambda folder: written(folder, format, arch, lambda c: c.setdefault(part, {}).update(changes))


def without(format, *names, arch="TopK"):
    return lambda folder: written(folder, format, arch, lambda c: [c.pop(name) for name in names])


def old(arch="TopK", **changes):
    return lambda folder: old_lens(folder, arch, **changes)


def old_without(*names, arch="TopK"):
    return lambda folder: old_lens(folder, arch, lambda c: [c.pop(name) for name in names])


NEEDED = {
    LENS: "k dtype apply_b_dec_to_input d_sae architecture normalize_activations reshape_activations",
    SPARSIFY: "k d_in activation transcode skip_connection",
}
OLD_NEEDED = "dtype hook_name architecture apply_b_dec_to_input normalize_activations"
REFUSED = {
    # a field that decides the result is not there
    **{f"{f}: no {n}": (without(f, n), f"{n} is missing") for f, names in NEEDED.items() for n in names.split()},
    "saelens: no metadata": (without(LENS, "metadata"), "activation_fn is missing"),
    "saelens 6.54 without rescale": (
        lambda folder: written(
            folder,
            LENS,
            edit=lambda c: (c.pop("rescale_acts_by_decoder_norm"), c["metadata"].update(sae_lens_version="6.54.12")),
        ),
        "rescale_acts_by_decoder_norm is missing",
    ),
    **{f"old: no {n}": (old_without(n), f"{n} is missing") for n in OLD_NEEDED.split()},
    "old: no activation": (old_without("activation_fn_str"), "activation_fn is missing"),
    "old: no k": (old_without("activation_fn_kwargs"), "k is missing"),
    "old: an empty activation_fn_kwargs": (old(activation_fn_kwargs={}), "k is missing"),
    "dictionary: no class": (
        lambda folder: written(folder, DICTIONARY, edit=lambda c: c["trainer"].pop("dict_class")),
        "dict_class is missing",
    ),
    # a value without a counterpart
    **{
        f"saelens: {name} = {value}": (edited(LENS, **{name: value}), f"{name} = {value!r}")
        for name, value in (
            *((("architecture", kind)) for kind in ("abstopk", "batchtopk", "transcoder", "matching_pursuit")),
            *(("normalize_activations", kind) for kind in ("layer_norm", "expected_average_only_in", None)),
            *(("reshape_activations", "hook_z"), ("dtype", "int8"), ("apply_b_dec_to_input", 1)),
            *(("finetuning_scaling_factor", True), ("k", True), ("k", 7.5), ("rescale_acts_by_decoder_norm", 1)),
        )
    },
    "saelens: one head": (edited_part(LENS, "metadata", hook_head_index=3), r"metadata\.hook_head_index = 3"),
    "saelens: k of a ReLU": (edited(LENS, "ReLU", k=8), "k = 8: standard takes none"),
    "saelens: rescaled Gated": (
        edited(LENS, "Gated", rescale_acts_by_decoder_norm=True),
        "rescale_acts_by_decoder_norm = True: gated takes none",
    ),
    **{
        f"old: normalize_activations = {value}": (
            old(normalize_activations=value),
            f"normalize_activations = {value!r}",
        )
        for value in (True, "expected_average_only_in", "constant_norm_rescale", "layer_norm")
    },
    "old: tanh": (old("ReLU", activation_fn_str="tanh-relu"), "activation_fn = 'tanh-relu'"),
    "old: topk with a ReLU": (old(activation_fn_str="relu"), "activation_fn = 'relu': does not fit topk"),
    "old: Gated with topk": (old("Gated", **TOPK_FN), "activation_fn = 'topk': does not fit gated"),
    "old: two activations": (old(activation_fn="relu"), "activation_fn = 'relu', but its other name has 'topk'"),
    "old: another function within topk": (
        old(activation_fn_kwargs={"k": K, "postact_fn": "tanh"}),
        "activation_fn_kwargs.postact_fn = 'tanh'",
    ),
    "old: two k": (old(k=8), r"k = 8, but activation_fn_kwargs\.k = 7"),
    "old: k above d_sae": (old(activation_fn_kwargs={"k": 97}), "k = 97: must be from 1 to d_sae = 96"),
    "old: k of a ReLU": (old("ReLU", activation_fn_kwargs={"k": 8}), "k = 8: standard takes none"),
    "old: all heads": (old(hook_name="blocks.1.attn.hook_z"), "hook_name = 'blocks.1.attn.hook_z'"),
    "old: one head": (old(hook_head_index=2), "hook_head_index = 2"),
    "old: finetuned": (old(finetuning_scaling_factor=True), "finetuning_scaling_factor = True"),
    **{
        f"sparsify: {name} = {value}": (edited(SPARSIFY, **{name: value}), f"{name} = {value!r}")
        for name, value in (
            *(("signed", True), ("transcode", True), ("skip_connection", True), ("activation", "groupmax")),
            *(("k", None), ("d_in", 25)),
        )
    },
    "sparsify: another size": (edited(SPARSIFY, num_latents=95), "d_sae = 95, but the weights have 96"),
    "dictionary: k of a ReLU": (edited_part(DICTIONARY, "trainer", "ReLU", k=8), "k = 8: AutoEncoder takes none"),
    "dictionary: a transcoder": (edited_part(DICTIONARY, "buffer", io="in_and_out"), r"buffer\.io = 'in_and_out'"),
    # a field that nobody knows
    "saelens: unknown": (edited(LENS, topk_variant="abs"), "topk_variant = 'abs': an unknown field"),
    "saelens: an old name in a new folder": (edited(LENS, activation_fn_str="topk"), "activation_fn_str = 'topk'"),
    "old: unknown": (old(out_hook_point="blocks.2.hook_mlp_out"), "out_hook_point = .*: an unknown field"),
    "sparsify: unknown": (edited(SPARSIFY, encoder_halut=True), "encoder_halut = True: an unknown field"),
    "dictionary: unknown": (edited(DICTIONARY, norm_factor=2.5), r"norm_factor = 2\.5: an unknown field"),
    "dictionary: unknown in trainer": (
        edited_part(DICTIONARY, "trainer", apply_b_dec_to_input=True),
        "apply_b_dec_to_input = True: an unknown field",
    ),
    "a name without end": (edited(LENS, **{"x" * 9999: "y" * 9999}), "x{40} = 'y"),
    "metadata of another type": (edited(LENS, metadata=[1]), r"metadata = \[1\]"),
    "trainer of another type": (edited(DICTIONARY, trainer=[1]), r"trainer = \[1\]"),
    "no trainer": (edited(DICTIONARY, trainer=None), "trainer = None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_that_decides_is_never_guessed(case, tmp_path):
    make_folder, why = REFUSED[case]
    with pytest.raises(SaeFileError, match=why) as error:
        load_sae(make_folder(tmp_path / "sae"))
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value)) < 600


def test_fields_that_change_nothing_are_passed_over(tmp_path):
    """All at once, and with values that would be refused elsewhere."""
    whatever = {"anything": [1, None]}
    expected = load_sae(written(tmp_path / "plain", LENS))
    new = written(tmp_path / "new", LENS, edit=lambda c: c.update(dict.fromkeys(saelens.INERT, whatever)))
    before = old_lens(tmp_path / "old", **dict.fromkeys(saelens.OLD_INERT, whatever))
    for folder in (new, before, written(tmp_path / "meta", LENS, edit=lambda c: c["metadata"].update(whatever))):
        assert_same(load_sae(folder), expected)
    trained = dict.fromkeys(dictionary_learning.INERT, whatever)
    buffer = {"io": "out", "d_submodule": 24, "ctx_len": 128, "whatever": whatever}
    for name, part in (("trainer", trained), ("buffer", buffer)):
        assert_same(load_sae(edited_part(DICTIONARY, name, **part)(tmp_path / name)), expected)
    assert_same(load_sae(edited(SPARSIFY, **dict.fromkeys(sparsify.INERT, whatever))(tmp_path / "sparsify")), expected)


@pytest.mark.parametrize(
    ("arch", "edit"),
    [
        ("TopK", {}),
        ("TopK", {"architecture": "standard"}),  # before topk was an architecture
        ("TopK", {"activation_fn": "topk", "activation_fn_str": "topk", "k": K}),
        ("TopK", {"normalize_activations": False, "reshape_activations": "none"}),
        ("ReLU", {}),
        ("ReLU", {"activation_fn_kwargs": None, "normalize_activations": None}),
        ("JumpReLU", {}),
        ("Gated", {}),
    ],
)
def test_folders_of_older_saelens(arch, edit, tmp_path):
    expected = load_sae(export(make(arch), tmp_path / "new", LENS))
    got = load_sae(old_lens(tmp_path / "old", arch, **edit))
    assert (got.arch, got.k, got.threshold) == (arch, expected.k, expected.threshold)
    assert_same(got, expected)


def test_the_oldest_names_of_a_hook_and_a_scaling_without_use(tmp_path):
    folder = old_lens(tmp_path, "ReLU")
    path, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    content = json.loads(path.read_text())
    names = {new: name for name, new in saelens.OLD_NAMES.items()} | {"activation_fn": "activation_fn"}
    content["activation_fn"] = content.pop("activation_fn_str")
    path.write_text(json.dumps({names.get(name, name): value for name, value in content.items()}))
    tensors = load_file(weights)
    save_file(tensors | {"scaling_factor": torch.ones(D_SAE)}, weights)
    assert_same(load_sae(folder), load_sae(export(make("ReLU"), tmp_path / "new", LENS)))
    for factors, why in ((torch.full((D_SAE,), 1.1), "not all ones"), (torch.ones(3), "scaling_factor has shape")):
        save_file(tensors | {"scaling_factor": factors}, weights)
        with pytest.raises(SaeFileError, match=why):
            load_sae(folder)


def test_a_topk_from_before_its_rescaling(tmp_path):
    """Versions 6.0 to 6.13 did not know of it, so that they did not rescale."""

    def edit(content):
        del content["rescale_acts_by_decoder_norm"]
        content["metadata"]["sae_lens_version"] = "6.13.1"

    assert_same(load_sae(written(tmp_path / "a", LENS, edit=edit)), load_sae(written(tmp_path / "b", LENS)))


def test_sparsify_before_1_0(tmp_path):
    """TopK alone, and no field said so."""

    def edit(content):
        for name in ("activation", "skip_connection", "transcode", "multi_topk"):
            del content[name]
        content |= {"num_latents": 0, "expansion_factor": 4, "signed": False}

    assert_same(load_sae(written(tmp_path / "a", SPARSIFY, edit=edit)), load_sae(written(tmp_path / "b", SPARSIFY)))


def test_a_dictionary_whose_k_is_in_its_configuration_alone(tmp_path):
    expected = load_sae(written(tmp_path / "new", DICTIONARY))
    folder = written(tmp_path / "old", DICTIONARY)
    state = torch.load(folder / "ae.pt", weights_only=True)
    del state["k"], state["threshold"]
    torch.save(state, folder / "ae.pt")
    assert_same(load_sae(folder), expected)
    content = json.loads((folder / "config.json").read_text())
    del content["trainer"]["k"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(SaeFileError, match="k is missing"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda s: s.pop("threshold"), "threshold is missing"),
        (lambda s: s.pop("k"), "k is missing"),
        (lambda s: s.update(threshold=torch.ones(D_SAE)), "threshold is not one finite number"),
        (lambda s: s.update(threshold=torch.tensor(1j)), "threshold is not one finite number"),
        (lambda s: s.update(k=torch.tensor(7.5)), r"k = 7\.5: must be a whole number"),
        (lambda s: s.update(k=torch.tensor(True)), "k is not one finite number"),
        (lambda s: s.update(k=torch.ones(2, 2)), "k is not one finite number"),
        (lambda s: s.update(group_sizes=torch.tensor([96])), "found"),
    ],
)
def test_a_batchtopk_dictionary_without_its_cut(edit, why, tmp_path):
    folder = written(tmp_path, DICTIONARY, "BatchTopK")
    state = torch.load(folder / "ae.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "ae.pt")
    with pytest.raises(SaeFileError, match=why):
        load_sae(folder)


def test_groups_that_are_not_all_latents(tmp_path):
    folder = written(tmp_path, DICTIONARY, "BatchTopK", lambda c: c["trainer"].update(dict_class=NESTED))
    state = torch.load(folder / "ae.pt", weights_only=True)
    nested = {"W_enc": state["encoder.weight"].T, "b_enc": state["encoder.bias"], "W_dec": state["decoder.weight"].T}
    nested |= {name: state[name] for name in ("b_dec", "k", "threshold")}
    for groups in (None, torch.tensor([48, 49]), torch.tensor([96, 0]), torch.ones(2, 2), torch.tensor([48.0, 48.0])):
        torch.save(nested | ({} if groups is None else {"group_sizes": groups}), folder / "ae.pt")
        with pytest.raises(SaeFileError, match="group_sizes"):
            load_sae(folder)


NESTED = "MatryoshkaBatchTopKSAE"


def test_a_dtype_rounds_the_weights_as_saelens_does(tmp_path):
    folder = written(tmp_path, LENS, "ReLU", lambda c: c.update(dtype="bfloat16"))
    stored = load_file(folder / "sae_weights.safetensors")
    assert torch.equal(load_sae(folder).W_dec, stored["W_dec"].bfloat16().float())
    written(tmp_path, LENS, "ReLU", lambda c: c.update(dtype="float16"))
    save_file(stored | {"b_dec": torch.full((D_IN,), 1e5)}, folder / "sae_weights.safetensors")
    with pytest.raises(SaeFileError, match="b_dec holds values that dtype = 'float16' can't hold"):
        load_sae(folder)


@pytest.mark.parametrize("format", [LENS, DICTIONARY])
def test_a_gate_and_a_magnitude_of_their_own(format, tmp_path):
    """z = [x W + b_gate > 0] ReLU(x W exp(r) + b_mag), with whatever sign and size."""
    generator = torch.Generator().manual_seed(3)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_IN, D_SAE), (D_SAE, D_IN)))
    gate, mag, r = (torch.randn(D_SAE, generator=generator) * scale for scale in (8, 8, 0.7))
    b_dec = torch.randn(D_IN, generator=generator)
    folder = written(tmp_path, format, "Gated")
    if format == LENS:
        state = {"W_enc": W_enc, "W_dec": W_dec, "b_gate": gate, "b_mag": mag, "r_mag": r, "b_dec": b_dec}
        save_file(state, folder / "sae_weights.safetensors")
    else:
        state = {"encoder.weight": W_enc.T, "decoder.weight": W_dec.T, "gate_bias": gate, "mag_bias": mag, "r_mag": r}
        torch.save(state | {"decoder_bias": b_dec}, folder / "ae.pt")
    sae, x = load_sae(folder), rows()[3:]
    pre = ((x if format == LENS else x - b_dec) @ W_enc).double()
    z = ((pre + gate > 0) * (pre * r.exp() + mag).relu()).float()
    assert sae.arch == "Gated" and torch.equal(sae.encode(x) > 0, z > 0)
    torch.testing.assert_close(sae.encode(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), z @ W_dec + b_dec, rtol=1e-4, atol=1e-3)
    published = load_sae(export(sae, tmp_path / "again", "published"))
    assert published.arch == "Gated"
    assert_same(published, sae)


def test_a_magnitude_without_bounds(tmp_path):
    folder = written(tmp_path, LENS, "Gated")
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"r_mag": torch.full((D_SAE,), 1e4)}, folder / "sae_weights.safetensors")
    with pytest.raises(SaeFileError, match="r_mag is too large"):
        load_sae(folder)


def test_a_relu_dictionary_has_decoder_rows_of_norm_1(tmp_path):
    """dictionary_learning sets them so when it loads an AutoEncoder: other rows go out as thresholds of 0."""
    sae = make("ReLU")
    folder = export(sae, tmp_path / "a", DICTIONARY)
    state = torch.load(folder / "ae.pt", weights_only=True)
    factors = torch.linspace(0.5, 2, D_SAE)
    torch.save(state | {"decoder.weight": state["decoder.weight"] * factors}, folder / "ae.pt")
    scaled, x = load_sae(folder), rows()
    expected = sae.encode(x) * factors
    assert ((scaled.encode(x) - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
    torch.save(state | {"decoder.weight": state["decoder.weight"] * (factors > 1)}, folder / "ae.pt")
    with pytest.raises(SaeFileError, match="norms of their decoder rows, and one of these is 0"):
        load_sae(folder)
    sae.W_dec.data *= factors[:, None]
    again = load_sae(export(sae, tmp_path / "b", DICTIONARY))
    assert type(again) is JumpReLU and again.threshold == 0.0
    assert_same(again, sae)


@pytest.mark.parametrize("arch", ["ReLU", "Gated"])
def test_no_k_is_not_a_k(arch, tmp_path):
    sae = load_sae(export(make(arch), tmp_path / "lens", LENS))
    assert type(sae) in (ReLU, Gated) and sae.k == 0
    save_sae(sae, tmp_path / "own", "x", {})
    for folder in (tmp_path / "own", export(sae, tmp_path / "p", "published")):
        assert_same(load_sae(folder), sae)


# --- what an export tells ---


def metadata(folder, facts, sae=None):
    export(sae or make("TopK"), folder, LENS, facts)
    return json.loads((folder / "cfg.json").read_text())["metadata"]


def test_what_is_not_known_is_left_out(tmp_path):
    told = metadata(tmp_path / "a", {"layer": None, "model": None, "prepend_bos": None})
    assert {"hook_name", "model_name", "prepend_bos", "context_size", "dataset_path"}.isdisjoint(told)
    told = metadata(tmp_path / "b", FACTS | {"context_size": 77, "prepend_bos": True})
    assert (told["hook_name"], told["context_size"]) == ("blocks.12.hook_resid_post", 77)
    assert (told["prepend_bos"], told["dataset_path"], told["model_name"]) == (True, "some/data", "some/model")
    for site in ("resid_pre", "mlp_out", "attn_out"):  # TransformerLens' names
        facts = FACTS | {"site": site}
        assert metadata(tmp_path / f"lens-{site}", facts)["hook_name"] == f"blocks.12.hook_{site}"
        export(make("TopK"), tmp_path / site, DICTIONARY, facts)
        trainer = json.loads((tmp_path / site / "config.json").read_text())["trainer"]
        assert (trainer["submodule_name"], trainer["layer"]) == (f"{site}_layer_12", 12)
        assert load_sae(tmp_path / site).d_in == load_sae(tmp_path / f"lens-{site}").d_in
    assert metadata(tmp_path / "c", FACTS)["context_size"] == 512  # of a run from before it was recorded
    told = metadata(tmp_path / "d", FACTS | {"activations": "some/rows"})  # the dataset is the evaluation's then
    assert {"context_size", "dataset_path", "prepend_bos"}.isdisjoint(told) and told["model_name"] == "some/model"
    export(make("TopK"), tmp_path / "e", DICTIONARY, {"layer": None})
    assert {"layer", "lm_name"}.isdisjoint(json.loads((tmp_path / "e/config.json").read_text())["trainer"])


@pytest.mark.parametrize("format", ["published", LENS, DICTIONARY, SPARSIFY])
@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"created": Path("here")}, "facts: created = .*Path.*: JSON can't hold it"),
        ({"loss": float("nan")}, "facts: loss = nan: JSON can't hold it"),
        ({"rows": torch.ones(2)}, "facts: rows = tensor"),
        ({"tags": {"a"}}, "facts: tags = "),
        ({("a", "b"): 1}, "JSON can't hold it"),
        ({"layer": "12"}, "facts: layer = '12'"),
        ({"layer": -1}, "facts: layer = -1"),
        ({"layer": True}, "facts: layer = True"),
        ({"model": 5}, "facts: model = 5"),
        ({"prepend_bos": "yes"}, "facts: prepend_bos = 'yes'"),
        ({"max_tokens": 0}, "facts: max_tokens = 0"),
        ([1], r"facts = \[1\]: must be a dict of names and values"),
    ],
)
def test_a_fact_that_can_not_be_told_writes_nothing(format, facts, why, tmp_path):
    with pytest.raises(SaeFileError, match=why):
        export(make("TopK"), tmp_path / "out", format, facts)
    assert not (tmp_path / "out").exists()


def test_a_gated_sae_is_released_as_what_it_is(tmp_path):
    sae = make("Gated")
    digest = save_sae(sae, tmp_path / "run", "Gated_exp4x_k7", {"layer": 3, "prepend_bos": True})
    upload._write_sae(tmp_path / "run", {"weights_sha256": digest, "name": "a"}, tmp_path / "part", "a")
    cfg = json.loads((tmp_path / "part/saelens/a/cfg.json").read_text())
    assert (cfg["architecture"], cfg["metadata"]["prepend_bos"]) == ("gated", True)
    assert_same(load_sae(tmp_path / "part/saelens/a"), sae)


def test_prompts_that_do_not_begin_alike():
    prompts = [Prompt([0, 5], 0), Prompt([0, 6], 1)]
    assert _starts_alike(prompts, 0) is True
    assert _starts_alike(prompts, 9) is False and _starts_alike(prompts, None) is False
    assert _starts_alike([*prompts, Prompt([7, 8], 2)], 0) is None


def bos_model(folder: Path, start: str) -> str:
    """A tiny model whose tokenizer has a start token and puts it before every text, or before none."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.bos_token = "<end>"
    if start:
        processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
        tokenizer.backend_tokenizer.post_processor = processor
    tiny.tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_run(tmp_path: Path, start: str):
    places = {"store_dir": str(tmp_path / "stores"), "runs_dir": str(tmp_path / "runs")}
    texts = {"model": bos_model(tmp_path / "model", start), "dataset": tiny.save_dataset(tmp_path / "data", 60, 20)}
    return make_config(arch="TopK", k=4, expansion=2, epochs=1, **tiny.SMALL, **places, **texts)


def test_a_runs_export_tells_how_its_rows_were_made(tmp_path):
    run = tiny.finished(small_run(tmp_path, "<end>"))
    cfg = json.loads((run.folder / "cfg.json").read_text())
    longest = int(run.store.meta("train")["positions"].max()) + 1
    assert (cfg["prepend_bos"], cfg["context_size"]) == (True, longest) and longest < 64
    told = metadata(tmp_path / "lens", cfg, load_sae(run.folder))
    assert (told["prepend_bos"], told["context_size"]) == (True, longest)
    older = {name: value for name, value in cfg.items() if name not in ("prepend_bos", "context_size")}
    (run.folder / "cfg.json").write_text(json.dumps(older))
    os.remove(run.folder / "SHA256SUMS")
    assert load_sae(run.folder).k == 4
    assert "prepend_bos" not in metadata(tmp_path / "older", older, load_sae(run.folder))


def test_a_start_token_that_is_not_used(tmp_path):
    config = small_run(tmp_path, "")
    collect(config, device="cpu")
    assert open_store(config).manifest["data"]["prepend_bos"] is False
