"""The order in which known prompts run: those that share a prefix stand together.

A shared prefix is then computed once and used while it is in the cache, however the prompts are scattered in the input
and however small the cache is.
"""

from __future__ import annotations

from collections.abc import Sequence


def prefix_order(prompts: Sequence[Sequence[int]], block_size: int) -> list[int]:
    """Indexes of prompts, those with common first blocks next to each other, otherwise in the given order.

    Groups that share one block are divided into those that share two, four, eight, ... So the work grows with the
    tokens that are shared, and prompts that share nothing are looked at once.

    Args:
        prompts: token ids of each prompt.
        block_size: tokens of a KV block, the unit in which prefixes are cached.
    """
    order: list[int] = []
    # Groups to be divided, the next one last: indexes, and how many tokens their prompts are known to share.
    stack: list[tuple[list[int], int]] = [(list(range(len(prompts))), 0)]
    while stack:
        indexes, shared = stack.pop()
        if len(indexes) == 1:
            order += indexes
            continue
        wanted = max(2 * shared, block_size)
        groups: dict[object, list[int]] = {}
        for index in indexes:
            part = tuple(prompts[index][shared:wanted])
            # A prompt that ends here shares no more whole blocks worth looking for; it stays alone.
            key = part if len(part) == wanted - shared else index
            groups.setdefault(key, []).append(index)
        stack += ((group, wanted) for group in reversed(groups.values()))
    return order
