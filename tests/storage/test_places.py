"""Folders by name: `~`, names that look like patterns, and users without a home, a writable checkout or a cache."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import D_IN, save_dataset, save_model, tiny_tokenizer

from saegrid.config.grid import Grid, load_grid
from saegrid.config.notebook import check_names
from saegrid.config.run_config import make_config
from saegrid.core.sae import TopK
from saegrid.data.collect import collect, open_store
from saegrid.data.models import embedded
from saegrid.data.prompts import make_prompts
from saegrid.errors import ConfigError, DiskError, SaeFileError, SaegridError
from saegrid.experiment.run import Run
from saegrid.formats import export, load_sae
from saegrid.report.publish.upload import build
from saegrid.storage import hub_access
from saegrid.storage.hub_access import cache_dir, files_sha256, local_folder, own_cache_dir

SMALL = {"layer": 1, "k": 4, "train_tokens": 400, "val_tokens": 100, "eval_prompts": 4, "max_tokens": 64}
SMALL |= {"epochs": 1, "batch_size": 64, "threads": 1}
NOBODY = 12345


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a model and a dataset; the working folder is an empty one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SAEGRID_CACHE", raising=False)
    (tmp_path / "home").mkdir()
    save_model(tmp_path / "home" / "model")
    save_dataset(tmp_path / "home" / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


# --- ~ ---


def test_a_tilde_is_the_home_folder_in_every_place_and_source(home):
    sources = {"model": "~/model", "dataset": "~/data"}
    config = make_config(**SMALL, **sources, runs_dir="~/runs", store_dir="~/stores")
    assert (config.runs_dir, config.store_dir) == (f"{home}/runs", f"{home}/stores")
    as_written = make_config(**SMALL, **sources)
    assert (config.run_id, config.store_id) == (as_written.run_id, as_written.store_id)
    assert config.model == "~/model"  # a run's id is of what the user wrote
    run = Run(config)
    assert collect(config).parent == home / "stores" and run.folder.parent == home / "runs"
    assert open_store(config).manifest["sources"].keys() > {"model/config.json", "dataset/train.jsonl"}
    run.close()
    torch.save(torch.randn(20, D_IN), home / "instruct_base_layer1.pt")
    published = make_config(**SMALL, **sources, activations="~", store_dir="~/stores")
    collect(published)
    assert open_store(published).n_train == 16
    assert list(Path().iterdir()) == []


def test_a_tilde_in_a_grid_file_and_on_the_command_line(home):
    constants = {**SMALL, "model": "~/model", "dataset": "~/data", "runs_dir": "~/runs", "store_dir": "~/stores"}
    grid = {"name": "g", "title": "G", "results_dir": "~/tables", "constants": constants, "axes": [{"arch": ["TopK"]}]}
    (home / "g.yaml").write_text(json.dumps(grid))
    grid = load_grid("~/g.yaml")
    assert (grid.results_dir, grid.runs_dir) == (f"{home}/tables", f"{home}/runs")
    assert Grid(name="g", title="G", axes=[{"k": [4]}]).runs_dir == "runs"
    with pytest.raises(SaegridError, match=f"{home}/runs/TopK"):
        build(grid, "~/published")
    sae = TopK(4, 8, k=2)
    export(sae, "~/exported", "published", {"name": "TopK_exp2x_k2"})
    assert load_sae("~/exported/TopK_exp2x_k2.pt").k == 2
    assert list(Path().iterdir()) == []


def test_a_tilde_of_nobody_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="runs_dir = '~nobody-here/runs': there is no such home folder; name the"):
        make_config(k=4, runs_dir="~nobody-here/runs")
    with pytest.raises(ConfigError, match="model = '~nobody-here/m': there is no such home folder"):
        local_folder("model", "~nobody-here/m")
    with pytest.raises(SaeFileError, match="~nobody-here/sae: there is no such home folder"):
        load_sae("~nobody-here/sae")
    with pytest.raises(SaegridError, match="folder = '~nobody-here/x': there is no such home folder"):
        build(Grid(name="g", title="G", axes=[{"k": [4]}]), "~nobody-here/x")
    with pytest.raises(ConfigError, match="results_dir = '~/tables': name the whole path"):
        check_names({"results_dir": "~/tables"}, "results_dir")


# --- names that look like patterns ---


@pytest.mark.parametrize("name", ["gsm[1]", "gsm*", "gs?1", "gsm{1,2}", "!gsm", "g s m"])
def test_a_folders_name_is_no_pattern(tmp_path, name):
    """Beside it lies a folder that the name as a pattern would match."""
    for folder, layout, text in ((name, "llama", "wanted"), ("gsm1", "qwen2", "another")):
        data = tmp_path / folder
        save_dataset(data)
        save_model(data, layout)
        torch.save(torch.full((20, D_IN), float(len(text))), data / "instruct_base_layer1.pt")
        for split in ("train", "test"):
            path = data / f"{split}.jsonl"
            path.write_text(path.read_text().replace(split, f"{text} {split}"))
    sources = {"model": str(tmp_path / name), "dataset": str(tmp_path / name)}
    config = make_config(**SMALL, **sources, store_dir=str(tmp_path / "stores"))
    text = tiny_tokenizer().decode(make_prompts(config, tiny_tokenizer())["eval"][0].tokens)
    assert text.startswith("wanted test")
    collect(config)
    manifest = open_store(config).manifest
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert manifest["sources"]["model"] == files_sha256([tmp_path / name / "model.safetensors"])
    published = make_config(**SMALL, **sources, activations=str(tmp_path / name), store_dir=str(tmp_path / "stores"))
    collect(published)
    assert open_store(published).rows("val")[0, 0] == len("wanted")


# --- caches ---


def test_files_are_hashed_each_time_but_large_ones_that_nobody_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEGRID_CACHE", str(tmp_path / "cache"))
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"more")
    for limit in (10, 1):
        monkeypatch.setattr(hub_access, "SMALL", limit)
        hashes = set()
        for content in (b"one", b"two", b"six"):  # of one size, and by the clock of one time
            path.write_bytes(content)
            os.utime(path, (1e9, 1e9))
            hashes |= {files_sha256([path]), files_sha256([path])}
            for _ in range(2):  # computed, then remembered
                assert files_sha256([path, other]) == hashlib.sha256(content + b"more").hexdigest()
        assert len(hashes) == 3
    (memory,) = [each for each in (tmp_path / "cache" / "hashes").iterdir() if each.read_text() == files_sha256([path])]
    memory.write_text("f" * 64)
    assert files_sha256([path]) == "f" * 64  # remembered
    memory.write_text("damaged")
    assert files_sha256([path]) in hashes


def test_a_user_without_a_home_has_a_cache_and_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SAEGRID_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/dev/null/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hub_access._temporary_cache.cache_clear()
    try:
        folder = cache_dir()
        assert folder == own_cache_dir() == tmp_path / f"saegrid-{os.getuid()}"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert capsys.readouterr().err.count("the cache is not writable") == 1
        hub_access._temporary_cache.cache_clear()
        folder.rmdir()
        folder.symlink_to(tmp_path)  # as somebody else may have put there
        with pytest.raises(DiskError, match="belongs to somebody else; set SAEGRID_CACHE"):
            cache_dir()
    finally:
        hub_access._temporary_cache.cache_clear()


def test_a_shared_cache_that_has_the_model_is_used_as_it_is(monkeypatch):
    monkeypatch.setattr(embedded, "can_write", lambda path: False)
    assert embedded.embedded_model_dir() == cache_dir() / embedded.FOLDER


TRAIN = """
import os, sys
os.chdir(sys.argv[1])
import tiny
from pathlib import Path
tiny.save_model("m"); tiny.save_dataset(Path("d"), 60, 20)
from saegrid.config.run_config import make_config
from saegrid.experiment.run import Run
run = Run(make_config(model="m", dataset="d", arch="TopK", expansion=2, **SMALL))
run.train(); run.evaluate(); run.close()
print("trained with", run.config.kernel)
"""


def python_of_nobody():
    """A Python with this one's packages that a user with no rights may run; None where there is none."""
    packages = [part for part in sys.path if part.endswith("site-packages")]
    places = [str(Path("lib").absolute()), str(Path("tests").absolute()), *packages]
    environment = {"PYTHONPATH": os.pathsep.join(places)}
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        try:
            command = [python, "-c", "import ssl, numpy, saegrid.config.run_config"]
            done = subprocess.run(command, env=environment, user=NOBODY, group=NOBODY, extra_groups=[], check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return python, environment
    return None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a home")
def test_a_user_without_a_home_trains_from_a_checkout_that_is_read_only(tmp_path):
    if not (found := python_of_nobody()):
        pytest.skip("this Python or its packages can't be read by every user")
    python, environment = found
    place = Path(tempfile.mkdtemp())  # pytest's own folders are root's alone
    try:
        place.chmod(0o777)
        (shared := place / "shared").mkdir()  # a cache of root's
        for n, told in enumerate([{}, {"HOME": "/", "SAEGRID_CACHE": str(shared)}]):
            (work := place / str(n)).mkdir()
            work.chmod(0o777)
            command = [python, "-c", TRAIN.replace("**SMALL", f"**{SMALL}"), str(work)]
            told = {"TMPDIR": str(place), "HF_HUB_OFFLINE": "1", **environment, **told}
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            done = subprocess.run(command, env=told, capture_output=True, text=True, check=False, **user)
            assert done.returncode == 0, done.stderr[-3000:]
            assert "trained with cpu" in done.stdout and not (work / "~").exists()
            assert (place / f"saegrid-{NOBODY}" / "numba").is_dir()
    finally:
        shutil.rmtree(place)
