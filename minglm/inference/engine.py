"""Generate many completions at once: continuous batching over a paged cache (paper 3.5 calls it the rollout engine).

A step is one forward pass for all open requests: the next token of every running sequence, and beside them prompts that
have joined, at most `prefill_tokens` of those a step, so that long prompts do not hold up the others. Requests join and
leave at any step. A prompt is computed once however many samples it gets, and a prefix that it shares with an earlier
prompt is not computed again, block by block (`kv_cache.py`). When all blocks are in use the youngest sequence returns its
blocks and is computed again later; it continues as if it had not been interrupted.

Tokens in, tokens out: the engine knows nothing of messages. It returns the sampled ids with the log-probability of each,
which training uses as they are. The engine reads the model's own weights (and packs them for C). When they change, by
`update_weights` or by an optimizer that knows nothing of engines, the next step clears the prefix cache and computes all
open requests again, so every token is sampled from what the weights of its own step say about all of the text before it.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from itertools import count
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minglm.common.threads import threads_in_use
from minglm.inference.grammar import GrammarCompiler, GrammarTokenizer
from minglm.inference.kv_cache import BLOCK_SIZE, BlockManager
from minglm.inference.logit_rules import LogitRules
from minglm.inference.pages import PagedCache, decoder_for
from minglm.inference.request import (
    AnswerFailed,
    Completion,
    Event,
    FinishReason,
    PromptLogprob,
    Request,
    TopLogprobs,
)
from minglm.inference.sampling import (
    SamplerSettings,
    drawn_log_probabilities,
    prompt_scores,
    sample_next,
    top_logprobs,
)
from minglm.inference.scheduler import MAX_BATCH, Row, Scheduler, Sequence
from minglm.inference.speculative import Candidate, Drafter, verify_pass
from minglm.inference.thinking import ThoughtBudget
from minglm.model.glm import GLM

__all__ = ["Completion", "Engine", "Event", "ExpertPrecision", "Request"]

Listener = Callable[[Event], None]

_VERSION = attrgetter("_version")

NOT_FINITE = "the model's numbers are not finite"
NO_TOKEN = "the request's grammar and rules allow no further token"


class ExpertPrecision(StrEnum):
    """The precision of the experts' matrices during generation."""

    MODEL = "model"
    """The model's own."""
    FLOAT8 = "float8"
    """Quantized to float8 in blocks (`fp8_experts.py`)."""


class StopIds(Protocol):
    """The part of a tokenizer that the engine uses."""

    @property
    def stop_ids(self) -> Iterable[int]:
        """Return the ids that end an assistant turn."""
        ...


CPU_BATCH = 32
"""So few that their keys and values stay in a cache from pass to pass: 128 answers of the toy take 0.75 of the time."""


