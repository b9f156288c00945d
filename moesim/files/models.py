"""Models by name or from a Hugging Face `config.json`: one path from keys to a `ModelSpec`.

A preset is a TOML file in `moesim.models` whose `[config]` table holds the same keys as the maker's
`config.json`, so presets and a user's files are read by the same code. Only the text part of a model that
also sees or hears is counted. Nothing here needs torch or transformers.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from moesim.files.families import FAMILIES, HEADS, HIDDEN, Family
from moesim.files.keys import Keys, nearest
from moesim.files.layers import read_layers, read_longcat_layers, read_switch_layers
from moesim.files.quantization import read_dtypes
from moesim.files.tables import read_toml
from moesim.model import Layer, ModelSpec

READERS: Mapping[str, Callable[[Keys, Family], tuple[Layer, ...]]] = {
    "longcat_flash": read_longcat_layers,
    "switch_transformers": read_switch_layers,
}
"""Families that stack their layers in a way of their own; the others go through `read_layers`."""

IDLE_KEYS = (
    "_name_or_path",
    "attention_bias",
    "gated_dense",
    "intermediate_size",
    "mlp_bias",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "qk_norm",
)
"""Keys of a generic model that may stand idle: no dense layer, no attention, widths listed one by one."""

MULTIPLIERS = {"T": 1e12, "B": 1e9, "M": 1e6}


def preset_names() -> tuple[str, ...]:
    """Names of the models that come with the package, in alphabetical order."""
    names = (entry.name for entry in files("moesim.models").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def preset_facts(name: str) -> dict[str, dict[str, object]]:
    """The file of one preset as it stands: tables `config`, `published` and `sources`.

    Raises:
        ValueError: there is no such preset; the message has the nearest names and the list.
    """
    known = preset_names()
    if name not in known:
        raise ValueError(f"unknown model {name!r}; {nearest(name.rsplit('/', 1)[-1], known)}")
    return tomllib.loads(files("moesim.models").joinpath(f"{name}.toml").read_text("utf-8"))


def load_model(name_or_path: str | Path) -> ModelSpec:
    """A preset by its name, or the model that a file or model directory describes.

    A path may lead to a model directory, to a `config.json`, or to a TOML file made like the presets.

    >>> load_model("mixtral-8x7b").experts.num_experts
    8

    Raises:
        ValueError: neither a preset nor a path, or the file has mistakes (all of them are listed).
    """
    name = str(name_or_path)
    if name in preset_names():
        return _from_facts(preset_facts(name), name, f"preset {name}")
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return _from_facts(read_toml(path), path.stem, str(path))
    if path.exists():
        return read_config(path)
    if isinstance(name_or_path, Path) or path.suffix in (".json", ".toml") or name.startswith((".", "/", "~")):
        raise ValueError(f"no such file or directory: {path}; give a config.json, its directory, or a model name")
    known = preset_names()
    hint = nearest(name.rsplit("/", 1)[-1], known)
    raise ValueError(f"unknown model {name!r}, and no such path; {hint}; or give the path of a config.json")


def read_config(path: str | Path) -> ModelSpec:
    """The model that a Hugging Face `config.json` describes.

    path: the file, or the model directory it lies in. `quantization_config` and `torch_dtype` set the storage
    formats; keys that say nothing about shapes are passed over.

    Raises:
        ValueError: the file is missing, is no JSON object, or has mistakes; all of them are listed, each with
            its key, the rule, what was given and what would do.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise ValueError(f"{path} has no config.json; give a model directory that has one, or the file")
        raise ValueError(f"no such file or directory: {path}; give a config.json or the directory it lies in")
    try:
        text = file.read_text("utf-8")
        if not text.strip():
            raise ValueError(f"{file} is empty; it must hold the JSON object of a model's configuration")
        values = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be a model's configuration") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{file} is not valid JSON ({error.msg}, {where}); is it cut short?") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object (keys and values), not a {type(values).__name__}")
    given = values.get("_name_or_path")
    name = given.rstrip("/").rsplit("/", 1)[-1] if isinstance(given, str) else ""
    folder = file.resolve().parent.name
    return build_model(values, str(file), (name or folder).lower())


