"""Publishing: the folder, the card whose code runs as printed, and the real client's upload to a server on loopback."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import pandas as pd
import pytest
import torch
import yaml
from hub_server import ORGANISATION, client_environment, python_blocks, serve
from huggingface_hub import ModelCard, SpaceCard
from processes import peers_python
from safetensors.torch import save_file
from synthetic_runs import D_IN, reseal, write_synthetic_run

from saegrid.config.grid import Grid
from saegrid.core.sae import initial_sae
from saegrid.errors import SaegridError
from saegrid.experiment import finished_run, results
from saegrid.formats import load_sae
from saegrid.formats.run_folder import save_sae
from saegrid.report.publish import upload

ROOT = Path(__file__).parents[2]
REPO, SPACE = f"{ORGANISATION}/grid", f"{ORGANISATION}/report"
GRID = {
    "name": "small",
    "title": "A small grid",
    "results_dir": "results",
    "constants": {"train_tokens": 1000, "val_tokens": 200, "expansion": 4},
    "axes": [
        {"arch": ["BatchTopK", "TopK"], "k": [16], "seed": [0, 1]},
        {"arch": ["JumpReLU"], "threshold": [0.5], "seed": [0]},
        {"arch": ["TopK"], "k": [16], "seed": [0], "lr": [0.01]},
    ],
}


def rows():
    return 2 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0))


def write_run(folder, run, best):
    """A synthetic run with real weights; what its SAE makes of `rows()` is what its metrics state."""
    write_synthetic_run(folder, run)
    x = rows()
    sae = initial_sae(run, D_IN, torch.zeros(D_IN))
    if run.arch == "BatchTopK":
        pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
        sae.inference_threshold = pre.quantile(1 - run.k / sae.d_sae, dim=1).mean().item()
    facts = {name: value for name, value in run.identity().items() if name not in ("arch", "k", "threshold")}
    row = json.loads((folder / "metrics.json").read_text())
    row["weights_sha256"] = save_sae(sae, folder, run.name, facts)
    row["val_mse"] = (x - sae(x)).double().square().mean().item()
    row["l0"] = (sae.encode(x) > 0).sum(1).double().mean().item()
    row["kl"] = row["delta_loss"] = 0.25 if best else 0.5
    (folder / "metrics.json").write_text(json.dumps(row))
    reseal(folder)


def write_site(folder, grid):
    """The least that is a rendered site of the grid."""
    (folder / "report" / "runs").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><html><body><p>Report</p></body></html>")
    for run in grid.runs():
        (folder / "report" / "runs" / f"{run.run_id}.html").write_text("<html><body>A run</body></html>")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project folder with a finished grid of real SAEs, its site, and its grid file."""
    root = tmp_path_factory.mktemp("finished")
    grid = Grid(**GRID)
    for run in grid.runs():
        write_run(root / "runs" / run.run_id, run, best=run.arch == "BatchTopK" and run.seed == 1)
    write_site(root / "_site", grid)
    (root / "grid.yaml").write_text(yaml.safe_dump(GRID))
    return root


