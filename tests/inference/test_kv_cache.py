"""The cache's bookkeeping: no block is lost or written by two, whatever joins, leaves, forks and fails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minglm.inference import Engine, Request
from minglm.inference.kv_cache import BlockManager, BlockTable, NoFreeBlocks
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds

SIZE, LIMIT = 2, 9


class Cache(RuleBasedStateMachine):
    """Texts of two letters grow, fork, shrink and leave; `store` is what a real cache would hold in each slot."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(SIZE, LIMIT)
        self.store = {}
        self.texts = []

    def write(self, table, text):
        """Do what a pass does: make room, copy, write the new slots."""
        start = table.length
        try:
            copy = self.blocks.extend(table, len(text))
        except NoFreeBlocks:
            assert self.blocks.num_used_blocks + (len(text) + SIZE - 1) // SIZE > LIMIT - len(
                self.blocks.evictable
            )
            return False
        if copy:
            assert self.blocks.ref_count[copy.source], "copied although nobody else holds it"
            for slot in range(SIZE):
                self.store[copy[1], slot] = self.store.get((copy[0], slot))
        for at in range(start, len(text)):
            self.store[table.blocks[at // SIZE], at % SIZE] = tuple(text[: at + 1])
        self.blocks.cache_full_blocks(table, text)
        return True

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def join(self, text):
        """Begin a prompt with what is known of it."""
        table = BlockTable()
        self.blocks.match_prefix(table, text)
        assert table.length < len(text), "nothing left to compute"
        if self.write(table, text):
            self.texts.append((table, text))
        else:
            self.blocks.free(table)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data, more):
        """Add tokens to an answer; without room it stays as it is."""
        table, text = data.draw(st.sampled_from(self.texts))
        if self.write(table, text + more):
            text += more

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data):
        """Begin a second sample."""
        table, text = data.draw(st.sampled_from(self.texts))
        self.texts.append((self.blocks.fork(table), list(text)))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data):
        """Let an answer end, be cancelled or preempted."""
        table, _ = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
        self.blocks.free(table)
        assert not table.blocks

    @precondition(lambda self: not self.texts)
    @rule()
    def new_weights(self):
        """Forget everything, as after an update of the weights."""
        self.blocks.reset_prefix_cache()
        table = BlockTable()
        self.blocks.match_prefix(table, [0] * 7)
        assert not table.blocks

    @invariant()
    def everyone_reads_their_own_text(self):
        """Check that each slot of each table holds what its text says there; nobody wrote over another's."""
        for table, text in self.texts:
            for at in range(table.length):
                assert self.store[table.blocks[at // SIZE], at % SIZE] == tuple(text[: at + 1])

    @invariant()
    def blocks_are_counted(self):
        """Check that a block is held as often as tables name it, or is free, or is kept; never two of these."""
        held = [block for table, _ in self.texts for block in table.blocks]
        assert self.blocks.ref_count == [
            held.count(block) for block in range(len(self.blocks.ref_count))
        ]
        idle = [*self.blocks.free_blocks, *self.blocks.evictable]
        assert len(set(idle)) == len(idle)
        assert not set(idle) & set(held)
        assert self.blocks.num_used_blocks == len(set(held)) <= LIMIT
        assert len(idle) + len(set(held)) == len(self.blocks.ref_count)


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(first=st.integers(1, 9), then=st.integers(1, 9))
def test_a_prefix_may_be_matched_in_two_steps(first, then):
    """A table that ends with a cached block takes the next ones when more of its text is known."""
    blocks = BlockManager(SIZE, LIMIT)
    text = list(range(9))
    known = BlockTable()
    blocks.extend(known, len(text))
    blocks.cache_full_blocks(known, text)
    table = BlockTable()
    for end in (first, then):
        blocks.match_prefix(table, text[:end])
    # The last token is never taken.
    assert table.length == (max(first, then) - 1) // SIZE * SIZE
    assert table.blocks == known.blocks[: table.length // SIZE]


@given(length=st.integers(1, 9))
def test_what_is_not_written_is_not_copied(length):
    """A table that shares all its blocks and grows by nothing keeps them."""
    blocks = BlockManager(SIZE, LIMIT)
    table = BlockTable()
    blocks.extend(table, length)
    twin = blocks.fork(table)
    assert blocks.extend(twin, length) is None
    assert twin.blocks == table.blocks


@settings(max_examples=10)
@given(seed=seeds, room=st.integers(5, 12), drafts=st.integers(0, 2))
def test_preempted_answers_go_on_as_if_nothing_had_happened(seed, room, drafts):
    """With too few blocks for all, answers are those of a large cache, and every block is returned."""
    model = tiny_model(seed)
    requests = [Request([1, 2, 3, 4, i][: 3 + i % 3], 5, seed=i, stop_ids=(7, 8)) for i in range(6)]
    expected = Engine(model, draft_tokens=drafts).generate(requests)
    engine = Engine(model, draft_tokens=drafts, cache_tokens=2 * room, block=2, prefill_tokens=4)
    assert [done.tokens for done in engine.generate(requests)] == [done.tokens for done in expected]
    assert engine.blocks.num_used_blocks == 0 and len(engine.blocks.ref_count) <= room


@settings(max_examples=10)
@given(seed=seeds, chunk=st.sampled_from([1, 2, 3, 5, 64]), block=st.sampled_from([1, 3, 16]))
@torch.no_grad()
def test_chunked_cached_and_batched_logits_are_those_of_the_plain_pass(seed, chunk, block):
    """Prompts in pieces, beside answers, over experts too: every logit that is drawn from is that of one full pass."""
    model = tiny_model(seed)
    engine = Engine(model, block=block, prefill_tokens=chunk, max_batch=3)
    seen = {}
    forward = engine._forward

    def watch(pages, rows):
        result = forward(pages, rows)
        sampling = [row for row in result.rows if row.sequences]
        for row, logits_V in zip(sampling, result.logits_BV, strict=True):
            seen[tuple(row.ids[: row.end])] = logits_V
        return result

    engine._forward = watch
    prompts = [
        torch.randint(0, 24, (n,), generator=numbers(seed + n)).tolist() for n in (1, 4, 7, 12)
    ]
    engine.generate([Request(prompt, 4, seed=i, stop_ids=()) for i, prompt in enumerate(prompts)])
    assert len(seen) >= 13  # four passes for each of four texts; equal texts are computed once
    for text, logits_V in seen.items():
        # float32 logits of size 10; other batches round differently
        torch.testing.assert_close(
            logits_V, model(torch.tensor([text]))[0, -1], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("drafts", [0, 2])
def test_cancelled_and_failed_requests_return_their_blocks(drafts):
    """A cancelled request reports so; when a pass fails all end with an error, and the engine goes on with new ones."""
    model = tiny_model(1)
    engine = Engine(model, draft_tokens=drafts, block=2, prefill_tokens=3)
    events = []
    first = engine.submit(Request([1, 2, 3, 4, 5], 50, stop_ids=()), events.append)
    second = engine.submit(Request([1, 2, 3, 4, 6], 50, stop_ids=()))
    for _ in range(4):
        engine.step()
    assert engine.cancel(first) and engine.busy == 2
    engine.step()
    assert not engine.cancel(first) and engine.busy == 1 and events[-1].finish_reason == "cancelled"
    forward = engine._forward
    engine._forward = None
    ends = []
    third = engine.submit(Request([1], 3), ends.append)
    with pytest.raises(TypeError):
        engine.step()
    assert engine.busy == 0
    assert engine.blocks.num_used_blocks == 0
    assert not engine.blocks.hash_to_block
    assert third > second
    assert [event.finish_reason for event in ends] == ["error"]
    engine._forward = forward
    (done,) = engine.generate([Request([1, 2], 5, temperature=0.0, stop_ids=())])
    request = Request([1, 2], 5, temperature=0.0, stop_ids=())
    assert done.tokens == Engine(model).generate([request])[0].tokens


@pytest.mark.parametrize("drafts", [0, 2])
def test_new_weights_in_the_middle_of_an_answer(drafts):
    """An answer goes on as the new weights say about the text so far, also when they are changed in place."""
    old, new = tiny_model(1), tiny_model(2)
    engine = Engine(old, draft_tokens=drafts)
    events = []
    engine.submit(Request([1, 2, 3], 12, temperature=0.0, stop_ids=()), events.append)
    for _ in range(3):
        engine.step()
    begun = [event.token for event in events]
    engine.update_weights(new.state_dict())
    while engine.busy:
        engine.step()
    tokens = [event.token for event in events]
    rest = Request([1, 2, 3, *begun], 12 - len(begun), temperature=0.0, stop_ids=())
    assert tokens[len(begun) :] == Engine(new).generate([rest])[0].tokens
    with torch.no_grad():
        old.lm_head.weight.neg_()
    assert engine.generate([rest])[0].tokens == Engine(old).generate([rest])[0].tokens
