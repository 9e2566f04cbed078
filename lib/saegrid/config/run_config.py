"""The parameters of one run: validated, documented, free of torch.

`RunConfig` is the single list of parameters. The tagged cell of `notebooks/train.ipynb` repeats its names and
defaults (a test compares the two), a grid file sets them under `constants` and `axes`, and every
row of the result tables carries them.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from saegrid.config.architectures import ARCHITECTURES, Arch
from saegrid.config.recipes import BANDWIDTH, L0_COEF, L1_COEF, SHUFFLE_ROWS, YOUNGER, resolve
from saegrid.errors import ConfigError, explain
from saegrid.storage.hub_access import expanded

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
EMBEDDED_DATASET = "embedded:gsm_symbolic"
SAMPLE_ROWS = 65_536
"""Training rows that a streamed run's store has: what is estimated before training is estimated from them."""
Site = Literal["resid_post", "resid_pre", "mlp_out", "attn_out"]
SITES = {
    "resid_post": "the residual stream after block {}",
    "resid_pre": "the residual stream before block {}",
    "mlp_out": "the MLP's output in block {}",
    "attn_out": "the attention's output in block {}",
}
"""Each site in words, with room for the layer."""


class RunConfig(BaseModel):
    """One grid point. `k=0` and `threshold=0.0` mean "not given"; papermill has no other way to say so.

    "recipe" and -1 mean "as the recipe says" (`saegrid/config/recipes.py`); a validated config holds resolved values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # --- language model ---
    model: str = Field(EMBEDDED_MODEL, min_length=1)
    """`embedded:smollm2-135m-instruct`, a local folder, or the Hub id of a causal language model."""
    model_revision: str = ""
    """Hub revision (branch, tag or commit); empty is the default branch."""
    model_init: Literal["trained", "random"] = "trained"
    """`random` is a control (arXiv:2501.17727): untrained weights, embeddings included, drawn from `data_seed`."""
    layer: int = Field(12, ge=0)
    """Index of the decoder block that is read. Its output is `hidden_states[layer + 1]`, except for the last block:
    there transformers has already applied the final norm."""
    site: Site = "resid_post"
    """What is read there and replaced: the residual stream after or before the block (before block 0: the embedding),
    or what its MLP or its attention adds to it."""
    lm_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the language model's passes, for the activations and for the splice."""

    # --- text ---
    dataset: str = Field(EMBEDDED_DATASET, min_length=1)
    """`embedded:gsm_symbolic`, `embedded:python_docs`, `embedded:python_code`, a `.jsonl`, `.parquet`, `.txt` or `.md`
    file, a folder of them, or a Hub id."""
    dataset_revision: str = ""
    """Hub revision of the dataset; empty is the default branch."""
    dataset_config: str = ""
    """Configuration of a Hub dataset that has several."""
    dataset_split: str = ""
    """Split to draw all text from; empty: evaluation from `test` and the rest from `train`, if both exist."""
    text_field: str = ""
    """Field with text or messages; empty: `question` and `answer`, else `text`, else `messages`."""
    text: Literal["plain", "chat"] = "plain"
    """Question and worked answer as plain text, or in the chat template. Messages are always put in the template."""
    max_tokens: int = Field(512, ge=2)
    """Prompts are truncated to this many tokens."""
    context: int = Field(0, ge=0)
    """Plain documents are packed into contexts of this many tokens; 0: `max_tokens`."""
    skip_tokens: str = ""
    """Tokens that are neither trained on nor spliced: `special`, `bos` or token ids, separated by commas."""
    train_tokens: int = Field(100_000, ge=1)
    """Rows of activations to train on."""
    val_tokens: int = Field(20_000, ge=1)
    """Rows of activations for validation, from templates (or prompts) that training never sees."""
    eval_prompts: int = Field(50, ge=1)
    """Prompts for the splice, from templates (or prompts) that neither training nor validation sees."""
    data_seed: int = Field(0, ge=0)
    """Seed of the prompts and of the split."""

    # --- activations ---
    activations: str = ""
    """Folder or Hub dataset with published `{stage}_layer{layer}[_train|_val].pt` files; empty: run the model."""
    activations_revision: str = ""
    """Hub revision of `activations`."""
    activations_stage: str = "instruct_base"
    """Stage in the published files' names."""
    act_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the rows (the published files are float16)."""
    rows: Literal["stored", "streamed"] = "stored"
    """Training rows on disk, for any number of runs and epochs; or made while one run trains on them, for one epoch."""
    shuffle_rows: int = Field(SHUFFLE_ROWS, ge=1)
    """Streamed rows that are shuffled together; about twice as many are in memory."""

    # --- sparse autoencoder ---
    arch: Arch = "BatchTopK"
    """Architecture."""
    expansion: int = Field(8, ge=1, le=1024)
    """d_sae / d_in."""
    k: int = Field(0, ge=0)
    """Latents per row; 0: not given. TopK: kept in each row; BatchTopK, Matryoshka: batch average; Gated, JumpReLU
    (which then trains thresholds): average over held-out rows; ReLU: target."""
    threshold: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """JumpReLU's fixed theta, one for all latents; 0.0: not given."""
    threshold_unit: Literal["absolute", "rms"] = "absolute"
    """Unit of `threshold`: the activations' own, or the RMS of the pre-activations at the start of training."""

    prefixes: int = Field(0, ge=0, le=16)
    """Number of Matryoshka's nested dictionaries: d_sae latents, half of them, a quarter, …; 0: 5 for Matryoshka."""
    bandwidth: float = Field(BANDWIDTH, gt=0.0, allow_inf_nan=False)
    """JumpReLU with k: width of the band around theta that gives its gradient, in scaled pre-activations."""
    l0_coef: float = Field(L0_COEF, ge=0.0, allow_inf_nan=False)
    """JumpReLU with k: weight of (L0 / k - 1)², relative to the mean squared error of rows with a mean square of 1."""
    theta_tie: float = Field(-1.0, ge=0.0, allow_inf_nan=False)
    """JumpReLU with k: decay of thetas towards their mean, in units of their learning rate (10 lr); 0: none; -1: 10."""
    l1_coef: float = Field(L1_COEF, gt=0.0, allow_inf_nan=False)
    """ReLU, Gated: initial L1 weight (the loss divides it by d_in); adapted until k latents per row are active."""

    # --- training ---
    recipe: Literal["published", "improved"] = "published"
    """The training choices: the published sweep's, or those of later research. Each can be overridden alone."""
    epochs: int = Field(10, ge=1)
    """Passes over the training rows."""
    batch_size: int = Field(512, ge=1)
    """Rows per step, before sinks are removed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights and of the order of the rows."""
    lr_final: float = Field(0.0, ge=0.0, le=1.0)
    """The learning rate ends at `lr * lr_final` (torch's default: 0; the activation dataset's code: 0.1)."""
    freeze: Literal["none", "decoder", "encoder", "soft"] = "none"
    """A control (arXiv:2602.14111): W_dec or W_enc keeps its initial value; soft: W_dec's cosine with it is >= 0.8."""
    checkpoint_steps: int = Field(1000, ge=1)
    """Maximum steps between checkpoints; one is also saved after an epoch if the last is over 20 s old."""

    # --- training: choices that the recipe makes ---
    lr: float = Field(-1.0, gt=0.0, allow_inf_nan=False)
    """Adam's peak learning rate, in scaled units if `act_scale` scales."""
    lr_schedule: Literal["recipe", "cosine", "linear"] = "recipe"
    """Cosine annealing over all steps, or constant with linear decay over the last fifth."""
    warmup: float = Field(-1.0, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises from 0."""
    grad_clip: float = Field(-1.0, ge=0.0, allow_inf_nan=False)
    """Maximum global gradient norm; 0: no clipping (the activation dataset's code: 1.0)."""
    project_grad: bool | Literal["recipe"] = "recipe"
    """Remove the part of the decoder's gradient along each decoder direction before Adam."""
    b_pre_init: Literal["recipe", "zero", "mean", "centre"] = "recipe"
    """Initial `b_pre`: zeros, the training rows' mean (as in the activation dataset's code), or that without sinks."""
    encoder_init: Literal["recipe", "kaiming", "decoder"] = "recipe"
    """Initial encoder: torch's `Linear` default, or the transposed decoder."""
    encoder_tie: float = Field(-1.0, ge=0.0, allow_inf_nan=False)
    """Weight decay of the encoder towards the transposed decoder, in units of the learning rate; 0: none."""
    act_scale: Literal["recipe", "none", "unit"] = "recipe"
    """Train on raw rows, or on rows scaled to a mean square of 1 (without sinks); saved weights take raw rows."""
    sinks: Literal["recipe", "keep", "apart"] = "recipe"
    """Attention sinks: trained like other rows, or left out, with their direction reserved for two latents."""
    aux_coef: float = Field(-1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the AuxK loss, which trains dead latents on the residual; 0: none."""
    dead_window: float = Field(-1.0, gt=0.0, le=1.0)
    """A latent that has not fired for this share of the run's rows is dead for AuxK."""

    # --- machine ---
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of all tensors; `auto` takes a GPU if torch finds one."""
    kernel: Literal["auto", "reference", "cpu", "dense"] = "auto"
    """Implementation of the training step; `auto` takes the fastest on the device and records it."""
    matmul: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products in training (kernel `cpu`: only the encoder's), and in the language model's blocks
    after the hooked one when an SAE is spliced in; all else uses fp32."""
    threads: int = Field(0, ge=0)
    """Threads per run; 0: `OMP_NUM_THREADS` if set, else all cores. Recorded, and reused on resume."""

    # --- places: not part of a run's identity ---
    runs_dir: str = Field("runs", min_length=1)
    """Folder for the runs."""
    store_dir: str = Field("activations", min_length=1)
    """Folder for the activation stores."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_recipe_says(cls, parameters: Any) -> Any:
        if not isinstance(parameters, dict):
            return parameters
        arch = ARCHITECTURES.get(str(parameters.get("arch", "BatchTopK")))
        default = arch.prefixes if arch else 0
        return resolve(parameters) | {"prefixes": parameters.get("prefixes", 0) or default}

    @field_validator("*", mode="before")
    @classmethod
    def _as_yaml_means_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Fix types: `1e-4` is a string in YAML 1.1, and papermill's `-p revision 123` is a number."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if annotation is float and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
        if annotation is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return value

    @model_validator(mode="after")
    def _arch_and_its_sparsity(self) -> RunConfig:
        arch, name = ARCHITECTURES[self.arch], self.arch
        if arch.takes_threshold:
            if self.k and self.threshold:
                raise ValueError(f"k = {self.k}: {name} takes a fixed threshold, or a k to train thresholds, not both")
            if not self.k and not self.threshold:
                raise ValueError(
                    f"threshold = 0.0: {name} needs a threshold above 0, such as 0.1 or 0.5, or a k to train thresholds"
                )
        elif self.threshold:
            raise ValueError(f"threshold = {self.threshold}: not a parameter of {name}, which takes k")
        elif not self.k:
            raise ValueError(f"k = 0: {name} needs a k of at least 1, such as 64, 128 or 220")
        if self.presses_l1 and self.act_scale != "unit":
            raise ValueError(_scaled_only(self.k, f"{name} weighs its L1"))
        if self.trains_theta and self.act_scale != "unit":
            raise ValueError(_scaled_only(self.k, f"{name} trains its thresholds"))
        if self.theta_tie and not arch.has_tied_thetas(self.k > 0):
            raise ValueError(f"theta_tie = {self.theta_tie:g}: only JumpReLU with a k takes it")
        if self.prefixes and not arch.prefixes:
            raise ValueError(f"prefixes = {self.prefixes}: not a parameter of {name}; only Matryoshka takes it")
        return self

    @model_validator(mode="after")
    def _published_rows(self) -> RunConfig:
        if self.model_init == "random" and self.activations:
            raise ValueError("model_init = 'random': `activations` holds a trained model's rows; leave it out")
        if self.site != "resid_post" and self.activations:
            raise ValueError(f"site = {self.site!r}: `activations` holds rows of resid_post; leave it out")
        return self

    @model_validator(mode="after")
    def _streamed_rows(self) -> RunConfig:
        if self.rows == "stored" and self.shuffle_rows != SHUFFLE_ROWS:
            raise ValueError(f"shuffle_rows = {self.shuffle_rows}: only rows = 'streamed' takes it")
        if self.rows == "streamed" and self.epochs != 1:
            raise ValueError(f"epochs = {self.epochs}: streamed rows are made once; set epochs = 1")
        if self.rows == "streamed" and self.activations:
            raise ValueError("rows = 'streamed': `activations` holds stored rows; leave it out")
        return self

    @field_validator("context")
    @classmethod
    def _room_for_a_next_token(cls, value: int) -> int:
        if value == 1:
            raise ValueError("at least 2, or 0 for max_tokens")
        return value

    @field_validator("skip_tokens")
    @classmethod
    def _token_classes(cls, value: str) -> str:
        if not re.fullmatch(r"((special|bos|\d{1,9})(, ?(?!$)|$))*", value):
            raise ValueError("must be special, bos or token ids, separated by commas")
        return value

    @field_validator("runs_dir", "store_dir")
    @classmethod
    def _a_place(cls, value: str) -> str:
        return check_place(value)

    def check_shape(self, d_in: int, n_layers: int) -> None:
        """Check the run against the language model's shape. Raises `ConfigError`."""
        if self.layer >= n_layers:
            raise ConfigError(f"layer = {self.layer}: {self.model} has layers 0 to {n_layers - 1}")
        if self.activations and self.layer == n_layers - 1:
            what = "published files of the last block may hold states after the final norm"
            raise ConfigError(f"layer = {self.layer}: {what} (transformers' last hidden_states); leave out activations")
        if self.k > self.expansion * d_in:
            raise ConfigError(
                f"k = {self.k}: at most d_sae = expansion * d_in = {self.expansion} * {d_in} = {self.expansion * d_in}"
            )
        if self.prefixes and self.k > (smallest := self.expansion * d_in >> (self.prefixes - 1)):
            raise ConfigError(
                f"prefixes = {self.prefixes}: the smallest has {smallest} latents, fewer than k = {self.k}"
            )

    @property
    def stored_tokens(self) -> int:
        """Training rows in the run's store."""
        return min(self.train_tokens, SAMPLE_ROWS) if self.rows == "streamed" else self.train_tokens

    @property
    def trains_theta(self) -> bool:
        """Whether each latent has its own trained threshold."""
        return ARCHITECTURES[self.arch].has_thetas(self.k > 0)

    @property
    def presses_l1(self) -> bool:
        """Whether an L1 penalty brings L0 to k."""
        return ARCHITECTURES[self.arch].l1

    def check_training(self) -> None:
        """Check the batch size against the number of rows, if known. Raises `ConfigError`."""
        if not self.activations and self.batch_size > self.train_tokens:
            raise ConfigError(f"batch_size = {self.batch_size}: at most train_tokens = {self.train_tokens}")

    @property
    def name(self) -> str:
        """The published file name without its ending: `BatchTopK_exp8x_k220`, `JumpReLU_exp8x_t0.5`; then the
        recipe unless it is the published one, and what makes the run a control."""
        sparsity = f"t{self.threshold:g}" if self.threshold else f"k{self.k}"
        recipe = "" if self.recipe == "published" else f"_{self.recipe}"
        frozen = "" if self.freeze == "none" else f"_frozen-{self.freeze}"
        untrained = "_untrained-model" if self.model_init == "random" else ""
        return f"{self.arch}_exp{self.expansion}x_{sparsity}{recipe}{frozen}{untrained}"

    @property
    def run_id(self) -> str:
        """Unique name of the run: readable part, seed, and a hash of every parameter that can change its result."""
        return f"{self.name}_s{self.seed}_{_digest(_without_younger(self.identity()))}"

    @property
    def store_id(self) -> str:
        """Unique name of the activation store that the run reads."""
        site = "" if self.site == "resid_post" else f"_{self.site}"
        return f"layer{self.layer}{site}_{_digest(self.store_parameters)}"

    @property
    def store_parameters(self) -> dict[str, Any]:
        """Parameters that determine the activation store; newer ones only if they differ from what older stores had."""
        return _without_younger(self.model_dump(include=STORE_FIELDS))

    def identity(self) -> dict[str, Any]:
        """Every parameter that can change the run's result."""
        return self.model_dump(exclude=PLACES)


PLACES = {"runs_dir", "store_dir"}
STORE_FIELDS = {
    *("model", "model_revision", "model_init", "layer", "site", "lm_dtype"),
    *("dataset_config", "dataset_split", "text_field", "context", "skip_tokens"),
    *("dataset", "dataset_revision", "text", "max_tokens", "train_tokens", "val_tokens", "eval_prompts", "data_seed"),
    *("activations", "activations_revision", "activations_stage", "act_dtype", "rows"),
}
"""Parameters that determine an activation store's content, its evaluation prompts included."""


def _scaled_only(k: int, what: str) -> str:
    return f"k = {k}: {what} on scaled rows only; set act_scale = 'unit' or recipe = 'improved'"


def make_config(**parameters: Any) -> RunConfig:
    """A `RunConfig`; any mistake is reported in one line.

    Raises:
        ConfigError: names the first parameter at fault, its value, and what is allowed.
    """
    try:
        return RunConfig(**parameters)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig.model_fields, flat=True)) from None


def check_place(path: str) -> str:
    """A folder name that is safe in a shell line, a Snakemake pattern and a link, with `~` expanded.

    Raises `ValueError`.
    """
    path = str(expanded(path)) if path.startswith("~") else path
    if not path.isprintable() or re.search(r"[{}\\\"'`$*?<>|;&]", path) or path.startswith("-"):
        raise ValueError("must be a folder name without quotes, braces or shell characters")
    return path


def _without_younger(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in YOUNGER or value != YOUNGER[name]}


def _digest(parameters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
