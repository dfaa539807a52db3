"""Many answers at once: continuous batching over a paged cache (paper 3.5 calls it the rollout engine).

A step is one forward pass for all that is under way: the next token of every answer, and beside them prompts that have
joined, at most `prefill_tokens` of those a step so that long prompts do not hold up answers. Requests join and leave at
any step. A prompt is computed once however many samples it gets, and what it has in common with an earlier one is not
computed again, block by block (`kv_cache.py`). When all blocks are in use the youngest answer gives its own back and is
computed again later; it goes on as if nothing had happened.

Tokens in, tokens out: the engine knows nothing of messages. It returns the sampled ids with the log-probability of
each, which training uses as they are. The model is read (and for C packed anew). When its weights change, by
`update_weights` or by an optimizer that knows nothing of engines, the next step forgets all keys and values and
computes what is under way again, so every token is drawn from what the weights of its own step say about all of the
text before it.
"""

import contextlib
import threading
from itertools import count

import torch

from minglm.inference.kv_cache import BlockManager
from minglm.inference.pages import decoder_for
from minglm.inference.request import Completion, Event, Request
from minglm.inference.sampling import Settings, likeliest, sample_next
from minglm.inference.scheduler import Scheduler, Sequence
from minglm.inference.speculative import Candidate, Drafter, check

__all__ = ["Completion", "Engine", "Event", "Request"]


