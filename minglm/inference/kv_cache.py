"""Count the blocks of a paged key/value cache and share equal prefixes, in plain Python (no section in the paper).

The cache is cut into blocks of `block_size` positions, and a sequence holds a table of blocks, so memory
follows what is written and not what might be. Blocks are reference-counted: sequences with a common prefix
hold the same blocks.

    hash_to_block[(id of the text before the block, tokens of the block)] = block, id of the text with it

A full block is found by its tokens and by the text before it. Ids name texts and are never reused, so a block
that was reused for other tokens cannot be found under its old key. (The key is exact; only Python's dict
hashes it.) Blocks that no table holds keep their content until they are needed, the least recently used
first: the next turn of a conversation finds its prefix there. A block that several tables hold is copied
before one of them writes to it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

ROOT_PREFIX = 0  # the id of the empty text
BLOCK_SIZE = 16  # positions of a block, unless asked for otherwise

BlockKey = tuple[int, tuple[int, ...]]
"""(id of the text before the block, tokens of the block)."""


class NoFreeBlocks(Exception):
    """All blocks are in use; a sequence has to return some."""


class BlockCopy(NamedTuple):
    """A block to copy before the next forward pass."""

    source: int
    target: int


class CachedBlock(NamedTuple):
    """A full block in the prefix cache."""

    block: int
    prefix: int
    """The id of the text that ends with this block."""


class BlockTable:
    """The blocks of one sequence, in order.

    `length` positions of them are written, or will be by the next pass.
    """

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.length = 0
        self.num_hashed_blocks = 0  # how many of the first blocks are in the prefix cache
        self.prefix = ROOT_PREFIX  # the id of the text in those blocks


class BlockManager:
    """Counts the tables that hold each block. max_blocks: how many may exist; None: as many as are asked for."""

    def __init__(self, block_size: int = BLOCK_SIZE, max_blocks: int | None = None) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.ref_count: list[int] = []  # for each block, how many tables hold it
        self.free_blocks: list[int] = []  # without content
        self.evictable: dict[int, None] = {}  # cached, held by no table; least recently used first
        self.hash_to_block: dict[BlockKey, CachedBlock] = {}
        self.block_to_hash: dict[int, BlockKey] = {}
        self._prefix_ids = itertools.count(ROOT_PREFIX + 1)

    @property
    def num_blocks(self) -> int:
        """Return how many blocks exist."""
        return len(self.ref_count)

    @property
    def num_used_blocks(self) -> int:
        """Return how many blocks some table holds."""
        return self.num_blocks - len(self.free_blocks) - len(self.evictable)

    @property
    def max_tokens(self) -> int | None:
        """Return how many positions the blocks can hold, None without a bound."""
        return None if self.max_blocks is None else self.max_blocks * self.block_size

    def match_prefix(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Add the cached blocks that continue a table along `tokens`, its sequence, if it ends at a block boundary.

        The block of the last token is never taken, so that at least one token is left to compute.
        """
        size = self.block_size
        if table.length % size or table.num_hashed_blocks * size != table.length:
            return
        while table.length + size < len(tokens):
            key = (table.prefix, tuple(tokens[table.length : table.length + size]))
            cached = self.hash_to_block.get(key)
            if cached is None:
                return
            self.ref_count[cached.block] += 1
            self.evictable.pop(cached.block, None)
            table.blocks.append(cached.block)
            table.prefix = cached.prefix
            table.num_hashed_blocks += 1
            table.length += size

    def extend(self, table: BlockTable, length: int) -> BlockCopy | None:
        """Make room in a table to write positions up to `length`.

        Returns the copy that has to be made first, or None. Raises NoFreeBlocks, and leaves the table as it was.
        """
        first = table.length // self.block_size  # the block that the next position is in
        capacity = len(table.blocks) * self.block_size
        if length <= capacity:
            last_written = table.blocks[min(first, len(table.blocks) - 1)]
            # The usual case: room in a block that no one else holds.
            if self.ref_count[last_written] == 1:
                table.length = max(length, table.length)
                return None

        shared = (
            length > table.length
            and first < len(table.blocks)
            and self.ref_count[table.blocks[first]] > 1
        )
        missing = max(0, length - capacity)
        needed = -(-missing // self.block_size)  # rounded up
        if shared:
            needed += 1  # the copy to write to
        allocated: list[int] = []
        try:
            for _ in range(needed):
                allocated.append(self._allocate())
        except NoFreeBlocks:
            for block in allocated:
                self._release(block)
            raise

        copy = None
        if shared:
            copy = BlockCopy(table.blocks[first], allocated.pop(0))
            table.blocks[first] = copy.target
            self._release(copy.source)
        table.blocks += allocated
        table.length = max(length, table.length)
        return copy

    def truncate(self, table: BlockTable, length: int) -> None:
        """Drop the positions of a table from `length` on, and return the blocks that are no longer needed."""
        while (len(table.blocks) - 1) * self.block_size >= length:
            self._release(table.blocks.pop())
        table.length = length

    def cache_full_blocks(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Add a table's full blocks to the prefix cache, as far as they hold `tokens`."""
        size = self.block_size
        end = (table.num_hashed_blocks + 1) * size
        while end <= min(table.length, len(tokens)):
            key = (table.prefix, tuple(tokens[end - size : end]))
            if key not in self.hash_to_block:
                # Two sequences may have computed the same block: only the first is cached.
                block = table.blocks[table.num_hashed_blocks]
                self.hash_to_block[key] = CachedBlock(block, next(self._prefix_ids))
                self.block_to_hash[block] = key
            table.prefix = self.hash_to_block[key].prefix
            table.num_hashed_blocks += 1
            end += size

    def fork(self, table: BlockTable) -> BlockTable:
        """Return a second table that shares all blocks with the first."""
        twin = BlockTable()
        twin.blocks = list(table.blocks)
        twin.length = table.length
        twin.prefix = table.prefix
        twin.num_hashed_blocks = table.num_hashed_blocks
        for block in twin.blocks:
            self.ref_count[block] += 1
        return twin

    def free(self, table: BlockTable) -> None:
        """Return all blocks of a table, the last first, so that prefixes stay cached longest."""
        self.truncate(table, 0)
        table.prefix = ROOT_PREFIX
        table.num_hashed_blocks = 0

    def forget(self, table: BlockTable) -> None:
        """Take the blocks of a table out of the prefix cache: their numbers are not those of their tokens."""
        for block in table.blocks:
            key = self.block_to_hash.pop(block, None)
            if key is not None:
                del self.hash_to_block[key]

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache after a weight update. No table may hold a block."""
        assert not self.num_used_blocks, "a table would put blocks of the old weights in the cache"
        self.free_blocks += self.evictable
        self.evictable = {}
        self.hash_to_block = {}
        self.block_to_hash = {}

    def _allocate(self) -> int:
        """Take a block: a free one, or else the least recently used cached one, or else a new one."""
        if self.free_blocks:
            block = self.free_blocks.pop()
        elif self.evictable:
            block = next(iter(self.evictable))
            del self.evictable[block]
            del self.hash_to_block[self.block_to_hash.pop(block)]
        elif self.max_blocks is None or self.num_blocks < self.max_blocks:
            block = self.num_blocks
            self.ref_count.append(0)
        else:
            raise NoFreeBlocks
        self.ref_count[block] = 1
        return block

    def _release(self, block: int) -> None:
        self.ref_count[block] -= 1
        if self.ref_count[block]:
            return
        if block in self.block_to_hash:
            self.evictable[block] = None  # its content may be used again
        else:
            self.free_blocks.append(block)