@pytest.fixture
def project(finished, tmp_path):
    """A test's own copy."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


@pytest.fixture(scope="module")
def folder(finished):
    """The repository folder of the finished grid."""
    return upload.build(Grid(**GRID), finished / "published", REPO, SPACE, root=finished)


@pytest.fixture
def server():
    server = serve()
    yield server
    server.shutdown()


def command(*options):
    return [sys.executable, "-m", "saegrid", "publish", "grid.yaml", *options]


def publish(project, server, *options, **more):
    env = client_environment(server, project / "home", **more)
    return forked.python(command(*options)[1:], project, env)


def tree(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# --- the folder ---


def test_the_folder_has_every_file_and_its_manifest(folder, finished):
    content, df = tree(folder), results.tidy(Grid(**GRID), finished / "runs")
    manifest = json.loads(content.pop("manifest.json"))["files"]
    assert {name: hashlib.sha256(data).hexdigest() for name, data in content.items()} == {
        name: entry["sha256"] for name, entry in manifest.items()
    }
    for name in ("README.md", "frontier.png", "site/index.html", "site/README.md"):
        assert content[name]
    assert len(pd.read_csv(folder / "results_full.csv")) == len(df) == 6
    assert set(pd.read_csv(folder / "results.csv")["arch"]) == {"BatchTopK", "TopK"}
    assert SpaceCard.load(folder / "site" / "README.md").data.sdk == "static"
    assert sum(name.endswith(".pt") for name in content) == 6
    assert sum(name.endswith("sae_weights.safetensors") for name in content) == 6


def test_a_published_name_is_the_first_runs_and_others_keep_it_in_a_folder(folder, finished):
    df = results.tidy(Grid(**GRID), finished / "runs")
    places = upload.places(df)
    assert list(places.values()) == [
        "BatchTopK_exp4x_k16",
        "seed1/BatchTopK_exp4x_k16",
        "TopK_exp4x_k16",
        "seed1/TopK_exp4x_k16",
        "JumpReLU_exp4x_t0.5",
        "seed0/TopK_exp4x_k16",
    ]
    for row in df.to_dict("records"):
        sae = load_sae(str(finished / "runs" / row["run_id"]))
        for path in (folder / f"{places[row['run_id']]}.pt", folder / "saelens" / places[row["run_id"]]):
            again = load_sae(str(path))
            assert torch.equal(again.W_dec, sae.W_dec)
            torch.testing.assert_close(again(rows()), sae(rows()), rtol=1e-4, atol=1e-4)


def test_the_same_runs_give_the_same_bytes(folder, project):
    again = upload.build(Grid(**GRID), project / "again", REPO, SPACE, root=project)
    assert tree(again) == tree(folder)


def test_the_card_parses_and_its_model_index_holds_every_run(folder, finished):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "saegrid" and "sparse-autoencoder" in card.data.tags and card.data.license == "mit"
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"] and card.data.datasets == ["gsm_symbolic"]
    for run in Grid(**GRID).runs():
        stated = json.loads((finished / "runs" / run.run_id / "metrics.json").read_text())
        found = {r.metric_type: r.metric_value for r in card.data.eval_results if r.metric_args["run_id"] == run.run_id}
        assert found == {name: stated[name] for name in [*finished_run.METRICS, "kl"]}


def test_the_card_is_plain_markdown_with_the_verdicts_and_every_run(folder):
    text = ModelCard.load(folder / "README.md").text
    assert "{=html}" not in text and ":::" not in text and "<svg" not in text
    assert text.count("not testable") + text.count("holds") >= 5
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (folder / target).is_file(), target
    for name in ("BatchTopK_exp4x_k16", "JumpReLU_exp4x_t0.5"):
        assert name in text


def test_a_folder_with_something_else_is_left_alone(project):
    precious = project / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("-")
    (precious / "manifest.json").write_text('{"files": []}')
    with pytest.raises(upload.HubError, match="holds something else"):
        upload.build(Grid(**GRID), precious, root=project)
    assert set(tree(precious)) == {"thesis.tex", "manifest.json"}


def _no_metrics(root, run):
    (root / "runs" / run.run_id / "metrics.json").unlink()


def _other_weights(root, run):
    path = root / "runs" / run.run_id / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "ab" * 32}))
    reseal(path.parent)


def _cut_weights(root, run):
    path = root / "runs" / run.run_id / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_site(root, run):
    shutil.rmtree(root / "_site")


def _others_site(root, run):
    (root / "_site" / "report" / "runs" / f"{run.run_id}.html").unlink()


@pytest.mark.parametrize("damage", [_no_metrics, _other_weights, _cut_weights, _no_site, _others_site])
def test_an_unfinished_or_damaged_grid_leaves_the_folder_as_it_was(project, damage):
    grid = Grid(**GRID)
    before = tree(upload.build(grid, project / "folder", root=project))
    damage(project, grid.runs()[-1])
    with pytest.raises(SaegridError) as error:
        upload.build(grid, project / "folder", root=project)
    assert "\n" not in str(error.value)
    assert tree(project / "folder") == before


@pytest.mark.parametrize("options", [("--repo", "grid"), ("--repo", "a/b/c"), ("--space", "two words/x")])
def test_an_id_that_is_none_is_one_line(project, server, options):
    done = publish(project, server, *options)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert options[0].strip("-") in done.stderr and not server.requests


def test_a_dry_run_shows_what_would_go_where_and_asks_nothing(project, server):
    done = publish(project, server, "--repo", REPO, "--space", SPACE, "--dry-run", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    sizes = {line[12:]: line[:10].strip() for line in lines if not line.startswith("/")}
    for name, content in tree(project / "published" / "small").items():
        if not name.startswith("site/"):
            assert sizes[name] == upload._size(len(content))
    assert REPO in lines[-2] and SPACE in lines[-1] and server.requests == []


# --- the upload ---


def test_upload_is_one_commit_each_and_the_second_time_none(project, server):
    done = publish(project, server, "--repo", REPO, "--space", SPACE)
    assert done.returncode == 0, done.stderr
    content = tree(project / "published" / "small")
    assert len(server.commits(REPO)) == len(server.commits(SPACE, "space")) == 2  # the first is the Hub's own
    assert {name: data for name, data in server.files(REPO).items() if name != ".gitattributes"} == content
    pages = {name.removeprefix("site/"): data for name, data in content.items() if name.startswith("site/")}
    assert server.files(SPACE, "space").items() >= pages.items()
    assert server.sdks[SPACE] == "static"
    assert sum(method == "PUT" for method, _ in server.requests) >= 12
    server.requests.clear()
    done = publish(project, server, "--repo", REPO, "--space", SPACE)
    assert done.returncode == 0, done.stderr
    again = tree(project / "published" / "small")
    assert [name for name in content if again.get(name) != content[name]] == []
    assert len(server.commits(REPO)) == len(server.commits(SPACE, "space")) == 2
    assert not any(method == "PUT" for method, _ in server.requests)


def test_what_a_smaller_grid_lacks_goes_and_what_others_put_there_stays(project, server):
    assert publish(project, server, "--repo", REPO).returncode == 0
    server.files(REPO)["LICENSE"] = b"MIT"
    fewer = Grid(**GRID | {"axes": GRID["axes"][:2]})
    (project / "grid.yaml").write_text(yaml.safe_dump(fewer.model_dump()))
    done = publish(project, server, "--repo", REPO)
    assert done.returncode == 0, done.stderr
    content = tree(project / "published" / "small")
    assert set(server.files(REPO)) == {*content, "LICENSE", ".gitattributes"} and len(server.commits(REPO)) == 3


@pytest.fixture(scope="module")
def uploaded(finished):
    """A server with the published grid."""
    server = serve()
    done = publish(finished, server, "--repo", REPO, "--space", SPACE, "--folder", "uploaded")
    assert done.returncode == 0, done.stderr
    yield server
    server.shutdown()


def snippets(server):
    return python_blocks(server.files(REPO)["README.md"].decode())


def fresh_process(server, folder, code, python=sys.executable):
    """Run code where nothing is but an empty cache; returns the JSON of its last line."""
    env = client_environment(server, folder / "home", HF_TOKEN="")
    if python == sys.executable:
        done = forked.python(["-c", code], folder, env)
    else:
        env = {name: value for name, value in env.items() if not name.startswith("PYTHON")}
        done = subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


MEASURE = """
import json
from safetensors.torch import load_file
rows = load_file("rows.safetensors")["rows"]
with torch.no_grad():
    sets = [rows, rows[:1], rows[-3:]]
    parts = [sae(x) for x in sets]
    same = max((parts[0][:1] - parts[1]).abs().max().item(), (parts[0][-3:] - parts[2]).abs().max().item())
    mse = (rows - parts[0]).double().square().mean().item()
    l0 = (sae.encode(rows) > 0).sum(1).double().mean().item()
