"""The program idea, proved on three steps that have little in common, each played by both executors."""

import numpy as np
import simpy
from conftest import small_scenario

from moesim.program import Costs, Draft, account, walk
from moesim.program.iterations import Iterations
from moesim.simulate import Player


def play(program, costs):
    env = simpy.Environment()
    player = Player(env, program, costs)
    env.run(player.done)
    return player.played()


def assert_same(program, costs):
    walked, played = walk(program, costs), play(program, costs)
    np.testing.assert_array_equal(walked.start_NR, played.start_NR)
    np.testing.assert_array_equal(walked.finish_NR, played.finish_NR)
    exposed_XR, idle_R = account(walked)
    np.testing.assert_allclose(exposed_XR.sum(axis=0) + idle_R, walked.seconds, rtol=1e-12)
    return walked


def test_prefill_iteration_with_spread_experts():
    iteration = next(iter(Iterations(small_scenario(nodes=2, per_node=4))))
    assert iteration.phase == "prefill"
    walked = assert_same(iteration.program, iteration.costs)
    assert {"attention", "dispatch", "experts", "combine"} <= set(walked.parts)


def test_decode_iteration_with_spread_experts():
    *_, iteration = Iterations(small_scenario(nodes=2, per_node=4, shared=32))
    assert iteration.phase == "decode"
    walked = assert_same(iteration.program, iteration.costs)
    dispatch = [n for n, op in enumerate(walked.operations) if op.name == "dispatch"]
    # A collective starts on all ranks at once, when the last of them is ready.
    assert all(len(set(walked.start_NR[n])) == 1 for n in dispatch)


def test_one_microbatch_forward_and_backward_over_two_pipeline_stages():
    """Ranks 0, 1 hold the first half of the layers, 2, 3 the second; backward takes twice as long as forward."""
    stage = [np.array([0, 1, -1, -1]), np.array([-1, -1, 0, 1])]
    pairs = np.array([0, 1, 0, 1])
    draft = Draft(4, {"stage0": stage[0], "stage1": stage[1], "pairs": pairs})
    forward = [0, 0]
    forward[0] = draft.add("forward", 0, "compute 0", "stage0")
    sent = draft.add("activations", 0, "network", "pairs", (forward[0],))
    forward[1] = draft.add("forward", 1, "compute 1", "stage1", (sent,))
    backward1 = draft.add("backward", 1, "compute 1", "stage1", (forward[1],))
    returned = draft.add("gradients", 0, "network", "pairs", (backward1,))
    draft.add("backward", 0, "compute 0", "stage0", (returned,))
    draft.add("gradient all-reduce", 1, "network 1", "stage1", (backward1,))
    program = draft.program()
    seconds = np.array(
        [[3, 3, 0, 0], [1, 1, 1, 1], [0, 0, 3, 4], [0, 0, 6, 8], [1, 1, 1, 1], [6, 6, 0, 0], [0, 0, 2, 2]]
    )
    costs = Costs(seconds.astype(float), np.zeros((7, 4)), np.zeros((7, 4)))
    walked = assert_same(program, costs)
    assert walked.finish_NR[5].tolist() == [3 + 1 + 3 + 6 + 1 + 6, 3 + 1 + 4 + 8 + 1 + 6, 0, 0]
    assert walked.seconds == 23
    _, idle_R = account(walked)
    # On stage 1 the gradients leave under the all-reduce: 1 + 3 + 6 + 2 seconds busy on rank 2.
    assert idle_R.tolist() == [23 - 11, 23 - 11, 23 - 12, 23 - 15]


def test_a_shared_resource_queues_in_play_and_not_in_the_walk():
    """Two GPUs copy over one host link: the walk lets them overlap, the player makes the second wait."""
    draft = Draft(2, {})
    draft.add("copy", 0, "host link")
    program = draft.program({"host link": 1})
    costs = Costs(np.full((1, 2), 5.0), np.ones((1, 2)), np.zeros((1, 4)))
    assert walk(program, costs).finish_NR.tolist() == [[5.0, 5.0]]
    assert play(program, costs).finish_NR.tolist() == [[5.0, 10.0]]
    assert play(draft.program({"host link": 2}), costs).finish_NR.tolist() == [[5.0, 5.0]]