def build_model(values: Mapping[str, object], where: str, name: str) -> ModelSpec:
    """A model from the keys of a configuration.

    where: what to call the configuration in messages.

    Raises:
        ValueError: all mistakes of the configuration.
    """
    inner = values.get("text_config")
    if isinstance(inner, dict):  # a model that also sees: its language part
        outer = {k: v for k, v in values.items() if k in ("quantization_config", "torch_dtype", "dtype")}
        values = {"model_type": values.get("model_type"), **outer, **inner}
    keys = Keys(values)
    model_type = keys.text("model_type")
    if model_type not in FAMILIES:
        what = f"{model_type!r} is not a family" if model_type else "is missing; give a family"
        keys.blame("model_type", f"{what} that can be read; {nearest(model_type, FAMILIES)}")
        raise _rejection(where, keys)
    family = FAMILIES[model_type]
    layers = READERS.get(model_type, read_layers)(keys, family)
    hidden, vocab = keys.count(HIDDEN), keys.count("vocab_size")
    num_mtp = _read_num_mtp(keys) if family.mtp else 0
    spec = ModelSpec(
        name=name,
        hidden_size=hidden,
        vocab_size=vocab,
        layers=layers,
        tie_embeddings=keys.flag("tie_word_embeddings", family.tied),
        dtypes=read_dtypes(keys, len(layers)),
        extra_params=_extra_params(keys, family, model_type),
        max_position=keys.count_or_none("max_position_embeddings"),
        mtp_layers=layers[-1:] * num_mtp,
        source=where,
    )
    if model_type == "generic":
        keys.reject_unused(IDLE_KEYS)
    if keys.mistakes:
        raise _rejection(where, keys)
    return spec


def _read_num_mtp(keys: Keys) -> int:
    """How many multi-token prediction modules follow the main model."""
    return keys.count(("num_nextn_predict_layers", "num_mtp_layers"), 0, minimum=0, maximum=100)


def _extra_params(keys: Keys, family: Family, model_type: str) -> int:
    """Final norms, a bias on the output head, and T5's tables of relative positions."""
    hidden = keys.count(HIDDEN)
    extra = family.norm_size * hidden
    if model_type == "switch_transformers":
        extra += hidden + 2 * keys.count("relative_attention_num_buckets", 32) * keys.count(HEADS)
    return extra + keys.count("vocab_size") * keys.flag("lm_head_bias", False)


def _rejection(where: str, keys: Keys) -> ValueError:
    number = len(keys.mistakes)
    count = "1 mistake" if number == 1 else f"{number} mistakes"
    return ValueError("\n  ".join([f"{where} has {count}:", *keys.mistakes]))


def _from_facts(facts: Mapping[str, object], name: str, where: str) -> ModelSpec:
    """A model from the tables of a preset file."""
    config, published, sources = (facts.get(key, {}) for key in ("config", "published", "sources"))
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{where} has no [config] table; it must hold the keys of a config.json")
    spec = build_model(config, where, name)
    if isinstance(sources, dict):
        urls = [str(entry["url"]) for entry in sources.values() if isinstance(entry, dict) and "url" in entry]
        spec = replace(spec, source="; ".join(dict.fromkeys(urls)) or where)
    if isinstance(published, dict):
        total, active = published.get("total_params"), published.get("active_params")
        spec = replace(
            spec,
            published_params=None if total is None else parse_count(str(total), where),
            published_active_params=None if active is None else parse_count(str(active), where),
        )
    return spec


def parse_count(words: str, where: str) -> float:
    """A number of parameters as makers print it.

    >>> parse_count("46.7B", "mixtral-8x7b")
    46700000000.0

    Raises:
        ValueError: not a number with T, B or M behind it.
    """
    unit = MULTIPLIERS.get(words[-1:])
    try:
        value = float(words[:-1])
    except ValueError:
        unit = None
    if unit is None:
        raise ValueError(f"{where}: a published count must look like 46.7B, 1.2T or 220M, not {words!r}")
    return float(round(value * unit))
