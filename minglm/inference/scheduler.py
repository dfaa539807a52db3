"""Who is computed in the next pass: continuous batching in plain Python (no section in the paper).

Each pass takes the next token of every answer under way, and what is left of `prefill_tokens` in prompts. Requests with
the same text are computed once. When blocks run out the youngest gives its own back and waits; its text so far is its
new prompt, so it goes on as if nothing had happened.
"""

from collections import deque
from dataclasses import dataclass, field

from minglm.inference.kv_cache import NoRoom, Table
from minglm.inference.request import Completion


class Sequence:
    """A request under way: its text so far, and the table of its keys and values once they are computed."""

    def __init__(self, number, request, stops, limit, on_event=None):
        self.number, self.request, self.stops, self.on_event = number, request, stops, on_event
        self.ids = list(request.prompt)
        self.most = min(request.max_new_tokens, limit - len(request.prompt))
        self.completion, self.table = Completion([], []), Table()
        self.read = 0  # how far the drafter has read

    @property
    def left(self):
        """How many more tokens it may get."""
        return self.most - len(self.completion.tokens)


@dataclass(slots=True)
class Row:
    """What one text contributes to a pass: its tokens from `start` to `end`, and the drafts after them."""

    ids: list[int]
    table: Table
    start: int
    end: int
    draws: list[Sequence]
    """The sequences that get a token after it; none while a prompt is not complete."""
    prompt: bool = True
    room: int = 0
    """How many drafts there is room for; 0 for prompts."""
    drafts: list[int] = field(default_factory=list)
    draft: int = 0
    """Which row of the drafts' distributions is its own."""

    @property
    def stop(self):
        """Where the row ends, drafts included."""
        return self.end + len(self.drafts)


class Prefill:
    """A text that is not computed yet, and the sequences that begin with it.

    An answer that comes back leaves its last token out: the pass after this one takes it as any other, drafts included.
    """

    def __init__(self, sequence):
        self.resumed = bool(sequence.completion.tokens)
        self.ids = sequence.ids[: -1 if self.resumed else None]
        self.members, self.table = [sequence], Table()

    @property
    def key(self):
        """What sequences that are computed together have in common."""
        return self.resumed, tuple(self.ids)


class Scheduler:
    """Sequences that wait, whose text is being computed (`prefills`), and that are answered (`live`)."""

    def __init__(self, blocks, max_batch=256, prefill_tokens=2048):
        self.blocks, self.max_batch, self.prefill_tokens = blocks, max_batch, prefill_tokens
        self.waiting, self.prefills, self.live = deque(), [], []
        self.copies = []

    def add(self, sequence):
        """Let a sequence wait its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence):
        """Take a sequence out, wherever it is, and return its blocks."""
        if sequence in self.live:
            self.live.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        for job in self.prefills:
            if sequence in job.members:
                job.members.remove(sequence)
        for job in [job for job in self.prefills if not job.members]:
            self._stop(job)
        self.blocks.close(sequence.table)

    def restart(self):
        """Compute everything under way again, and know no block."""
        for job in list(self.prefills):
            self._stop(job)
        while self.live:
            self._preempt()
        self.blocks.forget()

    def plan(self, drafts=0):
        """The rows of the next pass, answers before prompts, and the blocks to copy before it, (from, to) pairs.

        drafts: how many positions to reserve after the last token of each answer, if it may still become that long.
        """
        self.copies, rows, at = [], [], 0
        while at < len(self.live):
            sequence = self.live[at]
            if self._extend(
                sequence.table, len(sequence.ids) + (drafts and min(drafts, sequence.left - 1))
            ):
                at += 1
            else:
                self._preempt()
        for sequence in self.live:
            ids, table = sequence.ids, sequence.table
            if (end := len(ids)) >= (table.named + 1) * self.blocks.size:
                self.blocks.publish(table, ids)
            room = drafts and min(drafts, sequence.left - 1)
            rows.append(Row(ids, table, end - 1, end, [sequence], prompt=False, room=room))
        if self.waiting:
            self._admit()
        for job in self.prefills:
            self.blocks.match(
                job.table, job.ids
            )  # all of them first, before any takes a block that another knows
        left, at = self.prefill_tokens, 0
        while at < len(self.prefills) and left > 0:
            job = self.prefills[at]
            row = self._prefill(job, left)
            if row is None:
                break
            rows.append(row)
            left -= row.end - row.start
            at += row.end < len(row.ids)  # a complete one has left the list
        return rows, self.copies

    def _admit(self):
        """Waiting sequences begin; those with the same text begin together."""
        jobs = {job.key: job for job in self.prefills}
        room = self.max_batch - len(self.live) - sum(len(job.members) for job in self.prefills)
        while self.waiting and room > 0:
            new, room = Prefill(self.waiting.popleft()), room - 1
            job = jobs.setdefault(new.key, new)
            if job is new:
                self.prefills.append(job)
            else:
                job.members += new.members

    def _prefill(self, job, most):
        """The next row of a text, of at most so many tokens; None when there is no room for it yet."""
        self.blocks.match(
            job.table, job.ids
        )  # what rows of this very pass compute is known already
        start = job.table.length
        end = min(len(job.ids), start + most)
        while not self._extend(job.table, end):
            if self.prefills[-1] is job:
                assert self.live or self.prefills[0] is not job, "submit refuses what never fits"
                return None
            self._preempt()
        self.blocks.publish(job.table, job.ids)
        if end < len(job.ids):
            return Row(job.ids, job.table, start, end, [])
        self.prefills.remove(job)
        first, *others = job.members
        first.table = job.table
        for sequence in others:
            sequence.table = self.blocks.fork(job.table)
        for sequence in job.members:
            sequence.read = end
        self.live += job.members
        return Row(job.ids, job.table, start, end, [] if job.resumed else list(job.members))

    def _extend(self, table, length):
        try:
            copy = self.blocks.extend(table, length)
        except NoRoom:
            return False
        if copy:
            self.copies.append(copy)
        return True

    def _stop(self, job):
        """A text goes back to wait."""
        self.prefills.remove(job)
        self.blocks.close(job.table)
        self.waiting.extendleft(reversed(job.members))

    def _preempt(self):
        """The youngest gives its blocks back and waits."""
        if self.prefills:
            self._stop(self.prefills[-1])
            return
        sequence = self.live.pop()
        given = set(sequence.table.blocks)
        self.copies = [
            copy for copy in self.copies if copy[1] not in given
        ]  # somebody else may take that block now
        self.blocks.close(sequence.table)
        self.waiting.appendleft(sequence)
