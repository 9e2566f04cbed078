"""SAEs in every format: out and back by our own reader, and files that must be refused."""

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from hub_server import serve
from processes import in_another_process
from published import CLASSES
from safetensors.torch import load_file, save_file

import saegrid
from saegrid.config.architectures import ARCHITECTURES
from saegrid.core.sae import SAE, SAE_CLASSES, JumpReLU
from saegrid.errors import SaeFileError
from saegrid.formats import export, load_sae
from saegrid.formats.run_folder import load_folder, save_sae

D_IN, D_SAE, K = 24, 96, 7
TRAINED = "JumpReLU, a theta for each latent"
FACTS = {"model": "some/model", "layer": 12, "max_tokens": 512, "dataset": "some/data"}


def filled(sae: SAE) -> SAE:
    """Random weights, every bias at work, decoder rows of unit norm."""
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def make(arch: str) -> SAE:
    if arch == "JumpReLU":
        return filled(JumpReLU(D_IN, D_SAE, threshold=3.7))
    if arch == TRAINED:
        sae = filled(JumpReLU(D_IN, D_SAE, k=K, theta=torch.zeros(D_SAE)))
        sae.theta.copy_(torch.linspace(0, 6, D_SAE))
        return sae
    sae = filled(SAE_CLASSES[arch](D_IN, D_SAE, k=K, theta=torch.zeros(D_SAE) if arch == "Gated" else None))
    if arch == "Gated":
        sae.theta.copy_(torch.linspace(0, 6, D_SAE))
    sae.inference_threshold = 4.3 if ARCHITECTURES[arch].batch_cut else None
    return sae


def rows(n=200):
    x = 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2))
    x[:3] *= 25_000 / x[:3].norm(dim=1, keepdim=True)  # attention sinks
    return x


def assert_same(ours: SAE, theirs: SAE):
    x = rows()
    assert torch.equal(ours.encode(x) > 0, theirs.encode(x) > 0)
    assert ((ours(x) - theirs(x)).norm(dim=1) / x.norm(dim=1)).max() < 1e-5


CELLS = [
    *((arch, "published", arch) for arch in SAE_CLASSES),
    *((arch, format, arch) for arch in ("ReLU", "Gated") for format in ("saelens", "dictionary_learning")),
    *((TRAINED, format, "JumpReLU") for format in ("published", "saelens", "dictionary_learning")),
    *(("Matryoshka", "saelens", "JumpReLU"), ("Matryoshka", "dictionary_learning", "BatchTopK")),
    *(("TopK", "saelens", "TopK"), ("BatchTopK", "saelens", "JumpReLU"), ("JumpReLU", "saelens", "JumpReLU")),
    *((arch, "dictionary_learning", arch) for arch in ("TopK", "BatchTopK", "JumpReLU")),
    ("TopK", "sparsify", "TopK"),
]


