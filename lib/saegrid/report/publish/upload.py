"""Release a finished grid: a complete repository folder, one commit to a model repository, the site to a static Space.

    README.md  frontier.png               the model card
    results.csv  results_full.csv  results_tidy.csv
    {name}.pt  {name}.json                SAEs under the published names, and what a bare state dict lacks
    seed1/{name}.pt …                     further runs whose name is taken
    saelens/{name}/                       the same SAEs for SAELens
    site/                                 the report; its README.md makes it a static Space
    manifest.json                         size and SHA-256 of every other file

The folder is complete and checked before anything is sent. The same runs give the same bytes, so a second call sends
only what the Hub lacks.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from saegrid.config.grid import Grid
from saegrid.errors import SaegridError
from saegrid.experiment import finished_run, results
from saegrid.report import site
from saegrid.report.publish import model_card
from saegrid.storage.atomic import write_bytes, write_json, write_text
from saegrid.storage.hub_access import expanded
from saegrid.storage.locks import replacing_folder, waiting_lock

MANIFEST = "manifest.json"
REFUSALS = {
    401: "the token is not valid: `hf auth login`",
    402: "the Hub wants a paid plan for this",
    403: "the token may not write there",
    404: "no such repository, or none that the token may see",
    409: "somebody else changed it at the same time",
    429: "too many requests, wait a while",
}
"""What an HTTP status means for the uploader; the Hub's own message follows it."""


class HubError(SaegridError):
    """The upload is impossible: an unfinished grid, no token, no network, or a refusal by the Hub."""


def publish(
    grid: Grid, repo: str = "", space: str = "", folder: str | Path = "", dry_run: bool = False, root: str | Path = "."
) -> Path:
    """Build a grid's repository folder and, if `repo` or `space` is given, upload it. Prints what goes where.

    Args:
        repo: Hub id of the model repository, created if missing; the whole folder goes there in one commit.
        space: Hub id of the static Space, created if missing; `site/` goes there in one commit.
        folder: where to build; default `published/<grid's name>`. A folder with other contents is never replaced.
        dry_run: build and print, without network access.
        root: the project's folder, with the runs and `_site`.

    Returns:
        The folder.

    Raises:
        HubError: the site is missing or another grid's, an id is invalid, no token, no network, or the Hub refuses.
        ResultsError, SaeFileError: a run is not finished, or its files are damaged.
    """
    for parameter, name in (("repo", repo), ("space", space)):
        _check_id(parameter, name)
    if (repo or space) and not dry_run:
        _check_token()
    folder = build(grid, folder or Path(root) / "published" / grid.name, repo, space, root)
    print("\n".join(listing(folder, repo, space)), flush=True)
    if (repo or space) and not dry_run:
        upload(folder, repo, space)
    return folder


# --- the folder ---


def build(grid: Grid, folder: str | Path, repo: str = "", space: str = "", root: str | Path = ".") -> Path:
    """Make and check the repository folder of a finished grid, complete or not at all. Raises like `publish`."""
    try:
        root, folder = Path(root), expanded(str(folder))
    except ValueError as error:
        raise HubError(f"folder = {str(folder)!r}: {error}") from None
    runs_dir = root / grid.runs_dir
    df = results.tidy(grid, runs_dir)
    files = places(df)
    _check_site(root / "_site", df)
    if folder.exists() and not _replaceable(folder):
        raise HubError(f"folder = {str(folder)!r}: holds something else; name a folder that is new or empty")
    folder = folder.resolve()
    with waiting_lock(folder.with_name(f".{folder.name}.lock")), replacing_folder(folder) as part:
        stable = results.read_stability(root / grid.results_dir)
        results.write_tables(df, part, stable=stable if len(stable) else None)
        for row in df.to_dict("records"):
            _write_sae(runs_dir / row["run_id"], row, part, files[row["run_id"]])
        shutil.copytree(root / "_site", part / "site")
        write_text(part / "site" / "README.md", model_card.space_readme(grid.title, repo))
        write_bytes(part / model_card.PICTURE, model_card.picture(df))
        prompts = finished_run.load_prompts(df, runs_dir)
        readme = model_card.readme(df, prompts, files, grid.title, repo, space, stable, grid.l0_budget)
        write_text(part / "README.md", readme)
        _check_card(part / "README.md", df)
        write_json(part / MANIFEST, {"published_grid": grid.name, "files": _contents(part)})
    return folder


