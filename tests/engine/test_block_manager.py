from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from taco.engine.block_manager import BlockManager, BlockPool
from tests.engine.test_scheduler import make_request


def make_manager(num_blocks=10, num_host_blocks=8, block_size=4):
    return BlockManager(num_blocks=num_blocks, num_host_blocks=num_host_blocks, block_size=block_size)


def compute(manager, request, num_tokens):
    """What the scheduler does when a request computes its tokens up to `num_tokens`."""
    assert manager.allocate(request, num_tokens) is not None
    request.num_computed_tokens = num_tokens
    manager.commit(request)


def admit(manager, request):
    manager.begin_step()
    match = manager.match_prefix(request)
    copies = manager.admit(request, match)
    compute(manager, request, request.num_tokens)
    return match, copies


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_unused_blocks_are_spared_once_enough_cached_ones_are_idle():
    manager = BlockManager(num_blocks=50, num_host_blocks=0, block_size=4, max_idle_cached=3)
    used = set()
    for i in range(20):
        request = make_request(str(i), [i] * 4, 1)
        manager.begin_step()
        compute(manager, request, 4)
        used |= set(request.block_ids)
        manager.free(request)
    assert len(used) == 4
    assert manager.pool.num_free == 49
    assert len(manager.pool.allocate(49)) == 49


def test_freeing_twice_is_an_error():
    pool = BlockPool(5)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError):
        pool.free(blocks)


def test_blank_blocks_go_first_then_the_least_recently_used_cached_ones():
    manager = make_manager(num_blocks=6)
    old, new = make_request("old", range(4), 1), make_request("new", range(10, 18), 1)
    for request in (old, new):
        admit(manager, request)
        manager.free(request)
    assert manager.pool.num_free == 5
    manager.pool.allocate(2)  # the two blank ones
    assert len(manager.match_prefix(make_request("x", [*range(4), 9], 1)).blocks) == 1
    manager.pool.allocate(1)
    assert manager.match_prefix(make_request("x", [*range(4), 9], 1)).blocks == []
    manager.pool.allocate(1)  # of the newer request the end goes before the beginning
    assert len(manager.match_prefix(make_request("x", range(10, 20), 1)).blocks) == 1


def test_a_block_found_again_is_used_last():
    manager = make_manager(num_blocks=4)
    for name, prompt in (("a", range(4)), ("b", range(4, 8)), ("c", range(8, 12))):
        request = make_request(name, prompt, 1)
        admit(manager, request)
        manager.free(request)
    again = make_request("a2", [0, 1, 2, 3], 1)
    again.prompt_token_ids = again.token_ids = [0, 1, 2, 3, 9]
    assert manager.match_prefix(again).blocks
    manager.pool.share(manager.match_prefix(again).blocks[0])
    manager.pool.free(manager.match_prefix(again).blocks)
    manager.pool.allocate(2)
    assert manager.match_prefix(again).blocks, "the block used last was evicted first"


def test_equal_blocks_are_entered_once_and_found_while_one_is_left():
    manager = make_manager()
    first, second = make_request("a", range(5), 4), make_request("b", range(5), 4)
    for request in (first, second):  # computed side by side, without looking for a prefix
        manager.begin_step()
        compute(manager, request, 5)
    assert first.block_ids[0] != second.block_ids[0]
    manager.free(second)
    match = manager.match_prefix(make_request("c", range(6), 1))
    assert match.blocks == first.block_ids[:1]


def test_shared_blocks_are_not_swapped_but_found_again():
    manager = make_manager()
    first, second = make_request("a", range(9), 4), make_request("b", [*range(8), 99], 4)
    admit(manager, first)
    admit(manager, second)
    assert manager.pool.num_refs(first.block_ids[0]) == 2
    pairs = manager.swap_out(second)
    assert len(pairs) == 1
    manager.begin_step()
    back = manager.swap_in(second)
    assert len(back) == 1 and second.block_ids[:2] == first.block_ids[:2]
    assert second.num_computed_tokens == 9
    manager.check_integrity([first, second])