@pytest.mark.parametrize(("arch", "format", "back_as"), CELLS)
def test_out_and_back(arch, format, back_as, tmp_path):
    sae = make(arch)
    where = export(sae, tmp_path / "a", format, FACTS)
    back = saegrid.load_sae(where)
    assert type(back).__name__ == back_as
    assert back.k == (sae.k if back_as in ("TopK", "BatchTopK") or format == "published" else 0)
    assert_same(sae, back)
    again = export(back, tmp_path / "b", format, FACTS)
    assert_same(back, load_sae(again))
    export(sae, tmp_path / "a", format, FACTS)  # the same format may be written again: the same bytes
    export(sae, tmp_path / "c", format, FACTS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


@pytest.mark.parametrize("arch", ["BatchTopK", "Matryoshka", TRAINED, "ReLU", "Gated"])
def test_a_run_folder_and_each_of_its_files(arch, tmp_path):
    sae = make(arch)
    for folder in (tmp_path, tmp_path / "again"):
        save_sae(sae, folder, f"{sae.arch}_exp4x_k7", {"expansion": 4})
    for source in (tmp_path, tmp_path / "sae.safetensors", tmp_path / f"{sae.arch}_exp4x_k7.pt"):
        back = load_sae(str(source))
        assert (back.arch, back.k, back.inference_threshold) == (sae.arch, K, sae.inference_threshold)
        assert all(torch.equal(a, b) for a, b in zip(back.params, sae.params, strict=True))
    assert json.loads((tmp_path / "cfg.json").read_text())["expansion"] == 4
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_changed_byte_of_a_run_folder_is_found(tmp_path):
    save_sae(make("TopK"), tmp_path, "name", {})
    weights = tmp_path / "sae.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SaeFileError, match="SHA-256"):
        load_folder(tmp_path)
    weights.unlink()
    with pytest.raises(SaeFileError, match="No such file"):
        load_folder(tmp_path)


@pytest.mark.parametrize("arch", CLASSES)
def test_the_published_form_holds_the_published_class(arch, tmp_path):
    sae = make(arch)
    path = export(sae, tmp_path, "published")
    theirs = CLASSES[arch](D_IN, D_SAE, k=K, threshold=3.7)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    path.with_suffix(".json").unlink()
    ours = load_sae(path)  # the name alone tells
    assert (ours.arch, ours.k, ours.inference_threshold) == (arch, sae.k, None)
    x = rows()
    with torch.no_grad():
        assert torch.equal(ours.encode(x) > 0, theirs.encode(x) > 0)
        assert ((ours(x) - theirs(x)).norm(dim=1) / x.norm(dim=1)).max() < 1e-5


def test_the_batch_cut_and_the_thresholded_form_are_told_apart(tmp_path):
    path = export(make("BatchTopK"), tmp_path / "p", "published")
    x = rows()
    with_threshold = load_sae(path)
    path.with_suffix(".json").unlink()
    per_batch, given = load_sae(path), load_sae(path, threshold=4.3)
    for sae, same in ((with_threshold, True), (given, True), (per_batch, False)):
        alone = torch.cat([sae.encode(x[i : i + 1]) for i in range(len(x))])
        assert torch.equal(alone > 0, sae.encode(x) > 0) is same
    for format in ("saelens", "dictionary_learning"):
        with pytest.raises(SaeFileError, match="no calibrated threshold and cuts per batch"):
            export(per_batch, tmp_path / format, format)
        assert not (tmp_path / format).exists()
    assert_same(load_sae(export(given, tmp_path / "s", "saelens")), with_threshold)
    state = torch.load(export(given, tmp_path / "d", "dictionary_learning") / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "d/ae.pt")  # as it is before training sets it
    assert load_sae(tmp_path / "d").inference_threshold is None
    assert load_sae(tmp_path / "d", threshold=4.3).inference_threshold == 4.3


def test_a_nested_dictionary_is_read_as_batchtopk(tmp_path):
    """MatryoshkaBatchTopKSAE names and turns its tensors in its own way, and has its groups' sizes besides."""
    folder = export(make("BatchTopK"), tmp_path, "dictionary_learning")
    expected = load_sae(folder)
    old = torch.load(folder / "ae.pt", weights_only=True)
    new = {"W_enc": old["encoder.weight"].T, "b_enc": old["encoder.bias"], "W_dec": old["decoder.weight"].T}
    new |= {name: old[name] for name in ("b_dec", "k", "threshold")} | {"group_sizes": torch.tensor([48, 48])}
    torch.save(new, folder / "ae.pt")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("BatchTopKSAE", "MatryoshkaBatchTopKSAE"))
    assert_same(load_sae(folder), expected)


def test_a_theta_with_more_digits_than_its_name(tmp_path):
    sae = make("JumpReLU")
    sae.threshold = 1.2345678901234567
    assert load_sae(export(sae, tmp_path, "published")).threshold == sae.threshold
    # a threshold in units of the RMS gives the file its name, and the sidecar has the activations' own
    named = export(sae, tmp_path, "published", {"name": "JumpReLU_exp4x_t0.5", "threshold_unit": "rms"})
    assert load_sae(named).threshold == sae.threshold


def test_one_threshold_per_latent_is_kept(tmp_path):
    sae, x = make(TRAINED), rows()
    sae.k = 0  # as another library's is read
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    assert torch.allclose(sae.encode(x), pre * (pre > sae.theta), rtol=1e-4, atol=1e-2)
    assert torch.equal(sae.encode(x) > 0, pre > sae.theta)
    for format in ("saelens", "dictionary_learning", "published"):
        back = load_sae(export(sae, tmp_path / format, format), arch="JumpReLU")
        assert torch.equal(back.theta, sae.theta)
        assert_same(sae, back)


