"""Where a language model of any layout has its blocks, and where a block has its attention and its MLP."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from saegrid.errors import ConfigError, SaegridError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Maximum relative difference between a model and its parts put together, per `lm_dtype`."""


def find_blocks(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
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


def find_part(model: nn.Module, block: nn.Module, site: str) -> nn.Module:
    """The module whose output is what a block's attention ("attn_out") or MLP ("mlp_out") adds to the residual stream.

    It is found by running a short text: of the block's modules, attention and MLP are the two whose outputs and the
    block's input sum to the block's output. Where a norm follows attention and MLP, these are the norms.

    Raises `ConfigError` if there are no such two, or the first is not an attention.
    """
    import torch

    outputs: dict[str, list[Tensor]] = {}  # in order of completion
    ends: list[Tensor] = []  # the block's input and output

    def keep(name: str) -> Any:
        return lambda module, args, output: outputs.setdefault(name, []).append(first(output).clone())

    hooks = [child.register_forward_hook(keep(name)) for name, child in block.named_children()]
    hooks += [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: ends.append(block_input(args, kwargs).clone()), with_kwargs=True
        ),
        block.register_forward_hook(lambda module, args, output: ends.append(first(output))),
    ]
    try:
        ids, mask = short_text(model)
        whole(model, [], ids[:1], mask[:1])
    finally:
        for hook in hooks:
            hook.remove()
    before, after = (end.float() for end in ends)
    once = {name: some[0] for name, some in outputs.items() if len(some) == 1 and some[0].numel() == after.numel()}
    once = {name: output.float().reshape(after.shape) for name, output in once.items()}
    rounding = torch.finfo(model.dtype).eps * (before.norm(dim=-1) + after.norm(dim=-1))
    room = TOLERANCE[str(model.dtype).removeprefix("torch.")] * (after - before).norm(dim=-1) + rounding
    errors = {
        (one, other): ((before + once[one] + once[other] - after).norm(dim=-1) / room).median().item()
        for one, other in itertools.combinations(once, 2)
    }
    attention, mlp = min(errors, key=lambda pair: errors[pair], default=("", ""))
    if errors.get((attention, mlp), 1) < 1 and (site == "mlp_out" or "att" in attention):
        return block.get_submodule(attention if site == "attn_out" else mlp)
    raise ConfigError(
        f"site = {site!r}: {type(model).__name__} has no known place for it in {type(block).__name__}, whose modules "
        f"are {', '.join(name for name, _ in block.named_children())}; resid_pre and resid_post can be read"
    )


def first(output: Any) -> Tensor:
    """The tensor that a module returns, alone or as the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def short_text(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), (2, 8) each: eight tokens, and the first five of them, padded."""
    import torch

    rows, long, short = model.get_input_embeddings().weight.shape[0], 8, 5
    ids = ((torch.arange(long, device=model.device) + 1) * rows // (long + 2)).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, short:] = ids[1, short:] = 0
    return ids, mask


def whole(model: nn.Module, parts: list[nn.Module], ids: Tensor, mask: Tensor) -> list[Any]:
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


def apart(found: Tensor, wanted: Tensor) -> float:
    """Mean over positions of the relative difference of logits (n, vocabulary), centred as softmax does."""
    found, wanted = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, wanted))
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean().item()
