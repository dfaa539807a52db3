"""Choose what the next forward pass computes: continuous batching in plain Python (no section in the paper).

Each pass takes the next token of every running sequence, and up to `prefill_tokens` tokens of prompts: half
of them for the oldest, if it needs so many, the others for the shortest first. So a short prompt does not
wait for all of a long one, and a long one does not wait for ever. Requests with the same prompt are computed
once. When blocks run out, the last prompt in this order or else the youngest sequence returns its blocks and
waits; its text so far is then its prompt, so it continues as if it had not been interrupted.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from minglm.inference.kv_cache import BlockCopy, BlockManager, BlockTable, NoFreeBlocks
from minglm.inference.logit_rules import LogitRules
from minglm.inference.request import Completion, Event, PromptLogprob, Request
from minglm.inference.thinking import ThoughtBudget


class Sequence:
    """A request that is being answered: its text so far, and the table of its keys and values once they are computed.

    number: as `Engine.submit` returned it. stop_ids: the tokens that end it. limit: the model's positions.
    rules: what changes its logits before sampling, None for most requests. thought: counts its reasoning,
    None without a budget.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        stop_ids: set[int],
        limit: int,
        on_event: Callable[[Event], None] | None = None,
        rules: LogitRules | None = None,
        thought: ThoughtBudget | None = None,
    ) -> None:
        self.number = number
        self.request = request
        self.stop_ids = stop_ids
        self.on_event = on_event
        self.rules = rules
        self.thought = thought
        self.ids = list(request.prompt)
        self.max_tokens = min(request.max_new_tokens, limit - len(request.prompt))
        self.completion = Completion([], [])
        self.table = BlockTable()
        self.drafter_length = 0  # how many tokens the drafter has read
        self.scores: list[
            PromptLogprob
        ] = []  # of the prompt from its second token on, as far as computed

    @property
    def tokens_left(self) -> int:
        """Return how many more tokens it may get."""
        return self.max_tokens - len(self.completion.tokens)

    @property
    def forced_token(self) -> int | None:
        """Return the token that has to come next; None where one is sampled.

        A grammar puts off the close of a thought: it wants the last character of a text complete.
        """
        token = None if self.thought is None else self.thought.forced
        if token is not None and self.rules is not None and not self.rules.allows(token):
            return None
        return token

    @property
    def wants_scores(self) -> bool:
        """Return whether the log-probabilities of its prompt are still to be computed."""
        wanted = self.request.prompt_logprobs is not None
        return wanted and len(self.scores) < len(self.request.prompt) - 1


@dataclass(slots=True)
class Row:
    """What one text contributes to a forward pass: its tokens from `start` to `end`, and the drafts after them."""

    ids: list[int]
    """The whole text."""
    table: BlockTable
    start: int
    end: int
    sequences: list[Sequence]
    """The sequences that sample a token after it; none while a prompt is not complete."""
    is_prompt: bool = True
    max_drafts: int = 0
    """How many drafts there is room for; 0 for prompts."""
    drafts: list[int] = field(default_factory=list)
    draft_row: int = 0
    """The row of the drafts' distributions that belongs to this text."""
    scored: Sequence | None = None
    """The sequence whose prompt gets log-probabilities from this row."""
    owners: list[Sequence] = field(default_factory=list)
    """All sequences that begin with this text."""

    @property
    def stop(self) -> int:
        """Return the end of the row, drafts included."""
        return self.end + len(self.drafts)


