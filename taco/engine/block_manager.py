"""Paged KV memory, host side: which block belongs to whom. Integers only; the tensors live in the worker.

Three classes, bottom up: `BlockPool` knows blocks (reference counts, eviction order, prefix index), `HostPool` counts
swap space, `BlockManager` gives requests what they need. Paged blocks follow Kwon et al. 2023, "Efficient Memory
Management for Large Language Model Serving with PagedAttention"; full blocks are found again by a chain hash over
their tokens and everything that comes before them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from taco.request import Request

NULL_BLOCK = 0  # pads block tables; never allocated, its tensors stay zero


class BlockPool:
    """Blocks of the device: reference counts, free blocks in eviction order, and the prefix index.

    A block is *free* when nobody refers to it. A free block may still be *cached*: its content can be found through
    the prefix index until the block is handed out again. Blank blocks are handed out first, then cached ones, least
    recently used first. Blocks that were never used come last of the blank ones, and after cached ones too where more
    than `max_idle_cached` of those are idle: on a CPU their memory is not taken before it is first written.
    """

    def __init__(self, num_blocks: int, max_idle_cached: int | None = None) -> None:
        assert num_blocks >= 2, "block 0 is reserved, so a pool has at least two"
        self.num_blocks = num_blocks
        self._max_idle_cached = num_blocks if max_idle_cached is None else max_idle_cached
        self._num_refs = [0] * num_blocks
        self._blank: list[int] = []
        self._first_unused = NULL_BLOCK + 1
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        # Partly filled blocks, by the hash of what precedes them: (block, its first tokens).
        self._tails: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        self._tail_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached) + self.num_blocks - self._first_unused

    def num_refs(self, block: int) -> int:
        return self._num_refs[block]

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` free blocks, each with one reference; the caller has checked `num_free`."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            elif self._first_unused < self.num_blocks and len(self._cached) <= self._max_idle_cached:
                block = self._first_unused
                self._first_unused += 1
            else:
                block, _ = self._cached.popitem(last=False)
                self.forget(block)
            self._num_refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """Adds a reference; a cached free block comes back to life."""
        if self._num_refs[block] == 0:
            del self._cached[block]
        self._num_refs[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drops one reference of each block. Of the blocks that become free the first is evicted last."""
        for block in reversed(list(blocks)):
            assert self._num_refs[block] > 0, f"block {block} is free already"
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                if block in self._hash_of or block in self._tail_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds the content with this chain hash."""
        return self._by_hash.get(block_hash)

    def find_tail(self, parent_hash: bytes) -> tuple[int, tuple[int, ...]] | None:
        """A partly filled block that follows `parent_hash`, and the tokens known to be at its front."""
        return self._tails.get(parent_hash)

    def enter(self, block: int, block_hash: bytes) -> None:
        """Makes a full block findable, unless an equal one is already."""
        if block_hash not in self._by_hash and block not in self._hash_of:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash

    def enter_tail(self, block: int, parent_hash: bytes, tokens: tuple[int, ...]) -> None:
        """Makes the front of a partly filled block findable; the longest one for a parent wins."""
        known = self._tails.get(parent_hash)
        if block in self._tail_of or (known is not None and len(known[1]) >= len(tokens)):
            return
        if known is not None:
            self._drop_tail(known[0])
        self._tails[parent_hash] = (block, tokens)
        self._tail_of[block] = parent_hash

    def _drop_tail(self, block: int) -> None:
        parent_hash = self._tail_of.pop(block, None)
        if parent_hash is not None:
            del self._tails[parent_hash]
            if self._num_refs[block] == 0 and block in self._cached and block not in self._hash_of:
                del self._cached[block]
                self._blank.append(block)

    def forget(self, block: int) -> None:
        """Removes a block from the prefix index (its content is about to change, or cannot be trusted)."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
        self._drop_tail(block)

    def reset_index(self) -> None:
        """Forgets every cached content; references are untouched."""
        self._by_hash.clear()
        self._hash_of.clear()
        self._tails.clear()
        self._tail_of.clear()
        self._blank.extend(self._cached)
        self._cached.clear()

    def check_integrity(self, references: Iterable[int]) -> None:
        """Asserts every invariant, given all references that are held outside, one entry each."""
        counted = [0] * self.num_blocks
        for block in references:
            counted[block] += 1
        assert counted == self._num_refs, "reference counts differ from the references held"
        free = [*self._blank, *self._cached, *range(self._first_unused, self.num_blocks)]
        assert len(free) == len(set(free)), "a block is free twice"
        assert NULL_BLOCK not in free
        assert set(free) == {b for b in range(1, self.num_blocks) if counted[b] == 0}, "free lists and counts differ"
        assert {block: h for h, block in self._by_hash.items()} == self._hash_of
        assert {block: parent for parent, (block, _) in self._tails.items()} == self._tail_of
        indexed = set(self._hash_of) | set(self._tail_of)
        assert set(self._cached) <= indexed, "a cached block cannot be found"
        assert not indexed & set(self._blank), "a blank block can be found"