def test_thresholds_that_can_not_be(tmp_path):
    path = export(make(TRAINED), tmp_path, "published")
    state = torch.load(path, weights_only=True)
    for threshold, reason in ((state["threshold"] - 1, "below 0"), (torch.ones(3), "threshold has shape")):
        torch.save(state | {"threshold": threshold}, path)
        with pytest.raises(SaeFileError, match=reason):
            load_sae(path)
    topk = export(make("TopK"), tmp_path, "published")
    torch.save(torch.load(topk, weights_only=True) | {"threshold": torch.ones(D_SAE)}, topk)
    with pytest.raises(SaeFileError, match="arch = 'TopK'"):
        load_sae(topk)


def test_a_single_file_in_a_folder_needs_no_name(tmp_path):
    export(make("TopK"), tmp_path, "published")
    assert load_sae(tmp_path).arch == "TopK"
    export(make("JumpReLU"), tmp_path, "published")
    with pytest.raises(SaeFileError, match=r"2 \.pt files; name one"):
        load_sae(tmp_path)


def test_a_renamed_file_needs_to_be_told(tmp_path):
    path = export(make("TopK"), tmp_path, "published", {"name": "mine"})
    path.with_suffix(".json").unlink()
    with pytest.raises(SaeFileError, match=r"mine\.pt: its architecture is unknown: give arch="):
        load_sae(path)
    for parameters, why in (
        ({"arch": "TopK"}, "TopK's k is unknown: give k="),
        ({"arch": "JumpReLU"}, "JumpReLU's threshold is unknown: give threshold="),
        ({"arch": "TopK", "k": 97}, "k = 97: must be from 1 to d_sae = 96"),
        ({"arch": "TopK", "k": 7, "threshold": 0.5}, "threshold = 0.5: not a parameter of TopK"),
        ({"arch": "JumpReLU", "k": 7, "threshold": 0.5}, "k = 7: not a parameter of JumpReLU"),
        ({"arch": "Relu"}, "arch = 'Relu': must be one of TopK, BatchTopK, JumpReLU"),
        ({"arch": "Gated"}, "Gated's theta per latent is missing"),
        ({"arch": "TopK", "k": -1}, "k = -1: must be a whole number"),
        ({"arch": "JumpReLU", "threshold": float("nan")}, "threshold = nan: must be a number above 0"),
    ):
        with pytest.raises(SaeFileError, match=why):
            load_sae(path, **parameters)
    assert_same(load_sae(path, arch="TopK", k=K), make("TopK"))
    path = path.rename(tmp_path / "TopK_exp4x_k0.pt")
    with pytest.raises(SaeFileError, match="k = 0: must be from 1 to d_sae = 96"):
        load_sae(path)


def test_contradictions_are_told(tmp_path):
    path = export(make("TopK"), tmp_path, "published", {"name": "TopK_exp4x_k8"})
    with pytest.raises(SaeFileError, match=r"k is 7 by TopK_exp4x_k8\.json, but 8 by its name"):
        load_sae(path)
    path = export(make("TopK"), tmp_path, "published")
    with pytest.raises(SaeFileError, match=r"k is 9 by what is given, but 7 by TopK_exp4x_k7\.json"):
        load_sae(path, k=9)
    with pytest.raises(SaeFileError, match="arch is JumpReLU by what is given, but TopK by"):
        load_sae(path, arch="JumpReLU", threshold=1.0)
    other = path.rename(tmp_path / "TopK_exp8x_k7.pt")
    with pytest.raises(SaeFileError, match=r"its name says d_sae = 8 \* 24, but the weights have 96"):
        load_sae(other)
    folder = export(make("JumpReLU"), tmp_path / "lens", "saelens")
    for parameters in ({"arch": "TopK"}, {"k": 3}, {"threshold": 3.8}):
        with pytest.raises(SaeFileError, match=rf"{next(iter(parameters))} (is|=)"):
            load_sae(folder, **parameters)
    assert load_sae(folder, arch="JumpReLU", threshold=3.7).arch == "JumpReLU"


