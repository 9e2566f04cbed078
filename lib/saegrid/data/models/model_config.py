"""A model's config and tokenizer from its folder, through transformers; code in the folder is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saegrid.data.models.embedded import quiet_transformers
from saegrid.errors import ConfigError, first_line

OWN_CODE = "it needs Python code of its own (auto_map), and saegrid runs no code from a model's folder"


def model_config(model: str, folder: Path) -> Any:
    """The transformers config of a causal language model's folder, with its width and depth.

    Raises:
        ConfigError: it is not a model, of another kind, unknown to transformers, or needs its own code.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = f"model = {model!r}"
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, own_code = content["model_type"], "auto_map" in content
        if not isinstance(kind, str):
            raise TypeError
    except OSError:
        raise ConfigError(f"{where}: no config.json in this folder, so it is not a model") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{where}: its config.json is not a language model's (no model_type)") from None
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"{where}: {OWN_CODE if own_code else f'transformers knows no model_type = {kind!r}'}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or content.get("is_encoder_decoder"):
        raise ConfigError(f"{where}: transformers has no decoder-only language model of model_type = {kind!r}")
    try:
        with quiet_transformers():
            loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            text = loaded.get_text_config()
            if not (text.hidden_size > 0 and text.num_hidden_layers > 0):
                raise ValueError(f"hidden_size = {text.hidden_size}, num_hidden_layers = {text.num_hidden_layers}")
    except Exception as error:  # a file's values can make transformers raise anything
        raise ConfigError(f"{where}: its config.json is not a language model's ({first_line(error)})") from None
    return loaded


def load_tokenizer(model: str, folder: Path) -> Any:
    """The tokenizer of a model's folder. Raises `ConfigError`."""
    from transformers import AutoTokenizer

    where = f"model = {model!r}: its tokenizer can't be loaded"
    settings = folder / "tokenizer_config.json"
    # tokenizer.json is the whole tokenizer, whatever code is next to it
    if settings.is_file() and not (folder / "tokenizer.json").is_file() and b'"auto_map"' in settings.read_bytes():
        raise ConfigError(f"{where}: {OWN_CODE}")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file's values can make transformers raise anything
        raise ConfigError(f"{where}: {error}") from None
