"""The compiled counting against a plain twin."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.policies.placement import PLACEMENTS
from moesim.routing.counting import Counter
from moesim.routing.synthetic import zipf_trace


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(PLACEMENTS)),
    st.sampled_from([2, 4]),
    st.integers(1, 2),
    st.sampled_from([0, 4]),
    st.integers(0, 9),
)
def test_counts_equal_a_plain_twin(name, ep, num_groups, redundant, seed):
    num_experts, num_slots, num_ranks = 8, 8 + redundant, ep * num_groups
    trace = zipf_trace(3, num_experts, 2, num_requests=6, prompt_tokens=3, output_tokens=2, seed=seed)
    placement = PLACEMENTS[name]().place(3, num_experts, num_slots, ep)
    node_R = (np.arange(num_ranks) // 2).astype(np.int32)
    rng = np.random.default_rng(seed)
    rows_B = rng.integers(0, trace.num_tokens, 20)
    source_B = rng.integers(0, num_ranks, 20).astype(np.int32)
    counts = Counter(placement, num_experts, num_ranks, node_R).count(trace.expert_ids_TLK, rows_B, source_B)

    load, traffic = np.zeros_like(counts.load_LRS), np.zeros_like(counts.traffic_CLR)
    for b, (row, source) in enumerate(zip(rows_B, source_B, strict=True)):
        for layer in range(3):
            sent = set()
            for expert in trace.expert_ids_TLK[row, layer]:
                copies = np.flatnonzero(placement.slot_expert_LP[layer] == expert)
                slot = copies[b % len(copies)]
                rank = source // ep * ep + slot // (num_slots // ep)
                load[layer, rank, slot % (num_slots // ep)] += 1
                if rank != source and rank not in sent:
                    sent.add(rank)
                    far = int(node_R[rank] != node_R[source])
                    traffic[far, layer, source] += 1
                    traffic[2 + far, layer, rank] += 1
    np.testing.assert_array_equal(counts.load_LRS, load)
    np.testing.assert_array_equal(counts.traffic_CLR, traffic)


def test_a_placement_without_a_home_for_an_expert_is_refused():
    placement = PLACEMENTS["contiguous"]().place(1, 8, 8, 4)
    placement.slot_expert_LP[0, 3] = 0
    try:
        Counter(placement, 8, 4, np.zeros(4, np.int32))
    except ValueError as error:
        assert "expert 3 of MoE layer 0 has no slot" in str(error)
    else:
        raise AssertionError("accepted")