class Engine:
    """Generates with a model. One thread at a time steps; any thread may submit and cancel.

    tokenizer: supplies the stop ids of requests that name none.
    max_batch: most sequences that run at once; None: `MAX_BATCH`, and on a CPU `CPU_BATCH` for each thread.
    draft_tokens: how many tokens the MTP layer drafts for each pass of the trunk (`speculative.py`); completions follow
    the same distribution with and without drafts.
    prefill_tokens: most prompt tokens in one pass.
    cache_tokens: bound on the positions held in the cache, in blocks of `block`; None: the cache grows as needed.
    experts: an `ExpertPrecision`.
    keep_choices: return with each completion which experts its tokens went through.
    """

    def __init__(
        self,
        model: GLM,
        tokenizer: StopIds | None = None,
        *,
        max_batch: int | None = None,
        draft_tokens: int = 0,
        prefill_tokens: int = 2048,
        cache_tokens: int | None = None,
        block: int = BLOCK_SIZE,
        experts: str = ExpertPrecision.MODEL,
        keep_choices: bool = False,
    ) -> None:
        if experts not in list(ExpertPrecision):
            raise ValueError(f"experts = {experts!r}: must be {' or '.join(ExpertPrecision)}")
        self.model = model
        self.tokenizer = tokenizer
        self.fp8_experts = experts == ExpertPrecision.FLOAT8
        self.keep_choices = keep_choices
        self.limit = model.config.max_position_embeddings  # of prompt and completion together
        max_blocks = None if cache_tokens is None else cache_tokens // block
        self.blocks = BlockManager(block, max_blocks)
        if max_batch is None:
            on_cpu = model.device.type == "cpu"
            max_batch = CPU_BATCH * threads_in_use() if on_cpu else MAX_BATCH
        self.scheduler = Scheduler(self.blocks, max_batch, prefill_tokens)
        self.drafter = Drafter(model, draft_tokens) if draft_tokens else None
        self.passes = 0  # forward passes of the trunk
        self._grammars: GrammarCompiler | None = None  # made for the first request with a grammar

        # Set by the first step.
        self._pages: PagedCache | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._weight_versions: list[int] | None = None  # None: the weights have changed
        self._settings: SamplerSettings | None = None  # of the last batch

        # Shared with other threads, guarded by `changed`.
        self.open: dict[int, Sequence] = {}  # every unfinished sequence by its number
        self._inbox: list[Sequence] = []  # submitted since the last step
        self._cancelled: list[Sequence] = []
        self._numbers = count()
        self._changed = threading.Condition()
        self._stepping = threading.RLock()  # held by the thread that steps

    # From any thread.

    def submit(self, request: Request, on_event: Listener | None = None) -> int:
        """Queue a request, and return its number.

        on_event(event) is called for each of its tokens, in the thread that steps. Raises ValueError for a request that
        cannot be answered.
        """
        request.check(self.limit)
        length = min(len(request.prompt) + request.max_new_tokens, self.limit)
        room = self.blocks.max_tokens
        if room is not None and length > room:
            raise ValueError(f"{length} tokens of prompt and answer; cache_tokens allows {room}")
        stop_ids = request.stop_ids
        if stop_ids is None:
            stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
        rules = self._rules(request, stop_ids) if request.changes_logits else None
        thought = None
        if request.thinking_budget is not None:
            special = getattr(self.tokenizer, "special", {})
            thought = ThoughtBudget(request, special)
        with self._changed:
            number = next(self._numbers)
            sequence = Sequence(
                number, request, set(stop_ids), self.limit, on_event, rules, thought
            )
            self.open[number] = sequence
            self._inbox.append(sequence)
            self._changed.notify_all()
        return number

    def prepare(self, request: Request) -> None:
        """Do the slow part of `submit` ahead, in any thread: compile a request's grammar. Raises ValueError as it does."""
        if request.grammar is not None:
            self._compiler().matcher(request.grammar)

    def _compiler(self) -> GrammarCompiler:
        with self._changed:
            if self._grammars is None:
                if not isinstance(self.tokenizer, GrammarTokenizer):
                    raise ValueError("a grammar needs an engine with a tokenizer")
                self._grammars = GrammarCompiler(self.tokenizer)
            return self._grammars

    def _rules(self, request: Request, stop_ids: Iterable[int]) -> LogitRules:
        """Return what changes the logits of a request. Raises ValueError for ids or a grammar that cannot be used."""
        matcher = None
        if request.grammar is not None:
            matcher = self._compiler().matcher(request.grammar)
        return LogitRules(request, stop_ids, self.model.config.vocab_size, matcher)

    def cancel(self, number: int) -> bool:
        """End a request at the next step, which reports it as cancelled; return False if it has already ended."""
        with self._changed:
            if number not in self.open:
                return False
            self._cancelled.append(self.open[number])
            self._changed.notify_all()
            return True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a request is open; return whether one is."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.open), timeout)

    @property
    def busy(self) -> int:
        """Return how many requests are not finished."""
        return len(self.open)

    # From the thread that steps.

    def generate(
        self,
        requests: Iterable[Request],
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answer every request, and return the completions in the same order.

        on_token(request_index, token) is called for each token as it is sampled. Raises ValueError, before any work, for
        a request that cannot be answered, and `AnswerFailed` if one has ended with an error.
        """
        requests = list(requests)
        for i, request in enumerate(requests):
            try:
                request.check(self.limit)
            except ValueError as error:
                raise ValueError(f"request {i}: {error}") from None

        numbers: list[int] = []
        completions: list[Completion] = []
        with self._stepping:
            try:
                for i, request in enumerate(requests):
                    on_event = None if on_token is None else _token_listener(i, on_token)
                    number = self.submit(request, on_event)
                    numbers.append(number)
                    completions.append(self.open[number].completion)
                while not self.open.keys().isdisjoint(numbers):
                    self.step()
            except BaseException:  # Ctrl-C, or a listener that fails
                for number in numbers:
                    self.cancel(number)
                self._receive()
                raise
        for completion in completions:
            if completion.error:
                raise AnswerFailed(completion.error)
        return completions

    def update_weights(
        self, state: Mapping[str, Tensor] | None = None, partial: bool = False
    ) -> None:
        """Load a state dict into the model between two steps; None: the weights were changed in place.

        partial: whether tensors may be missing, which keep their values. Raises RuntimeError for other names or shapes.
        Open requests continue: their text so far is computed again with the new weights at the next step.
        """
        with self._stepping:
            if state is not None:
                if partial:
                    state = {**self.model.state_dict(), **state}
                self.model.load_state_dict(state)
            self._weight_versions = None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run one forward pass for all open requests, and return the events of the tokens it sampled.

        If the pass fails, all open requests end with an error, and the exception is raised. A request whose own numbers
        are not finite ends with an error, and nothing of it stays in the prefix cache; the others continue.
        """
        with self._stepping:
            try:
                events = self._receive()
                if self.open:
                    events += self._step()
                return events
            except BaseException:
                self._abandon()
                raise

    def _step(self) -> list[Event]:
        pages = self._current_pages()
        drafts = self.drafter.max_drafts if self.drafter else 0
        rows, copies = self.scheduler.plan(drafts)
        pages.begin(copies, self.blocks.num_blocks)
        if self.drafter:
            return self._draft_and_verify(self.drafter, pages, rows)
        result = self._forward(pages, rows)
        return result.events + self._sample(result.rows, result.logits_BV)

    def _receive(self) -> list[Event]:
        """Take over what other threads have submitted and cancelled; return the events of requests that this ends."""
        with self._changed:
            submitted = self._inbox
            cancelled = self._cancelled
            self._inbox = []
            self._cancelled = []
        events: list[Event] = []
        for sequence in submitted:
            self.scheduler.add(sequence)
            if not sequence.tokens_left and not sequence.wants_scores:
                events.append(self._emit(sequence, None, end=FinishReason.LENGTH))
        for sequence in cancelled:
            if sequence.number in self.open:
                events.append(self._emit(sequence, None, end=FinishReason.CANCELLED))
        return events

    def _emit(
        self,
        sequence: Sequence,
        token: int | None,
        logprob: float = 0.0,
        top: TopLogprobs = (),
        end: FinishReason | None = None,
        error: str = "",
        forced: bool = False,
    ) -> Event:
        """Report a token of a sequence, and remove the sequence if it has ended."""
        completion = sequence.completion
        scores: tuple[PromptLogprob, ...] = ()
        if sequence.scores and not completion.prompt_logprobs:
            scores = tuple(sequence.scores)
            completion.prompt_logprobs = scores
        if end is not None:
            completion.finish_reason = end
            completion.error = error
            if self._pages is not None:
                computed = min(sequence.table.length, len(sequence.ids) - 1)
                completion.experts_SLK = self._pages.choices_of(sequence.table, computed)
            self.scheduler.remove(sequence)
            with self._changed:
                del self.open[sequence.number]
        chosen = completion.experts_SLK
        event = Event(sequence.number, token, logprob, top, end, scores, error, forced, chosen)
        if sequence.on_event is not None:
            sequence.on_event(event)
        return event

    def _abandon(self) -> None:
        """End every open request after a failure: what the pass has written is not known.

        Requests that are submitted from now on are answered, so the open ones and the inbox are read at the same moment.
        """
        with self._changed:
            lost = list(self.open.values())
            self._inbox.clear()
        for sequence in lost:
            with contextlib.suppress(Exception):  # the failure may be the listener's own
                self._emit(sequence, None, end=FinishReason.ERROR)
        self.blocks.reset_prefix_cache()

    def _current_pages(self) -> PagedCache:
        """Return the cache; if the weights are not those of the last step, read them and compute everything again."""
        versions = self._weight_versions
        if (
            self._pages is not None
            and versions is not None
            and list(map(_VERSION, self._parameters)) == versions
        ):
            return self._pages
        self._weight_versions = None
        self._parameters = list(self.model.parameters())
        # The C decoder is compiled without NaN in mind, so the weights are looked at before they are used.
        if not _all_finite(self._parameters):
            self.scheduler.restart()
            raise AnswerFailed(f"{NOT_FINITE}: a weight is NaN or infinite")
        self._weight_versions = list(map(_VERSION, self._parameters))
        self.scheduler.restart()
        decoder = decoder_for(self.model, self.fp8_experts)
        pages = self._pages
        if pages is None or type(pages) is not decoder or not pages.fits(self.model):
            drafts = self.drafter is not None
            pages = decoder(self.model, self.blocks.block_size, drafts, choices=self.keep_choices)
            self._pages = pages
        pages.read_weights()
        return pages

    def _forward(self, pages: PagedCache, rows: list[Row]) -> "Forward":
        """Run the trunk over the rows, in order of length; rows whose numbers are not finite end here."""
        rows.sort(key=lambda row: row.stop - row.start)
        tokens: list[int] = []
        wanted: list[int] = []  # places of the tokens whose logits are needed
        for row in rows:
            first = len(tokens)
            tokens += row.ids[row.start : row.end] + row.drafts
            if row.scored is not None:
                wanted += range(first, len(tokens))
            elif row.sequences:
                last_known = len(tokens) - len(row.drafts) - 1
                wanted += range(last_known, len(tokens))
        hidden_TD, logits_BV = pages.trunk(rows, tokens, wanted)
        self.passes += 1
        if self.drafter:
            pages.keep_states(rows, hidden_TD)
        # A sum over everything is the cheap test that nearly every pass ends with.
        finite = math.isfinite((hidden_TD.sum() + logits_BV.sum()).item())
        if finite and all(row.scored is None for row in rows):
            return Forward(rows, logits_BV, [])

        sound_rows: list[Row] = []
        events: list[Event] = []
        kept: list[int] = []  # the logits that are sampled from
        token = 0
        place = 0
        finite_T = _finite_rows(hidden_TD)
        finite_B = _finite_rows(logits_BV)
        for row in rows:
            length = row.stop - row.start
            places = 0
            if row.scored is not None:
                places = length
            elif row.sequences:
                places = len(row.drafts) + 1
            sound = all(finite_T[token : token + length]) and all(finite_B[place : place + places])
            if not sound:
                events += self._fail(row)
            else:
                sound_rows.append(row)
                if row.scored is not None:
                    events += self._score(row, row.scored, logits_BV[place : place + places])
                if row.sequences:
                    kept += range(place + places - len(row.drafts) - 1, place + places)
            token += length
            place += places
        if len(kept) < len(logits_BV):
            logits_BV = logits_BV[kept]
        return Forward(sound_rows, logits_BV, events)

    def _fail(self, row: Row) -> list[Event]:
        """End the sequences of a row whose numbers are not finite; nothing of it stays in the prefix cache."""
        self.blocks.forget(row.table)
        events: list[Event] = []
        for sequence in row.owners:
            if sequence.number in self.open:
                event = self._emit(sequence, None, end=FinishReason.ERROR, error=NOT_FINITE)
                events.append(event)
        return events

    def _score(self, row: Row, sequence: Sequence, logits_SV: Tensor) -> list[Event]:
        """Keep the log-probabilities of the prompt's tokens after each token of a row; end what asks for nothing more."""
        prompt = sequence.request.prompt
        targets = prompt[row.start + 1 : row.end + 1]
        count = sequence.request.prompt_logprobs or 0
        del sequence.scores[row.start :]  # a prompt that is computed again
        sequence.scores += prompt_scores(logits_SV[: len(targets)], targets, count)
        if row.end < len(prompt) or sequence.tokens_left:
            return []
        return [self._emit(sequence, None, end=FinishReason.LENGTH)]

    def _sample(self, rows: list[Row], logits_BV: Tensor) -> list[Event]:
        """Sample a token for each sequence that gets one, and append it to its text."""
        rows = [row for row in rows if row.sequences]
        sequences = [sequence for row in rows for sequence in row.sequences]
        if not sequences:
            return []
        if len(sequences) > len(rows):
            # Several samples of one prompt use the same logits.
            source = [b for b, row in enumerate(rows) for _ in row.sequences]
            logits_BV = logits_BV[source]
        settings = self._settings_of(sequences, logits_BV.device)
        sampled = sample_next(logits_BV, settings, settings.next_index(sequences))
        places = list(range(len(sequences)))
        forced = _forced(sequences, logits_BV, places, settings.temperature_B)
        for b, (token, logprob) in forced.items():
            sampled.tokens[b] = token
            sampled.logprobs[b] = logprob
        return list(map(self._append, sequences, *sampled))

    def _settings_of(self, sequences: list[Sequence], device: torch.device) -> SamplerSettings:
        """Return the sampler settings of a batch; those of the last one if it has the same sequences."""
        if self._settings is None or self._settings.sequences != sequences:
            self._settings = SamplerSettings(sequences, device)
        return self._settings

    def _draft_and_verify(
        self, drafter: Drafter, pages: PagedCache, rows: list[Row]
    ) -> list[Event]:
        """Draft, let the trunk verify all drafts in one pass, and append the accepted ones and the token after them."""
        decoding = [row for row in rows if row.max_drafts]
        q_BSV = drafter.draft(pages, decoding) if decoding else None
        rows, logits_TV, events = self._forward(pages, rows)
        # A prompt that was only scored has ended, and returned its blocks.
        drafter.read(pages, [row for row in rows if row.is_prompt and row.table.blocks])

        candidates: list[Candidate] = []
        first = 0  # the place of the row's first logits
        for row in rows:
            if row.sequences:
                candidates += [Candidate(sequence, row, first) for sequence in row.sequences]
                first += len(row.drafts) + 1
        if not candidates:
            return events

        sequences = [candidate.sequence for candidate in candidates]
        settings = self._settings_of(sequences, logits_TV.device)
        verified = verify_pass(candidates, logits_TV, q_BSV, settings)
        accepted, tokens_BS, logprobs_BS, places_BS = verified
        drafter.accepted += sum(accepted)
        tokens = tokens_BS.tolist()
        logprobs = logprobs_BS.tolist()
        places = [candidate.first for candidate in candidates]
        forced = _forced(sequences, logits_TV, places, settings.temperature_B)
        for b, (token, logprob) in forced.items():
            tokens[b][0] = token
            logprobs[b][0] = logprob
        top: list[list[TopLogprobs]] | None = None  # for each position of the drafts, each row
        if settings.max_top_logprobs:
            top = [
                top_logprobs(logits_TV[places_B], settings.temperature_B, settings.top_logprobs)
                for places_B in places_BS.unbind(1)
            ]

        for b, (sequence, row, _) in enumerate(candidates):
            sequence.drafter_length = row.end
            for i in range(accepted[b] + 1):
                likely = top[i][b] if top else ()
                event = self._append(sequence, tokens[b][i], logprobs[b][i], likely)
                events.append(event)
                if event.finish_reason is not None or sequence.forced_token is not None:
                    break
            if sequence.number in self.open:
                # The cache holds the drafts that were not taken too: drop them.
                self.blocks.truncate(sequence.table, len(sequence.ids) - 1)
        return events

    def _append(
        self, sequence: Sequence, token: int, logprob: float, top: TopLogprobs = ()
    ) -> Event:
        """Append the next token to a sequence's text, and report it."""
        forced = sequence.forced_token is not None
        if sequence.rules is not None and not sequence.rules.accept(token, forced):
            return self._emit(sequence, None, end=FinishReason.ERROR, error=NO_TOKEN)
        if sequence.thought is not None:
            sequence.thought.take(token)
        completion = sequence.completion
        if forced:
            completion.forced.append(len(completion.tokens))
        sequence.ids.append(token)
        completion.tokens.append(token)
        completion.logprobs.append(logprob)
        if sequence.request.top_logprobs:
            completion.top_logprobs.append(top)
        end: FinishReason | None = None
        if token in sequence.stop_ids:
            end = FinishReason.STOP
        elif not sequence.tokens_left:
            end = FinishReason.LENGTH
        return self._emit(sequence, token, logprob, top, end, forced=forced)


class Forward(NamedTuple):
    """What a pass of the trunk leaves to sample from."""

    rows: list[Row]
    """Without those whose numbers are not finite."""
    logits_BV: Tensor
    """For each of the rows that samples: after its last token, and after each draft."""
    events: list[Event]
    """Of the requests that the pass has ended."""


class ForcedToken(NamedTuple):
    """A token that is put in, not sampled."""

    token: int
    logprob: float
    """The model's own, at the request's temperature."""


def _forced(
    sequences: list[Sequence], logits_TV: Tensor, places: list[int], temperature_B: Tensor
) -> dict[int, ForcedToken]:
    """Return the tokens that have to come next, by the index of their sequence.

    places: which of the logits (T, V) each sequence's next token comes from. temperatures: float (B,).
    """
    forced: dict[int, ForcedToken] = {}
    for b, sequence in enumerate(sequences):
        token = sequence.forced_token
        if token is None:
            continue
        token_1 = torch.tensor([token], device=logits_TV.device)
        one = slice(places[b], places[b] + 1)
        logprob_1 = drawn_log_probabilities(logits_TV[one], temperature_B[b, None], token_1)
        forced[b] = ForcedToken(token, logprob_1.item())
    return forced


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no number of any tensor is NaN or infinite."""
    extremes: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            extremes += torch.aminmax(tensor.detach())  # NaN is passed on
    if not extremes:
        return True
    return bool(torch.stack([extreme.double() for extreme in extremes]).isfinite().all())


def _finite_rows(x_TD: Tensor) -> list[bool]:
    """Return for each row whether its numbers are sound: no NaN, no positive infinity, and not all negative infinity."""
    if not len(x_TD):
        return []
    return x_TD.amax(-1).isfinite().tolist()


def _token_listener(index: int, on_token: Callable[[int, int], None]) -> Listener:
    """Return a listener for one request that passes on its tokens."""

    def on_event(event: Event) -> None:
        if event.token is not None:
            on_token(index, event.token)

    return on_event