class Prefill:
    """A text that is not computed yet, and the sequences that begin with it.

    A sequence that was preempted leaves its last token out: the pass after this one takes it, as it takes the
    last token of any running sequence, with drafts.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.resumed = bool(sequence.completion.tokens)
        self.ids = sequence.ids[:-1] if self.resumed else list(sequence.ids)
        self.sequences = [sequence]
        self.table = BlockTable()
        # A scored prompt needs the logits after each of its tokens: nothing of it may come from the cache.
        self.scored = sequence if sequence.wants_scores and not self.resumed else None

    @property
    def tokens_left(self) -> int:
        """Return how many of its tokens are not computed."""
        return len(self.ids) - self.table.length

    @property
    def key(self) -> tuple[bool, int | None, tuple[int, ...]]:
        """Return what sequences that are computed together have in common."""
        scored = None if self.scored is None else self.scored.number
        return self.resumed, scored, tuple(self.ids)


class Schedule(NamedTuple):
    """The next forward pass."""

    rows: list[Row]
    """Running sequences before prompts."""
    copies: list[BlockCopy]
    """Blocks to copy before the pass."""


MAX_BATCH = 256
"""Sequences that run at once, unless asked for otherwise."""


class Scheduler:
    """The sequences that wait, those whose text is being computed (`prefills`), and those that are `running`."""

    def __init__(
        self, blocks: BlockManager, max_batch: int = MAX_BATCH, prefill_tokens: int = 2048
    ) -> None:
        self.blocks = blocks
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefills: list[Prefill] = []
        self.running: list[Sequence] = []
        self._copies: list[BlockCopy] = []  # of the pass that is being planned

    def add(self, sequence: Sequence) -> None:
        """Append a sequence to those that wait."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it is, and return its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        for prefill in list(self.prefills):
            if sequence in prefill.sequences:
                prefill.sequences.remove(sequence)
            if not prefill.sequences:
                self._stop(prefill)
        self.blocks.free(sequence.table)

    def restart(self) -> None:
        """Compute everything again, and forget all blocks: the weights have changed."""
        for prefill in list(self.prefills):
            self._stop(prefill)
        while self.running:
            self._preempt()
        self.blocks.reset_prefix_cache()

    def plan(self, drafts: int = 0) -> Schedule:
        """Return the next pass.

        drafts: how many positions to reserve after the last token of each running sequence, if it may still
        become that long.
        """
        self._copies = []
        self._reserve(drafts)
        rows = [self._decode(sequence, drafts) for sequence in self.running]
        if self.waiting:
            self._admit()
        # All prompts look up their prefix first, before any takes a block that another would find.
        for prefill in self.prefills:
            self._match_prefix(prefill)
        rows += self._prefill_rows()
        return Schedule(rows, self._copies)

    def _reserve(self, drafts: int) -> None:
        """Give every running sequence room for its last token and its drafts; preempt the youngest if there is none."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            length = len(sequence.ids)
            if drafts:
                length += _max_drafts(sequence, drafts)
            if self._extend(sequence.table, length):
                index += 1
            else:
                self._preempt()

    def _decode(self, sequence: Sequence, drafts: int) -> Row:
        """Return the row of a running sequence: its last token."""
        ids = sequence.ids
        table = sequence.table
        end = len(ids)
        if end >= (table.num_hashed_blocks + 1) * self.blocks.block_size:
            self.blocks.cache_full_blocks(table, ids)
        room = _max_drafts(sequence, drafts) if drafts else 0
        owners = [sequence]
        return Row(
            ids, table, end - 1, end, owners, is_prompt=False, max_drafts=room, owners=owners
        )

    def _admit(self) -> None:
        """Move waiting sequences to the prefills; those with the same text are computed together."""
        by_key = {prefill.key: prefill for prefill in self.prefills}
        prefilling = sum(len(prefill.sequences) for prefill in self.prefills)
        room = self.max_batch - len(self.running) - prefilling
        while self.waiting and room > 0:
            new = Prefill(self.waiting.popleft())
            room -= 1
            same = by_key.get(new.key)
            if same is None:
                by_key[new.key] = new
                self.prefills.append(new)
            else:
                same.sequences += new.sequences

    def _prefill_rows(self) -> list[Row]:
        """Return rows of the prefills, of `prefill_tokens` tokens together at most."""
        rows: list[Row] = []
        if not self.prefills:
            return rows
        # The list is in the order of the rows, because what is preempted is its last, which has no row yet.
        oldest = min(self.prefills, key=lambda prefill: prefill.sequences[0].number)
        self.prefills.sort(key=lambda prefill: (prefill is not oldest, prefill.tokens_left))
        wanted = sum(prefill.tokens_left for prefill in self.prefills[1:])
        tokens_left = self.prefill_tokens
        index = 0
        while index < len(self.prefills) and tokens_left > 0:
            prefill = self.prefills[index]
            most = tokens_left
            if prefill is oldest:
                most = max((tokens_left + 1) // 2, tokens_left - wanted)
            row = self._prefill(prefill, most)
            if row is None:
                break
            rows.append(row)
            tokens_left -= row.end - row.start
            if row.end < len(row.ids):
                index += 1  # a complete prefill has left the list instead
        return rows

    def _prefill(self, prefill: Prefill, max_tokens: int) -> Row | None:
        """Return the next row of a text, of at most `max_tokens`; None if there is no room for it yet."""
        # Blocks that earlier rows of this pass fill count as computed.
        self._match_prefix(prefill)
        start = prefill.table.length
        end = min(len(prefill.ids), start + max_tokens)
        while not self._extend(prefill.table, end):
            if self.prefills[-1] is prefill:
                only = not self.running and self.prefills[0] is prefill
                assert not only, "submit refuses what never fits"
                return None
            self._preempt()
        self.blocks.cache_full_blocks(prefill.table, prefill.ids)
        if end < len(prefill.ids):
            owners = list(prefill.sequences)
            return Row(
                prefill.ids, prefill.table, start, end, [], scored=prefill.scored, owners=owners
            )
        return self._run(prefill, start, end)

    def _run(self, prefill: Prefill, start: int, end: int) -> Row:
        """Return the last row of a text; its sequences are running from now on."""
        self.prefills.remove(prefill)
        first, *others = prefill.sequences
        first.table = prefill.table
        for sequence in others:
            sequence.table = self.blocks.fork(prefill.table)
        for sequence in prefill.sequences:
            sequence.drafter_length = end
        self.running += prefill.sequences
        # A resumed sequence has sampled its next token already; one that is only scored samples none.
        owners = list(prefill.sequences)
        sequences: list[Sequence] = []
        if not prefill.resumed:
            sequences = [sequence for sequence in owners if sequence.tokens_left]
        return Row(
            prefill.ids,
            prefill.table,
            start,
            end,
            sequences,
            scored=prefill.scored,
            owners=owners,
        )

    def _match_prefix(self, prefill: Prefill) -> None:
        """Take the cached blocks that continue a text, unless each of its tokens has to be computed."""
        if prefill.scored is None:
            self.blocks.match_prefix(prefill.table, prefill.ids)

    def _extend(self, table: BlockTable, length: int) -> bool:
        """Make room in a table; return whether there was any."""
        try:
            copy = self.blocks.extend(table, length)
        except NoFreeBlocks:
            return False
        if copy is not None:
            self._copies.append(copy)
        return True

    def _stop(self, prefill: Prefill) -> None:
        """Return the blocks of a text; its sequences wait again."""
        self.prefills.remove(prefill)
        self.blocks.free(prefill.table)
        self.waiting.extendleft(reversed(prefill.sequences))

    def _preempt(self) -> None:
        """Return the blocks of the last text or, without any, of the youngest sequence; it waits again."""
        if self.prefills:
            self._stop(self.prefills[-1])
            return
        sequence = self.running.pop()
        # Its blocks may now be given to another sequence: copies into them are void.
        freed = set(sequence.table.blocks)
        self._copies = [copy for copy in self._copies if copy.target not in freed]
        self.blocks.free(sequence.table)
        self.waiting.appendleft(sequence)


def _max_drafts(sequence: Sequence, drafts: int) -> int:
    """Return how many drafts a sequence has room for: the token after them must still fit.

    Rules depend on the tokens before, drafts included: a sequence with rules gets none, nor does one whose
    next token is known.
    """
    if sequence.rules is not None or sequence.forced_token is not None:
        return 0
    return min(drafts, sequence.tokens_left - 1)