def test_an_export_does_not_overwrite_another_sae(tmp_path):
    save_sae(make("TopK"), tmp_path, "x", {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for format in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(SaeFileError, match="already holds another SAE"):
            export(make("TopK"), tmp_path, format)
    with pytest.raises(SaeFileError, match="format = 'onnx': must be one of published"):
        export(make("TopK"), tmp_path, "onnx")
    with pytest.raises(SaeFileError, match=r"name = '\.\./x'"):
        export(make("TopK"), tmp_path, "published", {"name": "../x"})
    for arch in ("BatchTopK", "JumpReLU"):
        with pytest.raises(SaeFileError, match=f"sparsify: {arch}: its folders hold TopK only"):
            export(make(arch), tmp_path / "new", "sparsify")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_half_precision_is_read_as_float32(tmp_path):
    folder = export(make("TopK"), tmp_path, "saelens")
    path = folder / "sae_weights.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert {tensor.dtype for tensor in load_sae(folder).params} == {torch.float32}


# --- files that must be refused: one line, nothing executed ---


class Attack:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def edited_pt(edit, name="TopK_exp4x_k7.pt", format="published"):
    """A change of the state dict in a `.pt` file."""

    def spoil(tmp_path):
        folder = tmp_path / "sae"
        export(make("TopK"), folder, format)
        state = torch.load(folder / name, weights_only=True)
        torch.save(edit(state) or state, folder / name)
        return folder / name

    return spoil


def edited_weights(edit, format="saelens", arch="TopK"):
    """A change of the tensors in a safetensors file."""

    def spoil(tmp_path):
        folder = export(make(arch), tmp_path / "sae", format)
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        return folder

    return spoil


def edited_cfg(edit, format="saelens", arch="TopK"):
    """A change of the object in a configuration."""

    def spoil(tmp_path):
        folder = export(make(arch), tmp_path / "sae", format)
        path = next(folder.glob("c*.json"))
        cfg = json.loads(path.read_text())
        edit(cfg)
        path.write_text(json.dumps(cfg))
        return folder

    return spoil


def own_cfg(**changes):
    def spoil(tmp_path):
        save_sae(make("TopK"), tmp_path / "sae", "x", {})
        path = tmp_path / "sae/cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "sae"

    return spoil


def content(name, make_bytes):
    """Other bytes in place of one file: a function of the old ones."""

    def spoil(tmp_path):
        folder = tmp_path / "sae"
        export(make("TopK"), folder, "published" if name == PT else "saelens")
        path = folder / name
        path.write_bytes(make_bytes(path.read_bytes()))
        return path if name == PT else folder

    return spoil


def header(text, length=None):
    """A safetensors file of this header, and of a length that it only states."""
    return struct.pack("<Q", length or len(text)) + text + b"\0" * 8


def script_archive(_):
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def zip_without_tensors(_):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"b_pre": Attack()}, protocol=2))
        archive.writestr("x/version", "3")
    return buffer.getvalue()