class Engine:
    """Generates with a model. One thread at a time steps; any thread may submit and cancel.

    tokenizer: gives the stop ids of requests that name none. max_batch: most answers under way at once.
    draft_tokens: how many tokens the MTP layer drafts for each pass of the trunk (`speculative.py`); answers follow the
    same distribution with and without. prefill_tokens: most prompt tokens in one pass. cache_tokens: bound on the
    positions held in the cache (None: it grows as needed), in blocks of `block`. experts: the model's own ("model"), or
    quantised to "float8" (`fp8_experts.py`).
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        max_batch=256,
        draft_tokens=0,
        prefill_tokens=2048,
        cache_tokens=None,
        block=16,
        experts="model",
    ):
        if experts not in ("model", "float8"):
            raise ValueError(f"experts = {experts!r}: must be model or float8")
        self.float8 = experts == "float8"
        self.model, self.tokenizer = model, tokenizer
        self.limit = model.config.max_position_embeddings  # of prompt and answer together
        self.blocks = BlockManager(block, None if cache_tokens is None else cache_tokens // block)
        self.scheduler = Scheduler(self.blocks, max_batch, prefill_tokens)
        self.drafter = Drafter(model, draft_tokens) if draft_tokens else None
        self.pages = self.parameters = self.weights = None
        self.passes = 0
        self.numbers = count()
        self.open = {}  # every unfinished sequence by its number
        self.inbox, self.cancelled = [], []
        self.changed, self.stepping = threading.Condition(), threading.RLock()
        self.settings = None

    # from any thread

    def submit(self, request, on_event=None):
        """Queue a request; returns its number. on_event(Event) is called for each of its tokens, by whoever steps.

        Raises ValueError for a request that cannot be answered.
        """
        request.check(self.limit)
        most, room = (
            min(len(request.prompt) + request.max_new_tokens, self.limit),
            self.blocks.max_blocks,
        )
        if room is not None and most > room * self.blocks.block_size:
            raise ValueError(
                f"{most} tokens of prompt and answer; cache_tokens allows {room * self.blocks.block_size}"
            )
        stops = request.stop_ids
        if stops is None:
            stops = self.tokenizer.stop_ids if self.tokenizer is not None else ()
        with self.changed:
            sequence = Sequence(next(self.numbers), request, set(stops), self.limit, on_event)
            self.open[sequence.number] = sequence
            self.inbox.append(sequence)
            self.changed.notify_all()
        return sequence.number

    def cancel(self, number):
        """End a request at the next step, which reports it as cancelled; False if it has already ended."""
        with self.changed:
            if number not in self.open:
                return False
            self.cancelled.append(self.open[number])
            self.changed.notify_all()
            return True

    def wait(self, timeout=None):
        """Wait until there is something to do; returns whether there is."""
        with self.changed:
            return self.changed.wait_for(lambda: self.open, timeout)

    @property
    def busy(self):
        """How many requests are not finished."""
        return len(self.open)

    # from the thread that steps

    def generate(self, requests, on_token=None):
        """Answer every `Request`; returns `Completion`s in the same order.

        on_token(request_index, token) is called for each token as it is drawn. Raises ValueError, before any work, for
        a request that cannot be answered.
        """
        requests, numbers = list(requests), []
        for i, request in enumerate(requests):
            try:
                request.check(self.limit)
            except ValueError as error:
                raise ValueError(f"request {i}: {error}") from None
        with self.stepping:
            done = [None] * len(requests)

            def listen(i):
                def hear(event):
                    if event.token is not None:
                        on_token(i, event.token)

                return hear

            try:
                for i, request in enumerate(requests):
                    numbers.append(self.submit(request, on_token and listen(i)))
                    done[i] = self.open[numbers[-1]].completion
                while not self.open.keys().isdisjoint(numbers):
                    self.step()
            except BaseException:  # Ctrl-C, or a listener that fails
                for number in numbers:
                    self.cancel(number)
                self._receive()
                raise
        return done

    def update_weights(self, state=None):
        """Load a state dict into the model between two steps; None: the weights were changed in place.

        Requests under way go on: their text so far is computed again with the new weights at the next step.
        """
        with self.stepping:
            if state is not None:
                self.model.load_state_dict(state)
            self.weights = None

    @torch.inference_mode()
    def step(self):
        """One forward pass for all requests under way; returns the `Event`s of the tokens it drew."""
        with self.stepping:
            try:
                events = self._receive()
                if not self.open:
                    return events
                self._look_at_weights()
                rows, copies = self.scheduler.plan(self.drafter.max_drafts if self.drafter else 0)
                self.pages.begin(copies, self.blocks.num_blocks)
                events += (
                    self._draw_ahead(rows)
                    if self.drafter
                    else self._draw(rows, self._forward(rows))
                )
                return events
            except BaseException:
                self._abandon()
                raise

    def _receive(self):
        """Take in what other threads have submitted and cancelled; the events of requests that this ends."""
        with self.changed:
            inbox, self.inbox = self.inbox, []
            cancelled, self.cancelled = self.cancelled, []
        events = []
        for sequence in inbox:
            self.scheduler.add(sequence)
            if not sequence.tokens_left:
                events.append(self._emit(sequence, None, end="length"))
        for sequence in cancelled:
            if sequence.number in self.open:
                events.append(self._emit(sequence, None, end="cancelled"))
        return events

    def _emit(self, sequence, token, logprob=0.0, top=(), end=None):
        """Report a token of a sequence, and take it out where that was the last."""
        if end is not None:
            sequence.completion.finish_reason = end
            self.scheduler.remove(sequence)
            with self.changed:
                del self.open[sequence.number]
        event = Event(sequence.number, token, logprob, top, end)
        if sequence.on_event is not None:
            sequence.on_event(event)
        return event

    def _abandon(self):
        """End every request after a failure: what the pass has written is not known.

        Those that come from now on are answered, so what is lost and what is still to be read is one look at both.
        """
        with self.changed:
            lost = list(self.open.values())
            self.inbox.clear()
        for sequence in lost:
            with contextlib.suppress(Exception):  # the failure may be the listener's own
                self._emit(sequence, None, end="error")
        self.blocks.reset_prefix_cache()

    def _look_at_weights(self):
        """Compute everything again if the weights are not those of the last step, and find them where they now are."""
        if self.weights is None or [p._version for p in self.parameters] != self.weights:
            self.parameters = list(self.model.parameters())
            self.weights = [p._version for p in self.parameters]
            self.scheduler.restart()
            form = decoder_for(self.model, self.float8)
            if type(self.pages) is not form or not self.pages.fits(self.model):
                self.pages = form(self.model, self.blocks.block_size, self.drafter is not None)
            self.pages.read_weights()

    def _forward(self, rows):
        """One pass of the trunk over the rows, in order of length; the logits after tokens that something follows."""
        rows.sort(key=lambda row: row.stop - row.start)
        tokens, wanted = [], []
        for row in rows:
            tokens += row.ids[row.start : row.end] + row.drafts
            if row.sequences:
                wanted += range(len(tokens) - len(row.drafts) - 1, len(tokens))
        hidden_TD, logits_BV = self.pages.trunk(rows, tokens, wanted)
        self.passes += 1
        if self.drafter:
            self.pages.keep_states(rows, hidden_TD)
        return logits_BV

    def _draw(self, rows, logits_BV):
        """Draw a token for each sequence that gets one, and take it into its text."""
        rows = [row for row in rows if row.sequences]
        sequences = [sequence for row in rows for sequence in row.sequences]
        if not sequences:
            return []
        if len(sequences) > len(rows):  # samples of one prompt draw from the same logits
            logits_BV = logits_BV[[b for b, row in enumerate(rows) for _ in row.sequences]]
        s = self._settings(sequences, logits_BV.device)
        sampled = sample_next(logits_BV, s, s.index(sequences))
        return list(map(self._take, sequences, *sampled))

    def _settings(self, sequences, device):
        if self.settings is None or self.settings.sequences != sequences:
            self.settings = Settings(sequences, device)
        return self.settings

    def _draw_ahead(self, rows):
        """Draft, let the trunk check all drafts in one pass, and take what stands and the token after it."""
        decoding = [row for row in rows if row.max_drafts]
        q_BSV = self.drafter.draft(self.pages, decoding) if decoding else None
        logits_TV = self._forward(rows)
        self.drafter.read(self.pages, [row for row in rows if row.is_prompt])
        at, entries = 0, []
        for row in rows:
            entries += [Candidate(sequence, row, at) for sequence in row.sequences]
            at += len(row.drafts) + 1 if row.sequences else 0
        events = []
        if entries:
            s = self._settings([sequence for sequence, _, _ in entries], logits_TV.device)
            accepted, tokens_BS, p_BSV = check(entries, logits_TV, q_BSV, s)
            self.drafter.accepted += sum(accepted)
            logprobs = p_BSV.gather(2, tokens_BS[..., None])[..., 0].log().tolist()
            best = [likeliest(p_BV, s.tops) for p_BV in p_BSV.unbind(1)] if s.top else None
            tokens = tokens_BS.tolist()
        for b, (sequence, row, _) in enumerate(entries):
            sequence.drafter_length = row.end
            for i in range(accepted[b] + 1):
                events.append(
                    self._take(sequence, tokens[b][i], logprobs[b][i], best[i][b] if best else ())
                )
                if events[-1].finish_reason:
                    break
            else:
                self.blocks.truncate(sequence.table, len(sequence.ids) - 1)
        return events

    def _take(self, sequence, token, logprob, top=()):
        """A token becomes part of a sequence's text."""
        done = sequence.completion
        sequence.ids.append(token)
        done.tokens.append(token)
        done.logprobs.append(logprob)
        if sequence.request.top_logprobs:
            done.top_logprobs.append(top)
        end = "stop" if token in sequence.stop_ids else None if sequence.tokens_left else "length"
        return self._emit(sequence, token, logprob, top, end)
