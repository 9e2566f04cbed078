"""Bad parameters: every mistake is one line that names parameter and value, with an exit code, within seconds."""

import os
import sys
import time

import nbformat
import pytest
import yaml
from huggingface_hub import constants
from processes import called, papermill

from saegrid.__main__ import main
from saegrid.config.run_config import RunConfig
from saegrid.errors import ConfigError

SECONDS, PAPERMILL_SECONDS = 5, 15
TOPK = {"arch": "TopK", "k": 4}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}

# (constants over a TopK with k = 4, words that the line must have)
POINTS = [
    ({"k": -1}, ["k = -1", "greater than or equal to 0"]),
    ({"k": 0}, ["k = 0", "at least 1"]),
    ({"k": "many"}, ["k = 'many'", "integer"]),
    ({"k": 3.5}, ["k = 3.5", "integer"]),
    ({"k": True}, ["k = True", "integer"]),
    ({"k": None}, ["k = None", "integer"]),
    ({"k": [4]}, ["k = [4]", "integer"]),
    ({"k": 4609, "expansion": 8}, ["k = 4609", "at most d_sae", "4608"]),
    ({"arch": "Relu"}, ["arch = 'Relu'", "'TopK', 'BatchTopK', 'JumpReLU', 'Matryoshka', 'ReLU' or 'Gated'"]),
    ({"threshold": 0.5}, ["threshold = 0.5", "not a parameter of TopK"]),
    ({"arch": "BatchTopK", "threshold": 0.5}, ["threshold = 0.5", "not a parameter of BatchTopK"]),
    ({"arch": "JumpReLU"}, ["k = 4", "act_scale = 'unit'", "recipe = 'improved'"]),
    ({"arch": "JumpReLU", "threshold": 0.5}, ["k = 4", "a fixed threshold"]),
    ({"arch": "JumpReLU", "k": 0}, ["threshold = 0.0", "above 0"]),
    ({"arch": "JumpReLU", "k": 0, "threshold": -0.5}, ["threshold = -0.5", "greater than or equal to 0"]),
    ({"arch": "JumpReLU", "k": 0, "threshold": float("inf")}, ["threshold = inf", "finite"]),
    ({"bandwidth": 0.0}, ["bandwidth = 0.0", "greater than 0"]),
    ({"l0_coef": -1.0}, ["l0_coef = -1.0", "greater than or equal to 0"]),
    ({"l1_coef": 0.0}, ["l1_coef = 0.0", "greater than 0"]),
    ({"threshold_unit": "furlong"}, ["threshold_unit = 'furlong'", "'absolute' or 'rms'"]),
    ({"expansion": 0}, ["expansion = 0", "greater than or equal to 1"]),
    ({"expansion": 0.5}, ["expansion = 0.5", "integer"]),
    ({"expansion": 1025}, ["expansion = 1025", "less than or equal to 1024"]),
    ({"layer": -1}, ["layer = -1", "greater than or equal to 0"]),
    ({"layer": 30}, ["layer = 30", "layers 0 to 29"]),
    ({"layer": "last"}, ["layer = 'last'", "integer"]),
    ({"site": "mlp_in"}, ["site = 'mlp_in'", "'resid_post', 'resid_pre', 'mlp_out' or 'attn_out'"]),
    ({"site": "mlp_out", "activations": "a"}, ["site = 'mlp_out'", "`activations` holds rows of resid_post"]),
    ({"lm_dtype": "float8"}, ["lm_dtype = 'float8'", "'float32' or 'bfloat16'"]),
    ({"act_dtype": "int8"}, ["act_dtype = 'int8'", "'float16' or 'float32'"]),
    ({"text": "verse"}, ["text = 'verse'", "'plain' or 'chat'"]),
    ({"max_tokens": 1}, ["max_tokens = 1", "greater than or equal to 2"]),
    ({"train_tokens": 0}, ["train_tokens = 0", "greater than or equal to 1"]),
    ({"train_tokens": 1e5}, ["train_tokens = 100000.0", "integer"]),
    ({"val_tokens": 0}, ["val_tokens = 0", "greater than or equal to 1"]),
    ({"eval_prompts": 0}, ["eval_prompts = 0", "greater than or equal to 1"]),
    ({"data_seed": -1}, ["data_seed = -1", "greater than or equal to 0"]),
    ({"rows": "disk"}, ["rows = 'disk'", "'stored' or 'streamed'"]),
    ({"shuffle_rows": 0}, ["shuffle_rows = 0", "greater than or equal to 1"]),
    ({"epochs": 0}, ["epochs = 0", "greater than or equal to 1"]),
    ({"epochs": "ten"}, ["epochs = 'ten'", "integer"]),
    ({"batch_size": 0}, ["batch_size = 0", "greater than or equal to 1"]),
    ({"batch_size": 2000, "train_tokens": 1000}, ["batch_size = 2000", "at most train_tokens = 1000"]),
    ({"lr": 0}, ["lr = 0", "greater than 0"]),
    ({"lr": float("nan")}, ["lr = nan"]),
    ({"lr": "fast"}, ["lr = 'fast'", "number"]),
    ({"lr_final": 2}, ["lr_final = 2", "less than or equal to 1"]),
    ({"grad_clip": -2}, ["grad_clip = -2", "greater than or equal to 0"]),
    ({"seed": 2**31}, ["seed = 2147483648", "less than 2147483648"]),
    ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
    ({"b_pre_init": "median"}, ["b_pre_init = 'median'", "'recipe', 'zero', 'mean' or 'centre'"]),
    ({"encoder_init": "ones"}, ["encoder_init = 'ones'", "'kaiming' or 'decoder'"]),
    ({"theta_tie": -2}, ["theta_tie = -2", "greater than or equal to 0"]),
    ({"encoder_tie": -2}, ["encoder_tie = -2", "greater than or equal to 0"]),
    ({"project_grad": "yes"}, ["project_grad = 'yes'", "boolean"]),
    ({"recipe": "secret"}, ["recipe = 'secret'", "'published' or 'improved'"]),
    ({"prefixes": 3}, ["prefixes = 3", "not a parameter of TopK"]),
    ({"lr_schedule": "step"}, ["lr_schedule = 'step'", "'cosine' or 'linear'"]),
    ({"warmup": 1}, ["warmup = 1", "less than 1"]),
    ({"act_scale": "half"}, ["act_scale = 'half'", "'none' or 'unit'"]),
    ({"sinks": "drop"}, ["sinks = 'drop'", "'keep' or 'apart'"]),
    ({"aux_coef": -2}, ["aux_coef = -2", "greater than or equal to 0"]),
    ({"dead_window": 0}, ["dead_window = 0", "greater than 0"]),
    ({"freeze": "all"}, ["freeze = 'all'", "'decoder', 'encoder' or 'soft'"]),
    ({"model_init": "mean"}, ["model_init = 'mean'", "'trained' or 'random'"]),
    ({"checkpoint_steps": 0}, ["checkpoint_steps = 0", "greater than or equal to 1"]),
    ({"kernel": "tpu"}, ["kernel = 'tpu'", "'cpu'"]),
    ({"device": "tpu"}, ["device = 'tpu'", "'auto', 'cpu' or 'cuda'"]),
    ({"matmul": "int4"}, ["matmul = 'int4'", "'bf16'"]),
    ({"threads": -1}, ["threads = -1", "greater than or equal to 0"]),
    ({"runs_dir": ""}, ["runs_dir = ''", "at least 1 character"]),
    ({"runs_dir": "a; rm -rf b"}, ["runs_dir = 'a; rm -rf b'", "folder"]),
    ({"store_dir": "{wildcard}"}, ["store_dir = '{wildcard}'", "folder"]),
    ({"model": ""}, ["model = ''", "at least 1 character"]),
    ({"model": "/no/such/folder"}, ["model = '/no/such/folder'", "no such folder"]),
    ({"model": "embedded:gpt5"}, ["model = 'embedded:gpt5'", "embedded:smollm2-135m-instruct"]),
    ({"model": "../../etc/passwd"}, ["model = '../../etc/passwd'"]),
    ({"dataset": "embedded:none"}, ["dataset = 'embedded:none'", "embedded:gsm_symbolic"]),
    ({"dataset": "/no/such/folder"}, ["dataset = '/no/such/folder'", "no such folder"]),
    ({"dataset": "workflow"}, ["dataset = 'workflow'", "no .jsonl, .parquet, .txt or .md file"]),
    ({"context": 1}, ["context = 1", "at least 2"]),
    ({"skip_tokens": "eos"}, ["skip_tokens = 'eos'", "must be special, bos or token ids"]),
    ({"arch": "ReLU", "k": 3}, ["k = 3", "ReLU weighs its L1 on scaled rows only; set act_scale = 'unit'"]),
    ({"arch": "Gated", "k": 0, "recipe": "improved"}, ["k = 0", "Gated needs a k of at least 1"]),
    ({"arch": "Gated", "k": 3, "threshold": 0.5}, ["threshold = 0.5", "not a parameter of Gated"]),
    ({"arch": "JumpReLU", "k": [4, 8], "recipe": "improved"}, ["k = [4, 8]", "valid integer"]),
    ({"theta_tie": 3}, ["theta_tie = 3", "only JumpReLU with a k takes it"]),
    ({"arch": "JumpReLU", "k": 0, "threshold": 0.5, "theta_tie": 3}, ["theta_tie = 3", "JumpReLU with a k"]),
    ({"recipe": ["improved"]}, ["recipe = ['improved']", "'published' or 'improved'"]),
    ({"lr": [1e-3]}, ["lr = [0.001]", "number"]),
    ({"model_init": "random", "activations": "a"}, ["model_init = 'random'", "a trained model's rows"]),
    ({"learning_rate": 1e-4}, ["learning_rate = 0.0001", "no such parameter", "lr"]),
    ({"K": 4}, ["K = 4", "no such parameter"]),
]
GRIDS = [
    ("", ["needs name, title"]),
    ("[1, 2]", ["needs name, title"]),
    ("name: [", ["not YAML"]),
    ("name: g\nname: h\ntitle: t\naxes: [{k: [4]}]", ["name is there twice"]),
    ("title: t\naxes: [{k: [4]}]", ["name is missing"]),
    ("name: ../g\ntitle: t\naxes: [{k: [4]}]", ["name = '../g'", "pattern"]),
    ("name: g\ntitle: t\naxes: {k: [4]}", ["axes = ", "list"]),
    ("name: g\ntitle: t\naxes: [{k: 4}]", ["axes.0.k = 4", "list"]),
    ("name: g\ntitle: t\naxes: [{k: []}]", ["axes", "0 runs"]),
    ("name: g\ntitle: t\naxes: [{k: [4], runs_dir: [a, b]}]", ["runs_dir = ['a', 'b']", "not an axis"]),
    ("name: g\ntitle: t\nresults_dir: $(id)\naxes: [{k: [4]}]", ["results_dir = '$(id)'", "folder"]),
    ("name: g\ntitle: t\naxes: [{arch: [TopK], k: [4]}]\nseeds: [1]", ["seeds"]),
    ("name: g\ntitle: t\naxes: []", ["axes"]),
    ("name: g\ntitle: t\naxes: [{arch: [TopK], k: [4, 4]}]", ["twice"]),
    ("name: g\ntitle: t\nconstants: {k: 4}\naxes: [{k: [4]}]", ["both a constant and an axis"]),
    ("name: g\ntitle: t\naxes: [{k: [4], kk: [4]}]", ["kk = 4: no such parameter"]),
    ("name: g\ntitle: t\naxes: [{arch: [TopK], threshold: [0.1]}]", ["threshold = 0.1"]),
    (f"name: g\ntitle: t\naxes: [{{{', '.join(f'a{n}: [1, 2, 3, 4, 5, 6, 7, 8, 9]' for n in range(9))}}}]", ["runs"]),
]
COMMANDS = [
    ([], ["command"]),
    (["frobnicate"], ["frobnicate", "collect", "tables"]),
    (["list"], ["grid"]),
    (["list", "no.yaml"], ["no.yaml", "No such file"]),
    (["list", "params"], ["params", "not a plain file"]),
    (["list", "params/smoke.yaml", "--frob"], ["--frob"]),
    (["collect", "params/smoke.yaml"], ["store_id"]),
    (["collect", "params/smoke.yaml", "layer9_0"], ["store_id = 'layer9_0'", "layer12_"]),
    (["tables", "params/qwen05b.yaml"], ["metrics.json", "has not finished"]),
    (["pages", "params/qwen05b.yaml"], ["results/qwen05b", "saegrid tables"]),
    (["pages", "no.yaml"], ["no.yaml", "No such file"]),
    (["publish", "params/qwen05b.yaml", "--repo", "no/id/x"], ["repo = 'no/id/x'", "namespace/repo_name"]),
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Whether a command is refused in one line that has these words, soon, and before it writes anything."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def check(arguments, words):
        before = time.process_time()
        assert main(arguments) == 2
        assert time.process_time() - before < SECONDS
        printed, error = capsys.readouterr()
        assert printed == ""
        assert len(error.strip().splitlines()) == 1, error
        assert all(word in error for word in words), error
        assert not list(tmp_path.glob("runs*"))

    return check


@pytest.mark.parametrize(("changes", "words"), POINTS, ids=[" ".join(map(str, c.items())) for c, _ in POINTS])
def test_a_bad_point(tmp_path, refused, changes, words):
    axis = "layer" if "seed" in changes else "seed"
    grid = {"name": "g", "title": "t", "constants": {**TOPK, **changes}, "axes": [{axis: [3]}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    refused(["list", str(tmp_path / "grid.yaml")], words)


def test_every_parameter_that_can_be_wrong_is_in_the_table():
    free = {"model_revision", "dataset_revision", "activations_revision", "activations_stage"}
    free |= {"dataset_config", "dataset_split", "text_field"}
    tried = {name for changes, _ in POINTS for name in changes}
    assert set(RunConfig.model_fields) - tried == free  # any text will do for these


@pytest.mark.parametrize(("text", "words"), GRIDS)
def test_a_bad_grid_file(tmp_path, refused, text, words):
    (tmp_path / "grid.yaml").write_text(text)
    refused(["list", str(tmp_path / "grid.yaml")], words)


@pytest.mark.parametrize(("arguments", "words"), COMMANDS, ids=[" ".join(a) for a, _ in COMMANDS])
def test_a_bad_command(refused, arguments, words):
    refused(arguments, words)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["tables", "params/qwen05b.yaml"]])
def test_a_command_that_is_refused_ends_soon_with_one_line(arguments):
    done, seconds = called([sys.executable, "-m", "saegrid", *arguments], env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert seconds < SECONDS


def test_the_workflow_tells_a_bad_grid_in_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: g\ntitle: t\naxes: [{k: [-4]}]")
    command = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--cores", "1", "--dry-run"]
    done, _ = called([*command, "--config", f"grid={tmp_path}/bad.yaml"], env=ENVIRONMENT)
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert last == "ConfigError: k = -4: input should be greater than or equal to 0"


NOTEBOOKS = [
    ("train", "k=-4", ["k = -4", "greater than or equal to 0"]),
    ("train", "k=4 kk=4", ["kk = 4", "no such parameter"]),
    ("train", "k=600 expansion=1", ["k = 600", "at most d_sae"]),
    ("train", "k=4 expansion=1024 batch_size=100000", ["expansion = 1024", "GB of memory", "are free"]),
    ("train", "k=4 activations=notebooks", ["activations = 'notebooks'", "needs instruct_base_layer12_train.pt"]),
    ("findings", "run_dir=x", ["run_dir = 'x': no such parameter; known are"]),
    ("latents", "run_dir=x", ["run_dir = 'x': no such parameter; known are"]),
]


@pytest.mark.parametrize(("notebook", "parameters", "words"), NOTEBOOKS)
def test_a_mistake_is_one_line_of_a_notebooks_first_cells(tmp_path, notebook, parameters, words):
    code = [cell.source for cell in nbformat.read(f"notebooks/{notebook}.ipynb", 4).cells if cell.cell_type == "code"]
    names = {}
    exec(code[0], names)
    if notebook == "train":
        names |= {name: f"{tmp_path}/{name}" for name in ("runs_dir", "store_dir")}
    names |= {name: yaml.safe_load(value) for name, value in (pair.split("=") for pair in parameters.split())}
    with pytest.raises(ConfigError) as error:
        exec(code[1], names)
        exec(code[2], names)
    (line,) = error.value._render_traceback_()
    assert "\n" not in line and all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("notebook", "parameters", "words"), [NOTEBOOKS[0], NOTEBOOKS[-2]])
def test_a_mistake_stops_papermill_at_once_in_one_line(tmp_path, notebook, parameters, words):
    places = [f"runs_dir={tmp_path}/runs", f"store_dir={tmp_path}/activations"] if notebook == "train" else []
    done, seconds = papermill(notebook, tmp_path / "out.ipynb", *parameters.split(), *places, env=ENVIRONMENT)
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert done.returncode != 0 and all(word in last for word in words), done.stderr[-2000:]
    outputs = [o for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in cell.get("outputs", [])]
    assert [output["traceback"] for output in outputs if output.output_type == "error"] == [[last]]
    assert not (tmp_path / "runs").exists() and not (tmp_path / "activations").exists()
    assert seconds < PAPERMILL_SECONDS
