"""From `quantization_config` to the storage format of each part of a model.

A method says how it stores a weight; the list of modules that it leaves alone says which parts keep the base
format. A part counts as left alone where the list covers its modules in the middle layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moesim.files.keys import Keys, nearest
from moesim.model import BYTES_PER_PARAM, Dtypes

BASE_FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""`torch_dtype` (`dtype` since transformers 5) as the simulator calls it."""

INT4_GROUPS = {128: "int4", 64: "int4_g64", 32: "int4_g32", -1: "int4_channel"}
"""Weights that share one scale, -1 for a whole row."""

PART_MODULES: Mapping[str, Sequence[str]] = {
    "attention": ("self_attn.q_proj", "self_attn.o_proj", "self_attn.kv_b_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.down_proj", "feed_forward.experts.gate_up_proj"),
    "dense": ("mlp.gate_proj", "mlp.shared_experts.gate_proj", "feed_forward.shared_expert.gate_proj"),
}
"""What the modules of each part are called inside a layer."""


def _int_format(keys: Keys, bits_key: str = "bits", default_bits: int = 4, default_group: int = 128) -> str:
    bits = keys.count(bits_key, default_bits)
    if bits == 8:
        return "int8"
    keys.require(bits == 4, [bits_key], f"must be 4 or 8, not {bits}")
    group = keys.count("group_size", default_group, minimum=-1)
    rule = f"must be one of {', '.join(map(str, INT4_GROUPS))}, not {group}"
    keys.require(group in INT4_GROUPS, ["group_size"], rule)
    return INT4_GROUPS.get(group, "int4")


def _fp8(keys: Keys) -> str:
    block = keys.counts("weight_block_size", minimum=1)
    rule = f"must be [128, 128] or absent (one scale for a whole matrix), not {block}"
    keys.require(block in (None, [128, 128]), ["weight_block_size"], rule)
    return "fp8" if block is None else "fp8_block"


def _bitsandbytes(keys: Keys) -> str:
    return "int8" if keys.flag("load_in_8bit", False) else "int4_g64"


def _compressed_tensors(keys: Keys) -> str:
    groups = keys.values.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        keys.blame("config_groups", "must hold a group with `weights`, as compressed-tensors writes it")
        return "int8"
    inner = Keys(weights)
    if inner.text("type", "int") == "float":
        bits, size = inner.count("num_bits"), inner.count("group_size", 0, minimum=-1)
        inner.require(bits in (4, 8), ["num_bits"], f"must be 4 or 8 where the type is float, not {bits}")
        if bits == 4:
            rule = f"must be 16 (NVFP4) or 32 (MXFP4) where num_bits is 4, not {size}"
            inner.require(size in (16, 32), ["group_size"], rule)
            form = "nvfp4" if size == 16 else "mxfp4"
        else:
            form = "fp8_block" if inner.text("strategy") == "block" else "fp8"
    else:
        row = -1 if inner.text("strategy") == "channel" else 128
        form = _int_format(inner, "num_bits", default_group=row)
    keys.take(inner, "config_groups.weights")
    return form


METHODS: Mapping[str, Callable[[Keys], str]] = {
    "awq": _int_format,
    "bitnet": lambda keys: "ternary",
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": lambda keys: "fp8",
    "fp8": _fp8,
    "gptq": _int_format,
    "int8": lambda keys: "int8",
    "mxfp4": lambda keys: "mxfp4",
}
"""`quant_method` -> the format of the weights it covers."""


def read_dtypes(keys: Keys, num_layers: int) -> Dtypes:
    """The storage format of every part, from `torch_dtype`, `quantization_config` and `dtypes`.

    `dtypes` is this package's own key, for made-up models: an object from part (a field of `Dtypes`) to
    format (a key of `BYTES_PER_PARAM`); it has the last word. Mistakes go to `keys`.
    """
    base_name = keys.text(("dtype", "torch_dtype"), "bfloat16").removeprefix("torch.")
    base = BASE_FORMATS.get(base_name, "bf16")
    rule = f"has the unknown format {base_name!r}; {nearest(base_name, BASE_FORMATS)}"
    keys.require(base_name in BASE_FORMATS, [("dtype", "torch_dtype")], rule)
    dtypes = Dtypes(attention=base, experts=base, dense=base, embedding=base, kv=base, activation=base)
    if keys.has("quantization_config"):
        inner = keys.table("quantization_config")
        if inner.values:
            dtypes = _quantized(inner, dtypes, num_layers)
            keys.take(inner, "quantization_config")
    if keys.has("dtypes"):
        dtypes = _overridden(keys, dtypes)
    return dtypes


def _quantized(keys: Keys, dtypes: Dtypes, num_layers: int) -> Dtypes:
    method = keys.text("quant_method")
    if method not in METHODS:
        keys.blame("quant_method", f"has the unknown method {method!r}; {nearest(method, METHODS)}")
        return dtypes
    form = METHODS[method](keys)
    patterns: list[str] = []
    for name in ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore"):
        listed = keys.values.get(name)
        patterns += [str(entry) for entry in listed] if isinstance(listed, list) else []
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            keys.blame("ignore", f"has {pattern!r}, which is no regular expression ({error})")
            return dtypes
    parts = ("experts",) if method == "mxfp4" else tuple(PART_MODULES)
    dtypes = replace(dtypes, **{part: form for part in parts if not _left_alone(part, patterns, num_layers)})
    cache = keys.table("kv_cache_scheme")
    if cache.values:
        eight = cache.count("num_bits") == 8
        cache.require(eight, ["num_bits"], "must be 8")
        dtypes = replace(dtypes, kv="fp8" if cache.text("type", "float") == "float" else "int8")
        keys.take(cache, "kv_cache_scheme")
    return dtypes


def _left_alone(part: str, patterns: Sequence[str], num_layers: int) -> bool:
    """Whether a list of modules (names, globs, or `re:` expressions) covers a part in the middle layer."""
    modules = [f"model.layers.{num_layers // 2}.{name}" for name in PART_MODULES[part]]
    for pattern in patterns:
        if pattern.startswith("re:"):
            expression = re.compile(pattern[3:])
            if any(expression.match(module) for module in modules):
                return True
        else:
            glob = re.escape(pattern).replace(r"\*", ".*")
            if any(re.search(rf"(^|\.){glob}(\.|$)", module) for module in modules):
                return True
    return False


def _overridden(keys: Keys, dtypes: Dtypes) -> Dtypes:
    inner = keys.table("dtypes")
    chosen: dict[str, str] = {}
    for part in inner.values:
        form = inner.text(part)
        if part not in vars(dtypes):
            inner.blame(part, f"is not a part of a model; {nearest(part, vars(dtypes))}")
        elif form not in BYTES_PER_PARAM:
            inner.require(False, [part], f"has the unknown format {form!r}; {nearest(form, BYTES_PER_PARAM)}")
        else:
            chosen[part] = form
    keys.take(inner, "dtypes")
    return replace(dtypes, **chosen)
