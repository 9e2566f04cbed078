import json
import pickle

import pytest
import torch

from saegrid.config.run_config import make_config
from saegrid.core.sae import initial_sae
from saegrid.errors import SaeFileError
from saegrid.formats import load_sae
from saegrid.formats.run_folder import load_folder, published_state_dict, save_sae


@pytest.fixture
def sae():
    sae = initial_sae(make_config(arch="BatchTopK", expansion=2, k=3), 8, torch.zeros(8))
    sae.inference_threshold = 0.25
    return sae


def test_a_saved_sae_comes_back_whole(sae, tmp_path):
    save_sae(sae, tmp_path, "BatchTopK_exp2x_k3", {"model": "m"})
    back = load_folder(tmp_path)
    assert (back.arch, back.k, back.inference_threshold) == ("BatchTopK", 3, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(back.params, sae.params, strict=True))
    published = load_sae(tmp_path / "BatchTopK_exp2x_k3.pt")
    assert torch.equal(published.W_dec, sae.W_dec) and published.inference_threshold == 0.25  # by cfg.json
    assert json.loads((tmp_path / "cfg.json").read_text())["model"] == "m"


def test_the_same_sae_gives_the_same_bytes(sae, tmp_path):
    for folder in ("a", "b"):
        save_sae(sae, tmp_path / folder, "name", {})
    for file in ("name.pt", "sae.safetensors", "cfg.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class Attack:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def spoiled(sae, how):
    state = published_state_dict(sae)
    if how == "missing":
        del state["b_pre"]
    elif how == "extra":
        state["more"] = torch.zeros(1)
    elif how == "shape":
        state["decoder.weight"] = state["decoder.weight"].T
    elif how == "nan":
        state["encoder.bias"] = state["encoder.bias"] * float("nan")
    elif how == "list":
        return [1, 2]
    elif how == "attack":
        state["b_pre"] = Attack()
    elif how == "integers":
        state["b_pre"] = torch.zeros(8, dtype=torch.long)
    return state


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan", "list", "attack", "integers"])
def test_a_bad_published_file_is_refused_in_one_line(sae, tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(spoiled(sae, how), "x.pt")
    with pytest.raises(SaeFileError, match=r"^x\.pt: ") as error:
        load_sae("x.pt", arch="TopK", k=3)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"not a file", pickle.dumps([1])])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(SaeFileError):
        load_sae(path, arch="TopK", k=3)


def test_a_changed_byte_is_found(sae, tmp_path):
    save_sae(sae, tmp_path, "name", {})
    weights = tmp_path / "sae.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SaeFileError, match="SHA-256"):
        load_folder(tmp_path)
    weights.unlink()
    with pytest.raises(SaeFileError, match="No such file"):
        load_folder(tmp_path)
