"""Tiny seeded language models of every known layout, a byte-level tokenizer, and small datasets."""

import contextlib
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from saegrid.experiment.run import Run

VOCAB, D_IN, N_LAYERS = 260, 16, 3
SHAPE = {"vocab_size": VOCAB, "hidden_size": D_IN, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2}
LLAMA = {**SHAPE, "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 256}
SMALL = {"layer": 1, "max_tokens": 64, "train_tokens": 600, "val_tokens": 200, "eval_prompts": 4, "batch_size": 64}
SMALL |= {"threads": 1, "kernel": "reference"}
"""Sizes of a run on a tiny model."""
# a large initializer range makes attention and MLP matter next to the embeddings
LAYOUTS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, initializer_range=0.3, tie_word_embeddings=True)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=32, initializer_range=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=D_IN, n_layer=N_LAYERS, n_head=2, n_positions=64, initializer_range=0.3)
    ),
}


def tiny_model(layout):
    torch.manual_seed(0)
    return LAYOUTS[layout]().eval()


def tiny_tokenizer():
    """A byte-level tokenizer: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


CHAT_TEMPLATE = (
    "{{ '<end>system\\nBe brief.\\n' }}"
    "{% for message in messages %}{{ '<end>' + message['role'] + '\\n' + message['content'] + '\\n' }}{% endfor %}"
)


def save_model(folder, layout="llama", chat=False):
    """A tiny model and its tokenizer as a local folder."""
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tiny_model(layout).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_deep_model(folder, d_in=8, n_layers=14):
    """A folder with a model that has a block 12, and a dataset, to go with published activation files."""
    torch.manual_seed(0)
    shape = {"hidden_size": d_in, "num_hidden_layers": n_layers}
    LlamaForCausalLM(LlamaConfig(**LLAMA | shape, initializer_range=0.3)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_dataset(folder, test=60)
    return str(folder)


def save_dataset(folder, train=40, test=10):
    """`train.jsonl` and `test.jsonl` in GSM8K's form; all questions differ."""
    folder.mkdir(exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        lines = [
            {"question": f"{split} {i}: {'x' * (i % 7)}?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def publish(folder, files):
    """Tensors as the published activation files of a folder."""
    for name, tensor in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensor, folder / name)
    return str(folder)


@contextlib.contextmanager
def replacing(module, change, before=False):
    """Inside this block, `change` maps the rows that a module returns or, `before`, those that it is called with."""

    def hook(module, args, kwargs, output=None):
        rows = output if output is not None else args or (kwargs["hidden_states"],)
        several = not isinstance(rows, torch.Tensor)
        rows = [change(rows[0]), *rows[1:]] if several else change(rows)
        if output is not None:
            return type(output)(rows) if several else rows
        return (tuple(rows), kwargs) if args else ((), kwargs | {"hidden_states": rows[0]})

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(hook, with_kwargs=True)
    yield
    handle.remove()


def finished(config):
    """A run that is trained and evaluated."""
    run = Run(config)
    run.train()
    run.evaluate()
    run.close()
    return run
