"""Systems of the literature as sets of policies: `policies = "NAME"`.

What a system does besides (kernels, quantization that it could do without) is not in its name: give `dtypes`, the
workload, and the share of experts on the device.
"""

from __future__ import annotations

from collections.abc import Mapping

SYSTEMS: Mapping[str, Mapping[str, str]] = {
    # On demand, with the guesses of the next layer's gate: arXiv 2312.17238.
    "mixtral_offloading": {"cache": "lru", "predictor": "next_layer_gate", "prefetch": "speculative"},
    # DAC 2025, arXiv 2504.05897.
    "hybrimoe": {"cache": "mrs", "predictor": "next_layer_gate", "prefetch": "impact", "executor": "hybrimoe"},
    # arXiv 2401.14361.
    "moe_infinity": {"cache": "activation_aware", "predictor": "eam_match", "prefetch": "by_activity"},
    # EuroSys 2026, arXiv 2502.05370.
    "finemoe": {"cache": "probability_frequency", "predictor": "map_search", "prefetch": "threshold"},
    # ISCA 2024, arXiv 2308.12066; and what it is compared with.
    "pre_gated_moe": {"cache": "lru_device", "predictor": "pre_gate", "prefetch": "next_layer"},
    "on_demand": {"cache": "lru"},
    "prefetch_all": {"cache": "ring", "prefetch": "whole_layer"},
    # DAC 2026, arXiv 2410.17954.
    "expertflow": {"cache": "plec", "predictor": "whole_path", "prefetch": "whole_path_ahead"},
    # arXiv 2502.12224.
    "fate": {"cache": "shallow_first", "predictor": "next_layer_gate", "prefetch": "widened"},
    # ICCAD 2024, arXiv 2408.10284.
    "adapmoe": {"cache": "slots_by_loads", "predictor": "next_layer_gate", "prefetch": "look_further"},
    # arXiv 2205.10034.
    "se_moe": {"cache": "ring", "prefetch": "whole_ring"},
    # arXiv 2303.06182: expert buffering.
    "expert_buffering": {"cache": "lifo_inactive_first"},
    # NeurIPS 2024, arXiv 2410.19123: the router runs before the model, so the future of what is queued is known.
    "read_me": {"cache": "oracle_belady", "predictor": "pre_gate", "prefetch": "next_layer"},
    # arXiv 2504.15299: nested planes of 2 to 4 bits. arXiv 2310.16795: experts of under one bit for each weight, which
    # fit or are copied on demand.
    "d2moe": {"cache": "ring", "executor": "bit_planes"},
    "qmoe": {"cache": "lru"},
    # ICLR 2025, arXiv 2402.07033.
    "fiddler": {"cache": "popular", "executor": "fiddler"},
    # SOSP 2025.
    "ktransformers": {"cache": "popular", "executor": "ktransformers"},
    "ktransformers_deferred": {"cache": "popular", "executor": "ktransformers_deferred"},
    # DAC 2024, arXiv 2405.18832: on a node with a near-data unit beside the experts' memory.
    "monde": {"cache": "lru", "executor": "hot_cold"},
    # MICRO 2024, arXiv 2409.01141: on a device whose own memory has a near-data unit; all experts are there.
    "duplex": {"executor": "op_per_byte"},
    "duplex_pe": {"executor": "look_up"},
    "bank_pim": {"executor": "near_only"},
    "bankgroup_pim": {"executor": "op_per_byte"},
    # ASPLOS 2024: attention alone.
    "attacc": {"executor": "near_attention"},
    # Weights that stream through the GPU for batches that the policy chooses: ICML 2023, arXiv 2303.06865; SC 2022;
    # ASPLOS 2025, arXiv 2411.11217; arXiv 2504.09345; arXiv 2503.09716, all attention on the GPU, or shared out.
    "flexgen": {"batching": "flexgen"},
    "zero_inference": {"batching": "model_level"},
    "vllm_offload": {"batching": "continuous"},
    "moe_lightning": {"batching": "moe_lightning"},
    "moe_lens": {"batching": "overlapped"},
    "moe_gen_gpu": {"batching": "module_level_gpu"},
    "moe_gen": {"batching": "module_level"},
    # Experts of the last layers on the CPU (--n-cpu-moe), or these layers whole (--n-gpu-layers).
    "llama_cpp_experts": {"cache": "whole_layers", "executor": "cpu_only"},
    "llama_cpp_layers": {"cache": "whole_layers", "executor": "cpu_layers"},
}
"""Name -> kind of policy -> its name; kinds that are not named keep their defaults."""

EXPERT_DTYPES: Mapping[str, str] = {"d2moe": "int4", "qmoe": "ternary_words"}
"""Formats of the experts that a system cannot do without, where a scenario says nothing else."""
