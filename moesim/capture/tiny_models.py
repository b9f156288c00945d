"""Tiny models of any MoE family, built offline from its config class: the proof that a family can be captured.

A config is shrunk by the names of its fields, which families share far more than their values. The few families
whose fields must fit together in a way that names do not tell have an entry in `_FITTED`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name

from moesim.capture.adapters import adapter_of
from moesim.capture.loading import LANGUAGE, model_class

VOCABULARY = 128
_LAYERS = 4
_SMALL = {
    re.compile(pattern): value
    for pattern, value in {
        r"\w*vocab_size\w*": VOCABULARY,
        r"(text_|out_|decoder_)?(hidden_size|d_model|n_embd|embed_dim)": 64,
        r"\w*intermediate_size\w*|\w*ffn_(dim|hidden_size)|d_ff|ple_embed_dim|share_expert_dim": 32,
        r"num_hidden_layers|num_layers|n_layers|num_decoder_layers|(en|de)coder_layers|depth": _LAYERS,
        r"indexer_kv_heads": 1,
        r"\w*(attention|num|n|kv|value|key)_heads": 4,
        r"(?!qk_head)\w*head_dim|kv_channels|d_kv": 16,
        r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts": 8,
        r"num_experts_per_tok(en)?|moe_top_k|top_k_experts|moe_topk|moe_k": 2,
        r"n_group|(mamba_)?n_groups|layer_group_size|attn_layer_period": 2,
        r"zero_expert_num": 2,
        r"num_sparse_(en|de)coder_layers": _LAYERS,
        r"topk_group|attn_layer_offset|n_shared_experts|first_k_dense_replace|num_dense_layers": 1,
        r"\w*lora_rank|hc_lowrank|router_hidden_size": 16,
        r"max_position_embeddings|n_positions|max_seq_len": 512,
        r"num_nextn_predict_layers|num_mtp_layers": 0,
        r"sliding_window|index_topk|indexer_budget": 64,
        r"image_size": 32,
        r"patch_size": 16,
        r"ngram_vocab_size_base": VOCABULARY,
        r"split_ngram_parts|indexer_compress_ratio": 4,
        r"(image|video|audio)_token_(id|index)": VOCABULARY - 1,
        r"(pad|bos|eos|decoder_start)_token_id": 1,
    }.items()
}
_HYBRID = ["linear_attention", "full_attention"] * 2
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_FITTED: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": _SPARSE},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _SPARSE}},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 32],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        }
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
            }
        }
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "mlp_layer_types": _SPARSE}},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hy_v4_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "inkling2_loop": {
        "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2, "n_layers_per_attn_res_block": 1,
    },
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "moe"]},
    "nllb_moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "decoder_start_token_id": 2},
    "step3p7": {"text_config": {"mlp_layer_types": _SPARSE}},
    "switch_transformers": {"decoder_start_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_model(family: str) -> Any:
    """A model of the family `family`, a folder of transformers' models, in evaluation mode, seeded.

    Its routers are decided (scores far apart), so that rounding flips no choice.

    Raises:
        ValueError: transformers has no model of text for the family.
        Exception: whatever the family raises for a config that does not fit it.
    """
    config_class = _text_config(family)
    config = config_class(**_merge(_shrunk(config_class), _FITTED.get(family, {})))
    torch.manual_seed(0)
    model: Any = model_class(config_class).from_config(config)
    for module in model.modules():
        if adapter_of(module) is not None:
            _decide(module)
    return model.eval()


def _text_config(family: str) -> Any:
    """The family's config with the least beside text: of a language model, before one that also sees."""
    types = [name for name in CONFIG_MAPPING if model_type_to_module_name(name) == family]
    classes = sorted((CONFIG_MAPPING[name] for name in types), key=lambda c: ("text" not in c.model_type, c.model_type))
    for auto in LANGUAGE:
        for config_class in classes:
            if config_class in auto._model_mapping:
                return config_class
    for config_class in sorted(classes, key=lambda c: c.model_type):
        if model_class(config_class):
            return config_class
    raise ValueError(f"transformers knows no config of {family}")


def _shrunk(config_class: Any) -> dict[str, Any]:
    """Small values for the fields of a config that have one, and of the configs inside."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        small = next((value for name, value in _SMALL.items() if name.fullmatch(field.name)), None)
        number = isinstance(field.default, int) or (field.default is None and re.search(r"\bint\b", str(field.type)))
        if small is not None and number:
            values[field.name] = small
    for name, spec in config_class.sub_configs_defaults.items():
        if spec.config_class is AutoConfig:
            values[name] = {"model_type": spec.model_type} | _shrunk(CONFIG_MAPPING[spec.model_type])
        else:
            values[name] = _shrunk(spec.config_class)
    return values


def _merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with the values of `other` over it, also inside."""
    merged = dict(one)
    for key, value in other.items():
        inside = merged.get(key)
        merged[key] = _merge(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return merged


@torch.no_grad()
def _decide(router: nn.Module) -> None:
    """Weights that spread the scores; tables from token to experts with distinct experts."""
    for value in [*router.parameters(), *router.buffers()]:
        if value.is_floating_point() and value.ndim == 2:
            nn.init.normal_(value, std=0.5)
        elif not value.is_floating_point() and value.ndim == 2:
            value.copy_(torch.rand(value.shape[0], 8).argsort(dim=1)[:, : value.shape[1]])
