"""Whose block is whose: the bookkeeping of a paged key/value cache, plain Python (no section in the paper).

The cache is cut into blocks of `size` positions, and a sequence holds a table of blocks, so memory follows what is
written and not what might be. Blocks are counted: sequences that begin alike hold the same blocks.

    known[(serial of the text before, tokens of the block)] = block, serial of the text with it

A full block is known by what stands in it and before it; serials name texts and are never used twice, so a block that
was taken for something else cannot be found under its old name. Blocks that nobody holds keep their content until they
are needed, the least recently used first: the next turn of a conversation finds its beginning there. A block that
several hold is copied before one of them writes to it.
"""

import itertools


class NoRoom(Exception):
    """All blocks are in use; somebody has to give some back."""


class Table:
    """The blocks of one sequence, in order; `length` positions of them are written or about to be."""

    def __init__(self):
        self.blocks, self.length = [], 0
        self.serial, self.named = (
            0,
            0,
        )  # of the longest beginning that is known, and how many blocks it has


class Blocks:
    """Counts who holds which block. `limit`: most blocks there may be (None: as many as are asked for)."""

    def __init__(self, size=16, limit=None):
        self.size, self.limit = size, limit
        self.holders = []  # how many tables hold each block
        self.free, self.kept = (
            [],
            {},
        )  # without content; with content that nobody holds, least recently used first
        self.known, self.names = {}, {}
        self.serials = itertools.count(1)

    @property
    def used(self):
        """How many blocks some table holds."""
        return len(self.holders) - len(self.free) - len(self.kept)

    def _take(self):
        if self.free:
            block = self.free.pop()
        elif self.kept:
            block = next(iter(self.kept))
            del self.kept[block], self.known[self.names.pop(block)]
        elif self.limit is None or len(self.holders) < self.limit:
            block = len(self.holders)
            self.holders.append(0)
        else:
            raise NoRoom
        self.holders[block] = 1
        return block

    def _give(self, block):
        self.holders[block] -= 1
        if not self.holders[block]:
            if block in self.names:
                self.kept[block] = None
            else:
                self.free.append(block)

    def match(self, table, tokens):
        """Let a table hold the known blocks that `tokens` (its sequence) goes on with, where it ends with a block.

        The block of the last token is never taken, so that something is left to compute.
        """
        size = self.size
        if table.length % size or table.named * size != table.length:
            return
        while table.length + size < len(tokens):
            found = self.known.get(
                (table.serial, tuple(tokens[table.length : table.length + size]))
            )
            if found is None:
                return
            block, table.serial = found
            self.holders[block] += 1
            self.kept.pop(block, None)
            table.blocks.append(block)
            table.named += 1
            table.length += size

    def extend(self, table, length):
        """Give a table room to write positions up to `length`.

        Returns the copy that has to be made first, (from, to), or None. Raises NoRoom; the table is then as before.
        """
        first, copy = table.length // self.size, None
        if (
            length <= len(table.blocks) * self.size
            and self.holders[table.blocks[min(first, len(table.blocks) - 1)]] == 1
        ):
            table.length = max(length, table.length)  # most often
            return None
        before = list(table.blocks)
        try:
            if (
                length > table.length
                and first < len(table.blocks)
                and self.holders[table.blocks[first]] > 1
            ):
                copy = (table.blocks[first], self._take())
            while len(table.blocks) * self.size < length:
                table.blocks.append(self._take())
        except NoRoom:
            for block in table.blocks[len(before) :] + ([copy[1]] if copy else []):
                self._give(block)
            table.blocks = before
            raise
        if copy:
            table.blocks[first] = copy[1]
            self._give(copy[0])
        table.length = max(length, table.length)
        return copy

    def shorten(self, table, length):
        """Take back the last positions of a table; blocks that are no longer needed are returned."""
        while (len(table.blocks) - 1) * self.size >= length:
            self._give(table.blocks.pop())
        table.length = length

    def publish(self, table, tokens):
        """Make the full blocks of a table known, as far as they hold `tokens`."""
        while (end := (table.named + 1) * self.size) <= min(table.length, len(tokens)):
            key, block = (
                (table.serial, tuple(tokens[end - self.size : end])),
                table.blocks[table.named],
            )
            if (
                key not in self.known
            ):  # two sequences may have computed the same block; one of them is known
                self.known[key] = block, next(self.serials)
                self.names[block] = key
            table.serial = self.known[key][1]
            table.named += 1

    def fork(self, table):
        """A second table with the same blocks."""
        twin = Table()
        twin.blocks, twin.length, twin.serial, twin.named = (
            list(table.blocks),
            table.length,
            table.serial,
            table.named,
        )
        for block in twin.blocks:
            self.holders[block] += 1
        return twin

    def close(self, table):
        """Return all blocks of a table, the last first, so that beginnings are kept longest."""
        self.shorten(table, 0)
        table.serial = table.named = 0

    def forget(self):
        """Make nothing known, because the weights have changed. No table may hold a block."""
        assert not self.used, "a table that goes on would publish what it holds"
        self.free += self.kept
        self.kept, self.known, self.names = {}, {}, {}
