"""Which class a model of text is built with, and loading one from a local folder."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

LANGUAGE: tuple[Any, ...] = (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
"""The kinds of models that write text, those that only read text first."""


def model_class(config_class: type) -> Any:
    """The auto class that builds a language model from such a config, one without a head where nothing else does.

    Raises:
        ValueError: transformers has no model of text for it.
    """
    for auto in (*LANGUAGE, AutoModel):
        if config_class in auto._model_mapping:
            return auto
    raise ValueError(f"transformers {transformers.__version__} has no model of text for {config_class.__name__}")


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer, from local files only.

    Raises:
        ValueError: the folder lacks config, weights or tokenizer, or transformers does not know the family.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; give a folder made by save_pretrained, with a tokenizer")
    problems = (OSError, ValueError, KeyError, ImportError, AttributeError)
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        auto = model_class(type(config))
    except problems as error:
        raise ValueError(f"{folder}: transformers cannot read the config: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except problems as error:
        raise ValueError(f"{folder}: no tokenizer that transformers can load: {error}; save one there") from error
    if not tokenizer.encode(
        "some text", add_special_tokens=False
    ):  # what some families give for a folder without tokenizer files
        raise ValueError(f"{folder}: no tokenizer that transformers can load: it knows no word; save one there")
    try:
        model = auto.from_pretrained(folder, local_files_only=True, dtype="auto")
    except problems as error:
        raise ValueError(f"{folder}: transformers cannot load the model: {error}") from error
    return model.to(device).eval(), tokenizer


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward names this parameter."""
    return name in inspect.signature(model.forward).parameters