def test_a_swapped_request_computes_anew_from_a_shared_block_that_was_evicted():
    manager = make_manager(num_blocks=8)
    first, second = make_request("a", range(12), 4), make_request("b", [*range(8), 99, 98, 97, 96], 4)
    admit(manager, first)
    admit(manager, second)
    manager.swap_out(second)
    manager.free(first)
    taken = manager.pool.allocate(manager.pool.num_free)  # evicts everything
    manager.pool.free(taken)
    manager.begin_step()
    assert manager.swap_in(second) == []
    assert second.num_computed_tokens == 0 and second.block_ids == []
    assert manager.host.num_free == 8
    manager.check_integrity([second])


def test_a_swapped_request_does_not_share_the_block_it_goes_on_writing():
    manager = make_manager()
    one, other = (make_request(name, range(8), 8) for name in "ab")
    compute(manager, one, 7)
    manager.swap_out(one)
    admit(manager, other)
    manager.begin_step()
    manager.swap_in(one)
    assert one.block_ids[0] == other.block_ids[0] and one.block_ids[1] != other.block_ids[1]
    assert one.num_computed_tokens == 7


def test_swapping_out_is_all_or_nothing():
    manager = make_manager(num_host_blocks=2)
    request = make_request("a", range(12), 4)
    admit(manager, request)
    assert manager.swap_out(request) is None
    assert len(request.block_ids) == 3 and manager.host.num_free == 2


def test_allocation_is_all_or_nothing():
    manager = make_manager(num_blocks=4)
    request = make_request("a", range(30), 4)
    assert manager.allocate(request, 30) is None
    assert request.block_ids == [] and manager.pool.num_free == 3


def test_hashes_depend_on_everything_before():
    manager = make_manager()
    first = make_request("a", [1, 2, 3, 4, 5, 6, 7, 8], 1)
    admit(manager, first)
    assert manager.match_prefix(make_request("b", [0, 2, 3, 4, 5, 6, 7, 8, 9], 1)).blocks == []
    assert len(manager.match_prefix(make_request("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], 1)).blocks) == 2


def test_check_integrity_notices_a_lost_block():
    manager = make_manager()
    request = make_request("a", range(8), 1)
    admit(manager, request)
    request.block_ids.pop()
    with pytest.raises(AssertionError):
        manager.check_integrity([request])


class Blocks(RuleBasedStateMachine):
    """Random work on one small manager; its invariants must hold after every action."""

    def __init__(self):
        super().__init__()
        self.manager = make_manager(num_blocks=9, num_host_blocks=3, block_size=2)
        self.active, self.swapped, self.count = [], [], 0

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def enter(self, prompt):
        request = make_request(str(self.count), prompt, 5)
        self.manager.begin_step()
        match = self.manager.match_prefix(request)
        assert len(match.blocks) * 2 + match.num_tail_tokens < len(prompt)
        if self.manager.num_blocks_for(len(prompt)) - len(match.blocks) > self.manager.num_free_after(match):
            return
        self.count += 1
        self.manager.admit(request, match)
        compute(self.manager, request, len(prompt))
        self.active.append(request)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        request = data.draw(st.sampled_from(self.active))
        request.token_ids.append(token)
        if self.manager.allocate(request, request.num_tokens) is None:
            request.token_ids.pop()
            return
        compute(self.manager, request, request.num_tokens)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), discard=st.booleans())
    def leave(self, data, discard):
        request = data.draw(st.sampled_from(self.active))
        self.active.remove(request)
        self.manager.free(request, discard=discard)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def swap_out(self, data):
        request = data.draw(st.sampled_from(self.active))
        if self.manager.swap_out(request) is not None:
            self.active.remove(request)
            self.swapped.append(request)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data):
        request = data.draw(st.sampled_from(self.swapped))
        self.manager.begin_step()
        if self.manager.num_blocks_for(request.num_computed_tokens) <= self.manager.pool.num_free:
            self.manager.swap_in(request)
            self.swapped.remove(request)
            compute(self.manager, request, request.num_computed_tokens)
            self.active.append(request)

    @rule()
    def reset_index(self):
        self.manager.pool.reset_index()

    @invariant()
    def pools_and_tables_agree(self):
        self.manager.check_integrity([*self.active, *self.swapped])


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