def places(df: pd.DataFrame) -> dict[str, str]:
    """Run id to the path of its SAE in the repository, without suffix.

    The first run with a published name, in the grid's order, gets the bare name, where readers of the published sweep
    look for it. Others keep the name in a folder: `seed{seed}/`, or the run id if that is taken.
    """
    taken: dict[str, str] = {}
    for row in df.to_dict("records"):
        choices = (row["name"], f"seed{row['seed']}/{row['name']}", f"{row['run_id']}/{row['name']}")
        taken[next(choice for choice in choices if choice not in taken)] = row["run_id"]
    return {run_id: place for place, run_id in taken.items()}


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or made by an earlier call."""
    try:
        return not any(folder.iterdir()) or "published_grid" in json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _write_sae(run_dir: Path, row: dict[str, Any], part: Path, place: str) -> None:
    """A run's SAE as `{place}.pt` with its sidecar and as a SAELens folder, both read back and compared."""
    import torch

    from saegrid.formats import export, load_sae

    sae = load_sae(str(run_dir))
    facts = json.loads((run_dir / "cfg.json").read_text(encoding="utf-8"))
    if facts["weights_sha256"] != row["weights_sha256"]:
        raise HubError(f"{run_dir}: metrics.json was measured on other weights; delete the folder and run it again")
    written = export(sae, (part / place).parent, "published", facts | {"name": row["name"]})
    lens = export(sae, part / "saelens" / place, "saelens", facts)
    for path in (written, lens):
        again = load_sae(str(path))
        same = all(torch.equal(getattr(again, name), getattr(sae, name)) for name in ("W_enc", "W_dec"))
        # SAELens holds the thetas of a Gated SAE as differences of two biases
        near = 1e-6 * (again.b_enc.abs() + sae.theta.abs()) if len(sae.theta) else 0.0
        if not same or again.theta.shape != sae.theta.shape or ((again.theta - sae.theta).abs() > near).any():
            raise HubError(f"{path.relative_to(part)}: does not read back as it was written; is the disk sound?")


def _check_site(folder: Path, df: pd.DataFrame) -> None:
    advice = "`python -m saegrid site` with this grid renders it"
    if not (folder / "index.html").is_file():
        raise HubError(f"{folder}: no rendered site; {advice}")
    for run_id in df["run_id"]:
        if not (folder / "report" / "runs" / f"{run_id}.html").is_file():
            raise HubError(f"{folder}: the site of another grid, without {run_id}; {advice}")
    if problems := site.check(folder):
        raise HubError(f"{folder}: {problems[0]}")


def _check_card(path: Path, df: pd.DataFrame) -> None:
    """Check the card as the Hub reads it: its `model-index` has every metric of every run."""
    from huggingface_hub import ModelCard

    found = {(r.metric_args["run_id"], r.metric_type): r.metric_value for r in ModelCard.load(path).data.eval_results}
    rows = df.to_dict("records")
    wanted = {(row["run_id"], name): row[name] for row in rows for name in finished_run.metrics_of(row)}
    if found != wanted:
        raise HubError(f"{path.name}: its model-index does not hold the metrics of every run")


def _contents(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    }