PT = "TopK_exp4x_k7.pt"
LENS = "sae_weights.safetensors"
REFUSED = {
    # published .pt
    "pickle that opens a file": (edited_pt(lambda s: s.update(b_pre=Attack())), r"would import io\.open"),
    "bare pickle that opens a file": (content(PT, lambda _: pickle.dumps(Attack(), protocol=2)), "not a state dict"),
    "hand-made archive": (content(PT, zip_without_tensors), r"would import io\.open|not a state dict"),
    "TorchScript": (content(PT, script_archive), "not a state dict"),
    "empty file": (content(PT, lambda _: b""), "not a state dict"),
    "text file": (content(PT, lambda _: b"<html>404</html>"), "not a state dict"),
    "truncated": (content(PT, lambda old: old[: len(old) // 2]), "not a state dict"),
    "Git LFS pointer": (content(PT, lambda _: b"version https://git-lfs.github.com/spec/v1\n"), "not a state dict"),
    "safetensors under another name": (content(PT, lambda _: header(b"{}")), "not a state dict"),
    "a list": (edited_pt(lambda s: [1, 2]), "holds a list"),
    "a tensor missing": (edited_pt(lambda s: {name: s[name] for name in s if name != "b_pre"}), "found 'decoder.bias'"),
    "a tensor too many": (edited_pt(lambda s: s.update(more=torch.zeros(1))), "needs the tensors"),
    "a string for a tensor": (edited_pt(lambda s: s.update(b_pre="zeros")), "b_pre is a str, not a tensor"),
    "whole numbers": (edited_pt(lambda s: s.update(b_pre=torch.zeros(24, dtype=torch.long))), "b_pre is of kind"),
    "a sparse tensor": (edited_pt(lambda s: s.update(b_pre=torch.ones(24).to_sparse())), "b_pre is of kind"),
    "a meta tensor": (edited_pt(lambda s: s.update(b_pre=torch.ones(24, device="meta"))), "b_pre is of kind"),
    "a few bytes that pose as terabytes": (
        edited_pt(lambda s: s.update({"encoder.weight": torch.zeros(1).expand(10**6, 10**6)})),
        "encoder.weight states 4000000000000 bytes and holds fewer",
    ),
    "transposed decoder": (edited_pt(lambda s: s.update({"decoder.weight": s["decoder.weight"].T})), "decoder.weight"),
    "no latents": (edited_pt(lambda s: s.update({"encoder.weight": torch.zeros(0, 24)})), r"has shape \[0, 24\]"),
    "NaN": (edited_pt(lambda s: s.update(b_pre=torch.full((24,), float("nan")))), "not finite"),
    "too large for float32": (
        edited_pt(lambda s: s.update(b_pre=torch.full((24,), 1e300, dtype=torch.double))),
        "not finite",
    ),
    # configurations
    "cfg of another type": (content("cfg.json", lambda _: b"[1]"), "not a JSON object"),
    "cfg not JSON": (content("cfg.json", lambda _: b"{"), "not JSON"),
    "cfg not text": (content("cfg.json", lambda _: b"\xff\xfe"), "not JSON"),
    "cfg nested without end": (content("cfg.json", lambda _: b'{"a":' * 100_000), "nested too deeply"),
    "cfg too large": (content("cfg.json", lambda _: b" " * (1 << 23)), "8,388,608 bytes"),
    "d_sae as text": (edited_cfg(lambda c: c.update(d_sae="96")), "d_sae = '96'"),
    "d_sae absurd": (edited_cfg(lambda c: c.update(d_sae=10**15)), "the weights have 96"),
    "d_in missing": (edited_cfg(lambda c: c.pop("d_in")), "d_in is missing"),
    "k above d_sae": (edited_cfg(lambda c: c.update(k=97)), "k = 97: must be from 1 to d_sae = 96"),
    "k NaN": (edited_cfg(lambda c: c.update(k=float("nan"))), "k = nan"),
    "own cfg: d_sae absurd": (own_cfg(d_sae=10**15), "the weights have 96"),
    "own cfg: unknown arch": (own_cfg(arch="__class__"), "arch = '__class__'"),
    "own cfg: k of 0": (own_cfg(k=0), "TopK's k is unknown"),
    "own cfg: another hash": (own_cfg(weights_sha256="0" * 64), "SHA-256"),
    "own cfg: no hash": (own_cfg(weights_sha256=None), "weights_sha256 = None"),
    "a dictionary of another class": (
        edited_cfg(lambda c: c["trainer"].update(dict_class="CrossCoder"), "dictionary_learning"),
        "dict_class = 'CrossCoder'",
    ),
    "a dictionary with two k": (
        edited_cfg(lambda c: c["trainer"].update(k=8), "dictionary_learning"),
        "k = 8, but ae.pt has 7",
    ),
    "a dictionary's pickle that opens a file": (
        edited_pt(lambda s: s.update(k=Attack()), "ae.pt", "dictionary_learning"),
        r"would import io\.open",
    ),
    # safetensors
    "weights missing": (lambda tmp_path: tmp_path, "holds none of"),
    "weights truncated": (content(LENS, lambda old: old[:-100]), "not a safetensors file"),
    "weights empty": (content(LENS, lambda _: b""), "not a safetensors file"),
    "header longer than any file": (content(LENS, lambda _: header(b"{}", 2**60)), "header too large"),
    "header that lies about sizes": (
        content(LENS, lambda _: header(b'{"W_enc":{"dtype":"F32","shape":[99999999,99999],"data_offsets":[0,8]}}')),
        "not a safetensors file",
    ),
    "header of an unknown kind of number": (
        content(LENS, lambda _: header(b'{"W_enc":{"dtype":"F3","shape":[2],"data_offsets":[0,8]}}')),
        "not a safetensors file",
    ),
    "W_enc transposed": (edited_weights(lambda t: t.update(W_enc=t["W_enc"].T.contiguous())), "W_dec has shape"),
    "infinite weights": (edited_weights(lambda t: t["b_enc"].fill_(float("inf"))), "b_enc holds values that are not"),
    "no thresholds": (edited_weights(lambda t: t.pop("threshold"), arch="JumpReLU"), "needs the tensors"),
    "a thing that would be passed over": (edited_weights(lambda t: t.update(scaling_factor=torch.ones(1))), "found"),
    "sparsify skip": (edited_weights(lambda t: t.update(W_skip=torch.ones(24, 24)), "sparsify"), "'W_skip'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, why = REFUSED[case]
    source = spoil(tmp_path)
    with pytest.raises(SaeFileError, match=why) as error:
        load_sae(source)
    message = str(error.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message and len(message) < 600
    assert "to `False`" not in message  # torch's own message tells how to switch the check off
    assert not (tmp_path / "pwned").exists()


def test_what_is_not_an_sae_at_all(tmp_path):
    (tmp_path / "notes.txt").write_text("-")
    for source, why in (
        (tmp_path / "notes.txt", "not an SAE file"),
        (tmp_path / "nothing.pt", "no such file or folder"),
        ("two words", "no such file or folder"),
        ("a/b/../../c.pt", "no such file or folder"),
        ("x" * 5000, "no such file or folder"),
        ("\0", "no such file or folder"),
    ):
        with pytest.raises(SaeFileError, match=why):
            load_sae(source)
    export(make("TopK"), tmp_path, "sparsify")
    export_lens = export(make("TopK"), tmp_path / "lens", "saelens")
    (export_lens / "sae_weights.safetensors").rename(tmp_path / "sae_weights.safetensors")
    with pytest.raises(SaeFileError, match=r"more than one SAE: sae\.safetensors, sae_weights\.safetensors"):
        load_sae(tmp_path)


def test_importing_the_package_brings_no_torch():
    code = "import sys, saegrid; assert 'torch' not in sys.modules; assert callable(saegrid.load_sae)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_all'"):
        _ = saegrid.load_all


# --- the Hub ---

LOAD = """
import json
import saegrid
from saegrid.errors import SaegridError
answers = []
for source, parameters in CASES:
    try:
        sae = saegrid.load_sae(source, **parameters)
        answers.append([sae.arch, sae.k, sae.inference_threshold or sae.threshold])
    except SaegridError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Environment in which the Hub is a local server with a repository of SAEs in every form."""
    root = tmp_path_factory.mktemp("hub")
    for arch in ("TopK", "BatchTopK", "JumpReLU"):
        export(make(arch), root / "repo", "published")
    bare = root / "repo/old"
    export(make("TopK"), bare, "published")
    (bare / "TopK_exp4x_k7.json").unlink()
    export(make("BatchTopK"), root / "repo/lens", "saelens")
    export(make("BatchTopK"), root / "repo/dictionary", "dictionary_learning")
    save_sae(make("JumpReLU"), root / "repo/runs/one", "JumpReLU_exp4x_t3.7", {})
    export(make("TopK"), root / "alone", "sparsify")
    repositories = {
        name: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for name, folder in (("some/saes", root / "repo"), ("some/sparse", root / "alone"))
    }
    server = serve(repositories)
    yield {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


def test_one_line_loads_from_the_hub(hub, tmp_path):
    found = {
        "some/saes/BatchTopK_exp4x_k7.pt": ["BatchTopK", 7, 4.3],  # the sidecar comes along
        "some/saes/JumpReLU_exp4x_t3.7.pt@main": ["JumpReLU", 0, 3.7],
        "some/saes/old/TopK_exp4x_k7.pt": ["TopK", 7, 0.0],
        "some/saes/lens": ["JumpReLU", 0, pytest.approx(4.3)],
        "some/saes/dictionary/ae.pt": ["BatchTopK", 7, pytest.approx(4.3)],
        "some/saes/runs/one": ["JumpReLU", 0, 3.7],
        "some/saes/runs/one/JumpReLU_exp4x_t3.7.pt": ["JumpReLU", 0, 3.7],
        "some/sparse": ["TopK", 7, 0.0],
    }
    told = {
        "some/saes/nothing.pt": "some/saes/nothing.pt: some/saes has no nothing.pt that can be read as an SAE",
        "some/saes/lens@v9": "source_revision = 'v9': the Hub's some/saes has no such revision",
        "some/nowhere/x.pt": "source = 'some/nowhere': no such folder here, and no such repository on the Hub",
        "some/gated/x.pt": "source = 'some/gated': gated",
    }
    cases = [(source, {}) for source in (*found, *told)]
    answers = in_another_process(hub, LOAD.replace("CASES", repr(cases)))
    assert answers[: len(found)] == list(found.values())
    for answer, why in zip(answers[len(found) :], told.values(), strict=True):
        assert answer.startswith(why)
    cached, missing = in_another_process(
        {**hub, "HF_HUB_OFFLINE": "1"}, LOAD.replace("CASES", repr([("some/saes/lens", {}), ("some/other/x.pt", {})]))
    )
    assert cached[0] == "JumpReLU" and missing.endswith("HF_HUB_OFFLINE is set")
