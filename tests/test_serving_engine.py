"""The compiled serving engine against schedules worked out by hand, and its laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_cases import MS, Played, check_end, check_laws, prices_of, requests_of, rules_of
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import small_service

from moesim.files.acceptance import constant_rate
from moesim.service import EngineConfig
from moesim.serving.advance import prefix_tokens, tokens_at
from moesim.serving.state import FINISHED, PREFILLED


def play(*rows, rules=None, priority=None, blocks=None, block_tokens=0, **more):
    requests = requests_of(*rows, priority=priority, blocks=blocks, block_tokens=block_tokens)
    played = Played(requests, rules, check=check_laws, **more)
    if rules is None or not rules.is_prefill_only:
        check_end(played)
    return played


def test_one_request():
    played = play((5, 100, 3))
    assert played.scheduled_ms == [5] and played.first_ms == [115] and played.finish_ms == [115 + 2 * 11]
    assert played.book.worst_gap_s_Q[0] == pytest.approx(11 * MS) and played.book.itl_counts.sum() == 2
    assert played.timeline.sums_WX[:, 3].sum() == 3


def test_who_comes_during_an_iteration_waits_for_its_end():
    played = play((0, 100, 3), (50, 50, 2))
    assert played.tokens == [100, 1 + 50, 2]
    assert played.scheduled_ms == [0, 110] and played.first_ms == [110, 171] and played.finish_ms == [183, 183]
    waited = played.timeline.sums_WX[:, 1].sum()
    assert waited == pytest.approx(60 * MS)
    running = played.timeline.sums_WX[:, 0].sum()
    assert running == pytest.approx((183 + 73) * MS)


def test_a_budget_cuts_prompts():
    played = play((0, 100, 2), (0, 30, 2), rules=rules_of(max_num_batched_tokens=64))
    assert played.tokens == [64, 36 + 28, 1 + 2, 1]
    assert played.first_ms == [148, 161] and played.finish_ms == [161, 172]


def test_no_more_run_than_there_are_places():
    played = play((0, 10, 2), (0, 10, 2), rules=rules_of(max_num_seqs=1))
    assert played.tokens == [10, 1, 10, 1] and played.scheduled_ms == [0, 31]


def test_long_prompts_go_in_parts():
    played = play((0, 100, 1), (0, 20, 1), rules=rules_of(most_of_prompt=30))
    assert played.tokens == [30 + 20, 30, 30, 10] and played.first_ms == [160, 60]


def test_whole_prompts_wait_for_budget():
    rules = rules_of(max_num_batched_tokens=64, is_chunked=False)
    played = play((0, 40, 2), (0, 40, 2), rules=rules)
    assert played.tokens == [40, 1 + 40, 1] and played.first_ms == [50, 101]


def test_the_last_come_is_sent_back_and_computed_anew_before_those_who_wait():
    rules = rules_of(num_blocks=4)
    played = play((0, 6, 5), (0, 6, 4), (1, 6, 1), rules=rules)
    # Both fill their two blocks with the third token; the fourth of the first needs one more.
    assert played.tokens == [12, 2, 2, 1, 1, 9, 6]
    assert played.finish_ms == [68, 87, 103] and played.book.preempted_Q.tolist() == [0, 1, 0]
    assert played.scheduled_ms == [0, 0, 87]


def test_a_swapped_request_waits_for_its_copies():
    rules = rules_of(num_blocks=4, is_swapping=True, host_blocks=8, block_copy_s=2 * MS)
    played = play((0, 6, 5), (0, 6, 4), rules=rules)
    assert played.tokens == [12, 2, 2, 1, 1, 1]
    assert played.finish_ms == [46 + 4 + 11 + 11, 72 + 4 + 11] and played.book.preempted_Q.tolist() == [0, 1]
    # Without enough room in host memory it is computed anew.
    assert play((0, 6, 5), (0, 6, 4), rules=rules._replace(host_blocks=1)).tokens == [12, 2, 2, 1, 1, 9]


def test_swapped_requests_push_prefixes_out_of_host_memory():
    rules = rules_of(
        num_blocks=4, is_swapping=True, host_blocks=2, block_copy_s=2 * MS, has_prefixes=True, unit_tokens=4,
        unit_blocks=1,
    )  # fmt: skip
    blocks = [[0], [1], [2], [3]]
    played = play((0, 4, 1), (0, 4, 1), (50, 6, 5), (50, 6, 4), rules=rules, blocks=blocks, block_tokens=4)
    assert played.book.preempted_Q.tolist() == [0, 0, 0, 1]
    assert played.tokens == [8, 12, 2, 2, 1, 1, 1]


def test_the_urgent_go_first():
    played = play((0, 10, 1), (1, 10, 1), (2, 10, 1), (3, 10, 1), priority=[0, 1, 0, 1],
                  rules=rules_of(max_num_seqs=1, by_priority=True))  # fmt: skip
    assert played.scheduled_ms == [0, 40, 20, 60]


def test_the_least_urgent_loses_its_place_whenever_it_came():
    rules = rules_of(num_blocks=4, by_priority=True)
    # The one that came first needs a block, and is itself the least urgent.
    played = play((0, 6, 5), (1, 6, 5), priority=[1, 0], rules=rules)
    assert played.tokens == [6, 1 + 6, 2, 1, 1, 1, 9, 1] and played.book.preempted_Q.tolist() == [1, 0]
    # The other one needs it when the first is in the iteration already.
    played = play((0, 5, 5), (1, 7, 4), priority=[1, 0], rules=rules)
    assert played.tokens == [5, 1 + 7, 2, 1, 1, 8, 1] and played.book.preempted_Q.tolist() == [1, 0]
    assert played.finish_ms == [15 + 18 + 12 + 22 + 18 + 11, 15 + 18 + 12 + 22]


def test_sglang_computes_prompts_alone_and_first():
    played = play((0, 100, 3), (50, 50, 2), rules=rules_of(is_sglang=True))
    assert played.tokens == [100, 50, 2, 1]
    assert played.first_ms == [110, 170] and played.finish_ms == [193, 182]


def test_sglang_cuts_one_prompt_at_a_time():
    played = play((0, 100, 2), (0, 29, 2), rules=rules_of(is_sglang=True, max_num_batched_tokens=64))
    assert played.tokens == [64, 36 + 28, 1, 2]


@pytest.mark.parametrize(("ratio", "tokens"), [(0.7, [20] + 59 * [1] + [20] + 29 * [1]), (0.098, [20, 20])])
def test_sglang_keeps_room_for_what_answers_will_need(ratio, tokens):
    def believe(instance):
        instance.groups.ratio_D[:] = ratio

    rules = rules_of(is_sglang=True, block_size=1, num_blocks=100)
    played = play((0, 20, 60), (0, 20, 30), rules=rules, open_=believe)
    assert played.tokens[: len(tokens)] == tokens


def test_sglang_sends_back_who_has_generated_least():
    def believe(instance):
        instance.groups.ratio_D[:] = 0.098

    rules = rules_of(is_sglang=True, block_size=1, num_blocks=20)
    played = play((0, 4, 12), (0, 4, 8), (30, 12, 1), rules=rules, open_=believe)
    # Six tokens of both fill the cache. The second, as far as the first, goes behind the third.
    assert played.tokens == [4, 4, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 12, 11]
    assert played.book.preempted_Q.tolist() == [0, 1, 0]


def test_a_retraction_raises_what_sglang_believes():
    def believe(instance):
        instance.groups.ratio_D[:] = 0.098

    ratios = []
    rules = rules_of(is_sglang=True, block_size=1, num_blocks=20)
    requests = requests_of((0, 4, 12), (0, 4, 8))

    def note(played):
        check_laws(played)
        ratios.append(float(played.instance.groups.ratio_D[0]))

    played = Played(requests, rules, check=note, open_=believe)
    check_end(played)
    assert played.tokens == [4, 4, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 11]
    assert played.finish_ms == [155, 176]
    assert ratios[7] == pytest.approx(0.098) and ratios[8] == pytest.approx(1.0, abs=2e-3)  # (7 + 20) / 12, at most 1


def test_drafts_bring_as_many_tokens_as_they_are_said_to():
    drafts, length = 3, 2.4
    rules = rules_of(queries=1 + drafts, accept_K=np.full(drafts, constant_rate(length, drafts)), max_num_seqs=40,
                     num_blocks=4000)  # fmt: skip
    played = play(*((0, 8, 300) for _ in range(40)), rules=rules)
    gained = played.book.itl_counts.sum()
    assert 40 * 299 / gained == pytest.approx(length, rel=0.02)
    assert max(played.tokens) == max(8 * 40, 40 * (1 + drafts))


def test_a_draft_never_goes_beyond_the_answer():
    rules = rules_of(queries=4, accept_K=np.ones(3))
    played = play((0, 8, 6), rules=rules)
    assert played.tokens == [8, 4, 1] and played.finish_ms == [18 + 14 + 11]


PREFIXES = {"has_prefixes": True, "unit_tokens": 4, "unit_blocks": 1}


def test_a_prompt_known_already_computes_its_last_block_alone():
    rules = rules_of(**PREFIXES)
    played = play((0, 12, 1), (100, 12, 1), (200, 14, 1), rules=rules, blocks=[[0, 1, 2]] * 3, block_tokens=4)
    assert played.tokens == [12, 4, 2] and played.book.cached_Q.tolist() == [0, 8, 12]


def test_two_who_compute_the_same_block_share_it_afterwards():
    rules = rules_of(**PREFIXES)
    played = play((0, 12, 3), (0, 12, 3), rules=rules, blocks=[[0, 1, 2]] * 2, block_tokens=4)
    assert played.tokens == [24, 2, 2] and played.instance.groups.idle_D[0] == 3


def test_the_longest_unused_prefix_goes_first():
    rules = rules_of(num_blocks=6, **PREFIXES)
    blocks = [[0, 1], [2, 3], [0, 1], [4, 5], [0, 1], [2, 3]]
    rows = [(100 * i, 9, 1) for i in range(6)]
    played = play(*rows, rules=rules, blocks=blocks, block_tokens=4)
    # Three blocks each. The third uses 0 and 1 again; the fourth lacks one block, so that 3, the last of the longest
    # unused, goes.
    assert played.tokens == [9, 9, 1, 9, 1, 5]


def test_blocks_in_host_memory_come_back_for_their_copy():
    rules = rules_of(num_blocks=3, host_blocks=4, block_copy_s=2 * MS, **PREFIXES)
    rows, blocks = [(100 * i, 9, 1) for i in range(4)], [[0, 1], [2, 3], [0, 1], [0, 1]]
    played = play(*rows, rules=rules, blocks=blocks, block_tokens=4)
    assert played.tokens == [9, 9, 1, 1]
    assert played.first_ms == [19, 119, 200 + 11 + 2 * 2, 311]


def test_a_prefix_used_again_stays_longest_in_host_memory():
    rules = rules_of(num_blocks=3, host_blocks=4, block_copy_s=2 * MS, **PREFIXES)
    blocks = [[0, 1], [2, 3], [0, 1], [4, 5], [6, 7], [0, 1], [2, 3]]
    played = play(*((100 * i, 9, 1) for i in range(7)), rules=rules, blocks=blocks, block_tokens=4)
    # When 4 and 5 leave the device, host memory holds 2, 3 and 0, 1, of which 0 and 1 came last.
    assert played.tokens == [9, 9, 1, 9, 9, 1, 9]


def test_two_batches_are_in_the_pipeline():
    rules = rules_of(num_stages=2)
    played = play((0, 10, 2), (5, 10, 2), rules=rules, prices=prices_of(pp=2, host_ms=0))
    # First: stages until 10 and 20. Second: 20 and 30. Then one token of the first (21, 31) and of the second (31, 32).
    assert played.first_ms == [20, 30] and played.finish_ms == [31, 32]


def test_a_free_first_stage_takes_who_comes():
    rules = rules_of(num_stages=2)
    played = play((0, 10, 2), (15, 10, 2), rules=rules, prices=prices_of(pp=2, host_ms=0))
    assert played.scheduled_ms == [0, 15] and played.first_ms == [20, 35]


def test_prompts_alone_leave_with_their_cache():
    rules = rules_of(is_prefill_only=True, num_blocks=8)
    played = play((0, 16, 5), (0, 16, 1), (0, 20, 5), rules=rules)
    book, groups = played.book, played.instance.groups
    assert played.tokens == [32] and played.instance.left() == [0, 1]  # the third finds no room
    assert book.state_Q[:2].tolist() == [PREFILLED, FINISHED] and book.generated_Q.tolist() == [1, 1, 0]
    assert groups.free_D[0] == 4
    played.instance.forget(0, 0, 0.05)
    assert groups.free_D[0] == 8
    played.until(np.inf)
    assert book.state_Q[2] == PREFILLED and played.first_ms[2] == 50 + 30


def test_groups_keep_pace_and_an_idle_one_computes_a_dummy():
    rules = rules_of(max_num_batched_tokens=64)
    played = play((0, 50, 2), (0, 20, 1), rules=rules, prices=prices_of(2), dp=2)
    assert played.tokens == [70, 1] and played.first_ms == [60, 60] and played.finish_ms == [71, 60]
    slow = play((0, 50, 2), rules=rules, prices=prices_of(2, slowdown_R=[1.0, 30.0]), dp=2)
    assert slow.finish_ms == [60 + 10 + 30]


def test_a_run_that_is_cut_goes_on_as_if_it_had_not_been():
    rows = [(7 * i, 20 + 13 * (i % 5), 4 + i % 7) for i in range(20)]
    rules = rules_of(num_blocks=40, max_num_batched_tokens=48)
    once = play(*rows, rules=rules)  # an iteration for each call
    again = Played(requests_of(*rows), rules, most=10**9)
    for name in ("first_s_Q", "finish_s_Q", "preempted_Q"):
        np.testing.assert_array_equal(getattr(once.book, name), getattr(again.book, name))
    np.testing.assert_array_equal(once.timeline.sums_WX, again.timeline.sums_WX)


def test_what_a_router_sees():
    requests = requests_of((0, 100, 3), (50, 13, 2), blocks=[[0, 1, 2], [0, 1, 3]], block_tokens=4)
    rules = rules_of(max_num_batched_tokens=64, **PREFIXES)
    played = Played(requests, rules, stop_ms=60)
    waiting_D, held_D, work_D, found_D = np.full((4, 1), -1)
    tokens_at(played.instance.bundle, waiting_D, held_D, work_D)
    assert (waiting_D[0], held_D[0], work_D[0]) == (100 + 13, 64, 113 + 5)  # the first chunk is not over
    prefix_tokens(played.instance.bundle, 1, found_D)
    assert found_D[0] == 0 and played.instance.unfinished_D.tolist() == [2]
    played.until(80 * MS)  # the other 36, and 5 after what both have in common
    tokens_at(played.instance.bundle, waiting_D, held_D, work_D)
    prefix_tokens(played.instance.bundle, 1, found_D)
    assert (waiting_D[0], held_D[0], found_D[0]) == (36 + 5, 100 + 8, 8)


def test_a_rank_that_slows_down_does_so_from_the_next_iteration_on():
    played = Played(requests_of((0, 50, 2)), stop_ms=30)
    played.instance.slow_down(0, 3.0, None)
    played.until(np.inf)
    assert played.finish_ms == [60 + 10 + 3]


def test_what_an_instance_loses_is_computed_anew():
    played = Played(requests_of((0, 50, 2)), stop_ms=65)
    played.instance.lose(np.array([0]), 66 * MS)
    played.instance.send(0, 0, 70 * MS)
    played.until(np.inf)
    assert played.finish_ms == [70 + 10 + 51] and played.first_ms == [60]
    check_laws(played)
    check_end(played)


@st.composite
def services(draw):
    """Requests that fit, and an engine's numbers."""
    num, block_size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 4]))
    longest = draw(st.integers(2, 60))
    rows = [(draw(st.integers(0, 300)), draw(st.integers(1, longest)), draw(st.integers(1, 12))) for _ in range(num)]
    rows.sort()
    most = max(prompt + output for _, prompt, output in rows)
    least_blocks = -(-most // block_size)
    has_prefixes, unit_blocks = draw(st.booleans()), draw(st.sampled_from([1, 2]))
    unit_tokens = unit_blocks * block_size
    # A tree: each prompt leaves the common text after some blocks.
    blocks, number = [], 64
    for _, prompt, _ in rows:
        shared = min(draw(st.integers(0, 6)), prompt // unit_tokens)
        own = prompt // unit_tokens - shared
        blocks.append([*range(shared), *range(number, number + own)])
        number += own
    drafts = draw(st.sampled_from([0, 0, 2]))
    is_chunked, queries = draw(st.booleans()), 1 + drafts
    is_sglang = draw(st.booleans())
    max_num_seqs = draw(st.integers(1, 6))
    rules = rules_of(
        max_num_seqs=max_num_seqs, is_chunked=is_chunked, is_sglang=is_sglang,
        max_num_batched_tokens=draw(st.integers(queries, 40)) if is_chunked else most + draw(st.integers(0, 20)),
        most_of_prompt=draw(st.sampled_from([0, 5])) if is_chunked and not is_sglang else 0,
        by_priority=draw(st.booleans()), is_swapping=draw(st.booleans()), block_size=block_size,
        num_blocks=least_blocks + unit_blocks * draw(st.integers(0, 12)), has_prefixes=has_prefixes,
        unit_tokens=unit_tokens if has_prefixes else 0, unit_blocks=unit_blocks if has_prefixes else 0,
        host_blocks=draw(st.sampled_from([0, 3, 20])), block_copy_s=draw(st.sampled_from([0.0, MS])), queries=queries,
        accept_K=np.full(drafts, 0.6), num_stages=draw(st.sampled_from([1, 1, 2, 3])),
    )  # fmt: skip
    priority = [draw(st.integers(0, 2)) for _ in rows]
    dp = draw(st.sampled_from([1, 1, 2]))
    return requests_of(*rows, priority=priority, blocks=blocks, block_tokens=unit_tokens), rules, dp


@settings(max_examples=60, deadline=None)
@given(services())
def test_blocks_are_conserved_and_every_request_is_answered(service):
    requests, rules, dp = service

    def check(played):
        check_laws(played)
        tokens_D = played.instance.work.tokens_D
        most = rules.max_num_batched_tokens
        if rules.is_sglang:
            most = max(most, rules.max_num_seqs * rules.queries)
        assert (tokens_D <= most).all()

    played = Played(requests, rules, dp=dp, check=check)
    check_end(played)
    book = played.book
    assert played.timeline.sums_WX[:, 3].sum() == requests.output_Q.sum()
    more = requests.output_Q - 1  # tokens after the first; with drafts, several come out at once
    assert (-(-more // rules.queries)).sum() <= book.itl_counts.sum() <= more.sum()
    if rules.queries == 1:
        assert book.itl_counts.sum() == more.sum()
    assert (book.cached_Q < requests.prompt_Q).all()
    again = Played(requests, rules, dp=dp)
    for name in book._fields:
        assert getattr(book, name).tobytes() == getattr(again.book, name).tobytes(), name
    np.testing.assert_array_equal(played.timeline.sums_WX, again.timeline.sums_WX)


@pytest.mark.parametrize(
    ("engine", "block_tokens", "says"),
    [
        ({}, 24, "engine.block_size: must divide requests.block_tokens = 24, given 16; 8 would do"),
        ({"enable_prefix_caching": False}, 24, None),
        ({"block_size": 8}, 24, None),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, 0, "engine.max_num_batched_tokens: must"),
        ({"scheduler": "sglang", "long_prefill_token_threshold": 9}, 0, "engine.long_prefill_token_threshold: SGLang"),
    ],
)  # fmt: skip
def test_engines_that_would_never_answer_are_refused(engine, block_tokens, says):
    service = small_service()
    requests = replace(service.requests, block_tokens=block_tokens)
    config = EngineConfig(tensor_parallel_size=4, **engine)
    found = replace(service, requests=requests, engine=config).mistakes()
    assert not found if says is None else len(found) == 1 and found[0].startswith(says)
