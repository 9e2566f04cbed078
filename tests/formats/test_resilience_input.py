"""Hostile input: what the fuzzer found, arbitrary bytes and near misses, names that would reach elsewhere."""

import functools
import itertools
import json
import tempfile
from pathlib import Path

import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saegrid.config import grid
from saegrid.config.run_config import make_config
from saegrid.data.manifest import read_manifest
from saegrid.errors import SaegridError, StoreError
from saegrid.experiment import finished_run, results
from saegrid.report.pages import home_page
from saegrid.storage.checksums import read_sealed, write_sealed

FOUND = sorted(Path("tests/fuzz/found").glob("*/*"))
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def seeds_of(target):
    with tempfile.TemporaryDirectory() as folder:
        return targets.seeds(target, Path(folder) / "seeds")


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name[:12]}")
def test_what_the_fuzzer_found(path, tmp_path):
    targets.check(path.parent.name, path.read_bytes(), tmp_path / "input")


@pytest.mark.parametrize("target", targets.TARGETS)
def test_seeds_are_taken(target, tmp_path):
    taken = [targets.check(target, seed, tmp_path / "in") for seed in seeds_of(target)]
    assert any(taken)


@pytest.mark.parametrize("target", targets.TARGETS)
@quick
@given(data=st.data())
def test_changed_inputs_are_taken_or_refused(target, tmp_path, data):
    """A valid input with a stretch cut out, repeated, or replaced."""
    content = data.draw(st.sampled_from(seeds_of(target)))
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    middle = data.draw(st.one_of(st.binary(max_size=12), st.just(content[start:end] * 2), st.just(b"\xff" * 8)))
    targets.check(target, content[:start] + middle + content[end:], tmp_path / "input")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*make_config(k=4).model_dump(), "other"]), plain, max_size=4))
def test_any_values_give_a_config_or_one_line(parameters):
    try:
        make_config(**parameters)
    except SaegridError as error:
        assert "\n" not in str(error) and len(str(error)) <= 1000


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "train-00000.safetensors/../x", "a;b", "mean"])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, name):
    content = json.loads(targets.seeds("store", tmp_path)[0].split(targets.SPLIT)[0])
    content["shards"]["train"][0]["file"] = name
    write_sealed(tmp_path / "manifest.json", content)
    with pytest.raises(StoreError, match=r"manifest\.json: damaged \(shards\.train\.0\.file"):
        read_manifest(tmp_path)


def test_yaml_that_would_call_or_grow_is_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    names = "abcdefghi"
    grown = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    grown += "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in itertools.pairwise(names))
    called = "!!python/object/apply:os.system ['touch /tmp/owned']"
    for text in (called, grown, "[" * 5000, "k: 1" + "0" * 5000, "x" * 2_000_000):
        path.write_text(text)
        with pytest.raises(SaegridError) as error:
            grid.load_grid(path).runs()
        assert len(str(error.value)) <= 1000
    assert not Path("/tmp/owned").exists()


def test_json_that_is_absurd_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "NaN", "[]", '"x"', "", "\x00", '{"sha256": null}'):
        path.write_text(text)
        with pytest.raises(SaegridError):
            read_sealed(path)
    with pytest.raises(SaegridError, match="not a plain file"):
        read_sealed(Path("/dev/zero"))


def test_a_message_can_not_steer_a_terminal():
    assert str(SaegridError("a\x1b[31m\n\tb\u202e")) == "a\\x1b[31m b\\u202e"


def test_a_models_name_is_text_in_the_report(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs").assign(model="/models/<script>alert(1)")
    text = home_page.model_card(df, finished_run.load_prompts(df, fake_runs / "runs"), links="r/")
    assert "<script" not in home_page.title(df) + text and "&lt;script" in text