class HostPool:
    """Blocks of swap space in host memory."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        return self._free.pop()

    def free(self, blocks: Iterable[int]) -> None:
        self._free.extend(blocks)

    def check_integrity(self, references: Iterable[int]) -> None:
        held = list(references)
        assert sorted([*held, *self._free]) == list(range(self.num_blocks)), "host blocks lost or held twice"


@dataclass(slots=True)
class PrefixMatch:
    """What of a request's tokens is in the cache already.

    Args:
        blocks: full blocks that can be shared.
        tail: a block whose first `num_tail_tokens` slots hold the tokens that follow; it must be copied, because its
            owner goes on differently.
    """

    blocks: list[int]
    tail: int | None = None
    num_tail_tokens: int = 0


NO_MATCH = PrefixMatch([])


class BlockManager:
    """Gives requests the blocks they need, finds shared prefixes, and plans copies and swaps.

    A block is entered in the prefix index when the step that fills it is planned: a request admitted later in the same
    step may share it, because every layer writes all keys of a step before it reads any. A copy, though, happens before
    the step computes, so its source must be older.

    Args:
        num_blocks: device blocks, the reserved block 0 included.
        num_host_blocks: blocks of swap space.
        block_size: tokens a block.
        enable_prefix_caching: look for and offer shared prefixes.
        max_idle_cached: see `BlockPool`.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        max_idle_cached: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks, max_idle_cached)
        self.host = HostPool(num_host_blocks)
        self._fresh: set[int] = set()  # entered by the step being planned
        self._copy_sources: list[int] = []  # referenced until the next step is planned

    @property
    def num_usable_blocks(self) -> int:
        return self.pool.num_blocks - 1

    def begin_step(self) -> None:
        """Called before a step is planned."""
        self._fresh.clear()
        self.pool.free(self._copy_sources)
        self._copy_sources = []

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # Prefix cache

    def match_prefix(self, request: Request) -> PrefixMatch:
        """The longest cached prefix of a request that waits without blocks, up to the first token whose logits are
        needed: the last one, or an earlier one."""
        limit = num_readable_tokens(request) if self.enable_prefix_caching else 0
        if limit == 0:
            return NO_MATCH
        hashes = self._block_hashes(request)
        blocks = []
        for block_hash in hashes[: self.num_blocks_for(limit)]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        size = self.block_size
        if len(blocks) * size > limit:
            # The last block is copied, less the tokens to compute.
            tail = blocks.pop()
            count = limit - len(blocks) * size
        else:
            start = len(blocks) * size
            found = self.pool.find_tail(hashes[len(blocks) - 1] if blocks else self._root_hash(request))
            if found is None:
                return PrefixMatch(blocks)
            tail, tokens = found
            count = 0
            longest = min(len(tokens), limit - start)
            while count < longest and tokens[count] == request.token_ids[start + count]:
                count += 1
        if count == 0 or tail in self._fresh:
            return PrefixMatch(blocks)
        return PrefixMatch(blocks, tail, count)

    def commit(self, request: Request) -> None:
        """Enters the blocks of a request that are full of known tokens, and the tail of a prompt, in the index."""
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        num_known = min(request.num_computed_tokens, request.num_tokens)
        num_full = num_known // size
        if num_full > request.num_committed_blocks:
            hashes = self._block_hashes(request)
            for index in range(request.num_committed_blocks, num_full):
                self.pool.enter(request.block_ids[index], hashes[index])
                self._fresh.add(request.block_ids[index])
            request.num_committed_blocks = num_full
        if num_known == request.num_prompt_tokens and num_known % size:
            hashes = self._block_hashes(request)
            parent = hashes[num_full - 1] if num_full else self._root_hash(request)
            block = request.block_ids[num_full]
            self.pool.enter_tail(block, parent, tuple(request.token_ids[num_full * size : num_known]))
            self._fresh.add(block)

    def _root_hash(self, request: Request) -> bytes:
        """Stands before the first block; whatever else the KV cache depends on (salt, later LoRA and media) goes in."""
        return b"" if request.cache_salt is None else hashlib.blake2b(request.cache_salt.encode()).digest()

    def _block_hashes(self, request: Request) -> list[bytes]:
        """Chain hashes of all full blocks of known tokens, computed once each."""
        hashes = request.block_hashes
        size = self.block_size
        num_full = request.num_tokens // size
        if len(hashes) < num_full:
            tokens = request.token_ids
            parent = hashes[-1] if hashes else self._root_hash(request)
            for index in range(len(hashes), num_full):
                content = array("i", tokens[index * size : (index + 1) * size]).tobytes()
                parent = hashlib.blake2b(parent + content, digest_size=16).digest()
                hashes.append(parent)
        return hashes

    # Allocation

    def num_free_after(self, match: PrefixMatch) -> int:
        """Free blocks that remain once the matched blocks are referenced."""
        revived = sum(self.pool.num_refs(block) == 0 for block in match.blocks)
        if match.tail is not None:
            revived += self.pool.num_refs(match.tail) == 0
        return self.pool.num_free - revived

    def admit(self, request: Request, match: PrefixMatch) -> list[tuple[int, int]]:
        """Gives a request without blocks its cached prefix; returns the copies (source, target) the worker must make.

        The caller has checked that a block for the copy is free.
        """
        assert not request.block_ids
        for block in match.blocks:
            self.pool.share(block)
        request.block_ids = list(match.blocks)
        request.num_computed_tokens = len(match.blocks) * self.block_size + match.num_tail_tokens
        request.num_committed_blocks = len(match.blocks)
        if match.tail is None:
            return []
        self.pool.share(match.tail)  # must not be handed out while the copy is planned
        self._copy_sources.append(match.tail)
        (target,) = self.pool.allocate(1)
        request.block_ids.append(target)
        return [(match.tail, target)]

    def fork(self, source: Request, request: Request) -> list[tuple[int, int]] | None:
        """Gives a request without blocks those of `source`, whose tokens it has: full ones are shared, one that is
        partly filled is copied.

        Returns:
            The copies (source, target) the worker must make before anything else; None, and nothing happens, if no
            block is free.
        """
        assert not request.block_ids
        blocks = source.block_ids.copy()
        copies = []
        if source.num_computed_tokens % self.block_size:
            if not self.pool.num_free:
                return None
            (target,) = self.pool.allocate(1)
            copies.append((blocks.pop(), target))
        for block in blocks:
            self.pool.share(block)
        request.block_ids = blocks + [target for _, target in copies]
        request.num_computed_tokens = source.num_computed_tokens
        request.num_committed_blocks = source.num_committed_blocks
        return copies

    def allocate(self, request: Request, num_tokens: int) -> list[int] | None:
        """Appends the blocks that `request` needs to hold `num_tokens` tokens; None if they are not free."""
        missing = -(-num_tokens // self.block_size) - len(request.block_ids)
        if missing <= 0:
            return _NOTHING
        if missing > self.pool.num_free:
            return None
        blocks = self.pool.allocate(missing)
        request.block_ids.extend(blocks)
        return blocks

    def free(self, request: Request, *, discard: bool = False) -> None:
        """Takes back everything a request holds; this is where blocks are freed.

        Args:
            discard: the content cannot be trusted and must not be found again.
        """
        if discard:
            for block in request.block_ids:
                self.pool.forget(block)
        self.pool.free(block for block in request.block_ids if block != NULL_BLOCK)
        self.host.free(request.host_block_ids.values())
        request.block_ids = []
        request.host_block_ids = {}
        request.num_committed_blocks = 0
        request.num_computed_tokens = 0

    # Swapping

    def swap_out(self, request: Request) -> list[tuple[int, int]] | None:
        """Moves a running request's blocks to host memory; returns (device, host) pairs, or None if they do not fit.

        Blocks with other owners are only released: they are likely still there, and findable, when the request comes
        back.
        """
        private = [i for i, block in enumerate(request.block_ids) if self.pool.num_refs(block) == 1]
        if len(private) > self.host.num_free:
            return None
        request.host_block_ids = {i: self.host.allocate() for i in private}
        pairs = [(request.block_ids[i], host) for i, host in request.host_block_ids.items()]
        self.pool.free(request.block_ids)
        request.block_ids = []
        return pairs

    def swap_in(self, request: Request) -> list[tuple[int, int]]:
        """Brings a swapped request back; returns (host, device) pairs. The caller has checked the free blocks.

        A block is taken from the prefix index if it is found there, else from host memory. From the first block that is
        in neither (it was shared, and has been evicted) the request computes anew: `num_computed_tokens` is lowered.
        """
        pairs: list[tuple[int, int]] = []
        num_blocks = self.num_blocks_for(request.num_computed_tokens)
        # A block that still has to be written must be the request's own, although one with all its known tokens may be
        # there.
        num_full = request.num_computed_tokens // self.block_size
        hashes = self._block_hashes(request)[:num_full] if self.enable_prefix_caching else []
        for index in range(num_blocks):
            found = self.pool.find(hashes[index]) if index < len(hashes) else None
            if found is not None:
                self.pool.share(found)
                request.block_ids.append(found)
            elif index in request.host_block_ids:
                (target,) = self.pool.allocate(1)
                request.block_ids.append(target)
                pairs.append((request.host_block_ids[index], target))
            else:
                request.num_computed_tokens = index * self.block_size
                break
        # The host blocks may be handed out again at once: the worker reads them before a later step writes them.
        self.host.free(request.host_block_ids.values())
        request.host_block_ids = {}
        request.num_committed_blocks = 0  # the copies are not in the index yet
        return pairs

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Asserts that pools and the tables of all unfinished requests agree."""
        requests = list(requests)
        held = [block for request in requests for block in request.block_ids]
        self.pool.check_integrity([*held, *self._copy_sources])
        self.host.check_integrity([host for request in requests for host in request.host_block_ids.values()])


_NOTHING: list[int] = []


class UnlimitedBlockManager(BlockManager):
    """For models that keep nothing between steps: everything is granted, and nothing is held."""

    def __init__(self) -> None:
        super().__init__(num_blocks=2, num_host_blocks=0, block_size=1, enable_prefix_caching=False)

    def num_blocks_for(self, num_tokens: int) -> int:
        return 0

    def allocate(self, request: Request, num_tokens: int) -> list[int] | None:
        return _NOTHING


def num_readable_tokens(request: Request) -> int:
    """How many leading tokens may come from the prefix cache, which keeps no logits.

    Needed are the logits of the last token, and those of the prompt positions whose log-probabilities are asked for and
    have not been handed on yet. None may come from it if the caller says so.
    """
    params = request.params
    if params.skip_reading_prefix_cache:
        return 0
    if params.first_scored_position is not None:
        needed = max(params.first_scored_position, request.num_prompt_logprobs - 1)
        if needed < request.num_prompt_tokens - 1:
            return needed
    return request.num_tokens - 1