def listing(folder: Path, repo: str = "", space: str = "") -> list[str]:
    """Which files go where, with their sizes; the site as one line."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    pages = [size for name, size in sizes.items() if name.startswith("site/")]
    lines = [f"{_size(size):>10}  {name}" for name, size in sorted(sizes.items()) if not name.startswith("site/")]
    lines += [f"{_size(sum(pages)):>10}  site/ ({len(pages)} files)"]
    total = f"{len(sizes)} files, {_size(sum(sizes.values()))}"
    lines += [f"{folder} → {f'model repository {repo}' if repo else 'no model repository was named'}: {total}"]
    if space:
        lines += [f"{folder / 'site'} → static Space {space}: {len(pages)} files, {_size(sum(pages))}"]
    return lines


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


# --- the upload ---


def upload(folder: Path, repo: str = "", space: str = "") -> None:
    """Send the folder to `repo` and its `site/` to `space`, one commit each; prints a line for each.

    Steps that can be refused come first: the token, the repositories, the contents of all large files. The commits come
    last, each atomic. Contents that the Hub has are not sent again.

    Raises:
        HubError: no token, no network, or a refusal; the message says what was already uploaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, logging

    logging.set_verbosity_error()  # report a refusal once, not at each of the client's attempts
    targets = [(name, kind, path) for name, kind, path in _targets(folder, repo, space) if name]
    api = HfApi(library_name="saegrid")
    done: list[str] = []
    with _refusals("HF_TOKEN", done):
        api.whoami()
    for name, kind, _ in targets:
        with _refusals(name, done):
            api.create_repo(name, repo_type=kind, exist_ok=True, space_sdk="static" if kind == "space" else None)
    commits = []
    for name, kind, path in targets:
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        additions = [CommitOperationAdd(inner, path / inner) for inner in names]
        with _refusals(name, done):
            api.preupload_lfs_files(name, additions, repo_type=kind)
            commits.append((name, kind, [*additions, *_stale(api, name, kind, set(names))]))
    for name, kind, operations in commits:
        with _refusals(name, done, committing=True):
            # not upload_folder, which may split the upload into several commits
            commit = api.create_commit(name, operations, commit_message="Publish with saegrid", repo_type=kind)
        done.append(name)
        print(f"{name}: {commit.commit_url}", flush=True)


def _stale(api: Any, name: str, kind: str, names: set[str]) -> list[Any]:
    """Deletions of files that an earlier upload's manifest lists and this one lacks; other files stay."""
    from huggingface_hub import CommitOperationDelete

    present = set(api.list_repo_files(name, repo_type=kind))
    if MANIFEST not in present:
        return []
    earlier = json.loads(Path(api.hf_hub_download(name, MANIFEST, repo_type=kind)).read_text(encoding="utf-8"))
    return [CommitOperationDelete(old) for old in sorted(present & set(earlier.get("files", [])) - names)]


def _targets(folder: Path, repo: str, space: str) -> list[tuple[str, str, Path]]:
    return [(repo, "model", folder), (space, "space", folder / "site")]


def _check_id(parameter: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{parameter} = {name!r}: {str(error).split(':')[0]}") from None
    if "/" not in name:
        raise HubError(f"{parameter} = {name!r}: needs the form organisation/name")


def _check_token() -> None:
    from huggingface_hub import get_token

    if not get_token():
        raise HubError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN; nothing was published")


@contextlib.contextmanager
def _refusals(name: str, done: list[str], committing: bool = False) -> Iterator[None]:
    """Turn every refusal by the Hub or network failure inside this block into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, (HfHubHTTPError, HTTPError, OfflineModeIsEnabled)):
            cause = cause.__cause__  # the upload of large files wraps the original error
        so_far = f"{' and '.join(done)} is published, the rest is not" if done else "nothing was published"
        if committing and not isinstance(cause, HfHubHTTPError):
            so_far = f"whether its commit arrived is not known{''.join(f'; {name} is published' for name in done)}"
        raise HubError(f"{name}: {_reason(cause or error)}; {so_far}; the same command goes on from here") from None


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        why = REFUSALS.get(status, "the Hub failed, try again later" if status >= 500 else "the Hub refused")
        return f"{why} ({status}{f': {error.server_message}' if error.server_message else ''})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    said = str(error).strip().split("\n")[0] or type(error).__name__
    return f"the Hub can't be reached or breaks off ({said})" if isinstance(error, HTTPError) else f"failed: {said}"