print(json.dumps({"val_mse": mse, "l0": l0, "same": same}))
"""


@pytest.mark.parametrize("which", ["saegrid", "class", "saelens"])
def test_the_cards_own_code_downloads_and_gives_what_the_card_states(uploaded, tmp_path, which):
    code = dict(zip(("saegrid", "class", "saelens"), snippets(uploaded), strict=True))[which]
    python = peers_python() if which == "saelens" else sys.executable
    save_file({"rows": rows()}, tmp_path / "rows.safetensors")
    found = fresh_process(uploaded, tmp_path, f"{code}\nimport torch\n{MEASURE}", python)
    path = tmp_path / "README.md"
    path.write_bytes(uploaded.files(REPO)["README.md"])
    best = next(run for run in Grid(**GRID).runs() if run.arch == "BatchTopK" and run.seed == 1)
    stated = {r.metric_type: r.metric_value for r in ModelCard.load(path).data.eval_results
              if r.metric_args["run_id"] == best.run_id}  # fmt: skip
    assert found["val_mse"] == pytest.approx(stated["val_mse"], rel=1e-5)
    assert found["l0"] == pytest.approx(stated["l0"], rel=1e-3)
    assert found["same"] < 1e-4  # a row's code does not depend on its neighbours


def test_code_of_a_card_without_a_repository_runs_in_its_folder(finished, server):
    folder = upload.build(Grid(**GRID), finished / "local", root=finished)
    save_file({"rows": rows()}, folder / "rows.safetensors")
    own, plain, _ = python_blocks((folder / "README.md").read_text())
    first, second = (fresh_process(server, folder, f"{code}\n{MEASURE}") for code in (own, plain))
    assert first["val_mse"] == pytest.approx(second["val_mse"], rel=1e-5) and not server.requests


@pytest.mark.parametrize("arch", ["TopK", "BatchTopK", "JumpReLU"])
def test_the_published_class_gives_each_architectures_codes(folder, finished, arch, monkeypatch):
    from saegrid.report import loading

    df = results.tidy(Grid(**GRID), finished / "runs")
    best = df[df["arch"] == arch].iloc[0]
    file = upload.places(df)[best["run_id"]]
    code = python_blocks(loading.from_release(best, file))[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    sae = load_sae(f"{file}.pt")
    x = rows()
    torch.testing.assert_close(names["sae"](x), sae(x), rtol=1e-4, atol=1e-4)
    if arch == "BatchTopK":  # without its threshold it cuts per batch, as it was trained
        names["sae"].threshold = sae.inference_threshold = None
        assert torch.equal(names["sae"].encode(x) > 0, sae.encode(x) > 0)
        assert (sae.encode(x) > 0).sum() == len(x) * sae.k


def test_an_upload_that_is_killed_goes_on_where_it_was(project, server):
    upload.build(Grid(**GRID), project / "published" / "small", REPO, root=project)
    weights = max(tree(project / "published" / "small").values(), key=len)
    digest = hashlib.sha256(weights).hexdigest()
    server.faults.append(["PUT", digest, "hang", 1])
    env = client_environment(server, project / "home")
    process = subprocess.Popen(
        command("--repo", REPO), cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert server.hanging.wait(60)
    deadline = time.monotonic() + 20
    while len(server.blobs) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    sent = set(server.blobs)
    assert sent and digest not in sent and len(server.commits(REPO)) == 1
    server.requests.clear()
    done = publish(project, server, "--repo", REPO)
    assert done.returncode == 0, done.stderr
    again = {path.removeprefix("/lfs/") for method, path in server.requests if method == "PUT"}
    assert digest in again and not again & sent
    assert len(server.commits(REPO)) == 2
    assert server.files(REPO).items() >= tree(project / "published" / "small").items()


FAILURES = {
    "401": ({"HF_TOKEN": "hf_wrong"}, [], REPO, "the token is not valid"),
    "403": ({}, [], "somebody/grid", "the token may not write there (403: you may not create"),
    "429": ({}, [["GET", "whoami", 429, 9]], REPO, "too many requests"),
    "429 when creating": ({}, [["POST", "repos/create", 429, 9]], REPO, "too many requests"),
    "500 when creating": ({}, [["POST", "repos/create", 500, 9]], REPO, "the Hub failed"),
    "403 when preparing": ({}, [["POST", "/preupload/", 403, 9]], REPO, "the token may not write there"),
    "403 in the middle": ({}, [["PUT", "/lfs/", 403, 9]], REPO, "the token may not write there"),
    "500 when committing": ({}, [["POST", "/commit/", 500, 9]], REPO, "the Hub failed"),
    "dropped when committing": ({}, [["POST", "/commit/", "drop", 9]], REPO, "breaks off"),
    "no network": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, [], REPO, "can't be reached"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, [], REPO, "HF_HUB_OFFLINE is set"),
    "no token": ({"HF_TOKEN": ""}, [], REPO, "no token"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_line_publishes_nothing_and_a_rerun_goes_on(project, server, failure):
    variables, faults, repo, words = FAILURES[failure]
    server.faults += faults
    done = publish(project, server, "--repo", repo, "--space", SPACE, **variables)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    outcome = "whether its commit arrived is not known" if "dropped" in failure else "nothing was published"
    assert len(lines) == 1 and words in lines[0] and outcome in lines[0], done.stderr
    assert all(len(commits) == 1 for commits in server.repos.values())
    server.faults.clear()
    if failure in ("429", "500 when committing", "403 in the middle"):
        done = publish(project, server, "--repo", REPO, "--space", SPACE)
        assert done.returncode == 0, done.stderr
        assert len(server.commits(REPO)) == len(server.commits(SPACE, "space")) == 2


def test_a_failure_between_the_two_commits_says_what_is_published(project, server):
    server.faults.append(["POST", f"/api/spaces/{SPACE}/commit", 500, 9])
    done = publish(project, server, "--repo", REPO, "--space", SPACE)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"{REPO} is published, the rest is not" in done.stderr
    assert (len(server.commits(REPO)), len(server.commits(SPACE, "space"))) == (2, 1)


def test_a_passing_failure_of_the_store_is_no_failure(project, server):
    server.faults.append(["PUT", "/lfs/", 500, 1])
    done = publish(project, server, "--repo", REPO)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(server.commits(REPO)) == 2


# --- README ---


def test_the_readmes_python_runs(project, server):
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks
    run_id = Grid(**GRID).runs()[0].run_id
    for code in blocks:
        fresh_process(server, project, code.replace("<run_id>", run_id) + "\nprint('null')")
    assert load_sae(str(project / "exported" / "lens")).d_in == D_IN
