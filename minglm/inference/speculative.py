"""Draft tokens with the MTP layer and verify them without changing the distribution (paper 2.1; arXiv 2211.17192).

    draft x_i ~ q_i;   accept while u_i < min(1, p_i(x_i) / q_i(x_i));   at the first rejection sample from
    max(0, p_i - q_i), normalised;   after n accepted drafts sample one more, the bonus token, from p_{n+1}

p is what the trunk would have sampled from, after temperature and cuts; q is the same for the MTP layer. A
draft x is kept with probability min(p, q), and the rejections supply what is missing up to p, so the tokens
follow p exactly, whatever q is: a bad draft costs time and nothing else.

GLM-4.5 has one MTP layer and applies it repeatedly: its own state takes the place of the trunk's for the next
draft. Released engines differ in whether that is the state before or after `shared_head.norm`; here it is
after, like the trunk's. The layer's key for token s (and the state before it) is kept in slot s, so a slot
depends only on the text up to its token, and blocks can be shared; slot 0 has no state before it and is never
read.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from minglm.inference.pages import PagedCache, TableSpan
from minglm.inference.sampling import (
    Purpose,
    SamplerSettings,
    distribution,
    draw,
    drawn_log_probabilities,
    uniforms,
)
from minglm.inference.scheduler import Row, Sequence
from minglm.model.glm import GLM


def verify(
    p_BSV: Tensor,
    q_BSV: Tensor,
    drafts_BS: Tensor,
    lengths_B: Tensor,
    accept_BS: Tensor,
    last_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return how many drafts of each row are accepted, int64 (B,), and the token after them, int64 (B,).

    p (B, S + 1, V): the target at each draft and after the last; q (B, S, V): what the drafts int64 (B, S)
    were sampled from; neither has to be normalised. lengths int64 (B,): how many drafts a row has. accept (B,
    S), last (B,): uniform numbers.
    """
    B, S, V = q_BSV.shape
    p_BSV = p_BSV.double() / p_BSV.double().sum(-1, keepdim=True)
    q_BSV = q_BSV.double() / q_BSV.double().sum(-1, keepdim=True)

    # Accept draft x while u < p(x) / q(x), without a division.
    index_BS1 = drafts_BS[..., None]
    p_BS = p_BSV[:, :S].gather(2, index_BS1)[..., 0]
    q_BS = q_BSV.gather(2, index_BS1)[..., 0]
    index_S = torch.arange(S, device=p_BSV.device)
    accepted_BS = (accept_BS * q_BS < p_BS) & (index_S < lengths_B[:, None])
    accepted_B = accepted_BS.long().cumprod(1).sum(1)  # up to the first rejection

    # The token after the accepted drafts: from p after all drafts of the row, else from max(0, p - q).
    rows = torch.arange(B, device=p_BSV.device)
    target_BV = p_BSV[rows, accepted_B]
    if S:
        rejected_B = accepted_B < lengths_B
        residual_BV = (target_BV - q_BSV[rows, accepted_B.clamp(max=S - 1)]).clamp(min=0)
        # If p = q everywhere only rounding can reject; sample from p then.
        has_mass_B1 = residual_BV.sum(1, keepdim=True) > 0
        residual_BV = torch.where(has_mass_B1, residual_BV, target_BV)
        target_BV = torch.where(rejected_B[:, None], residual_BV, target_BV)
    return accepted_B, draw(target_BV, last_B)


class Candidate(NamedTuple):
    """A sequence that gets tokens from a verification pass."""

    sequence: Sequence
    row: Row
    first: int
    """The place of the row's first logits."""


class Verified(NamedTuple):
    """The result of a verification pass."""

    accepted: list[int]
    """For each sequence, how many drafts are accepted."""
    tokens_BS: Tensor
    """int64 (B, S + 1): the accepted drafts and one token more count, the rest is filling."""
    logprobs_BS: Tensor
    """float32 (B, S + 1): the log-probability of each token at its temperature, before the cuts."""
    places_BS: Tensor
    """int64 (B, S + 1): which logits each of them comes from."""


def verify_pass(
    candidates: list[Candidate], logits_TV: Tensor, q_BSV: Tensor | None, settings: SamplerSettings
) -> Verified:
    """Verify the drafts of a pass, from logits (T, V) and the q of `Drafter.draft`, None without drafts."""
    device = logits_TV.device
    B = len(candidates)
    S = 0 if q_BSV is None else q_BSV.shape[1]

    # Pad the drafts to (B, S). A shorter row repeats the logits after its last draft.
    lengths: list[int] = []
    places: list[int] = []
    padded: list[list[int]] = []
    for _, row, first in candidates:
        length = len(row.drafts)
        lengths.append(length)
        places += [first + min(i, length) for i in range(S + 1)]
        padded.append(row.drafts + [0] * (S - length))
    lengths_B = torch.tensor(lengths, device=device)
    drafts_BS = torch.tensor(padded, device=device).view(B, S).long()

    # What is sampled from, with the sampler settings of each row at each of its positions.
    def at_each_position(x_B: Tensor) -> Tensor:
        return repeat(x_B, "B -> (B S)", S=S + 1)

    cuts = [
        None if x_B is None else at_each_position(x_B)
        for x_B in (settings.top_p_B, settings.top_k_B, settings.min_p_B)
    ]
    temperature_T = at_each_position(settings.temperature_B)
    places_T = torch.tensor(places, device=device)
    at_places_TV = logits_TV[places_T]
    # Rows with rules have no drafts: they look at their first position only.
    ruled_TV = settings.ruled(at_places_TV, rows=range(0, B * (S + 1), S + 1))
    _, cut_TV = distribution(at_places_TV, temperature_T, *cuts, ruled_BV=ruled_TV)
    cut_BSV = rearrange(cut_TV, "(B S) V -> B S V", B=B)

    # q of each row; one without drafts gets ones, which are never looked at.
    if q_BSV is None:
        q_BSV = cut_BSV[:, :0]
    elif S:
        ones = torch.ones_like(q_BSV[:1])
        own = [row.draft_row if row.drafts else len(q_BSV) for _, row, _ in candidates]
        q_BSV = torch.cat((q_BSV, ones))[own]

    index_B = settings.next_index([candidate.sequence for candidate in candidates])
    step_S = torch.arange(S, device=device)
    accept_BS = uniforms(settings.seeds_B[:, None], index_B[:, None] + step_S, Purpose.ACCEPT)
    last_B = uniforms(settings.seeds_B, index_B, Purpose.RESIDUAL)
    accepted_B, tokens_B = verify(cut_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B)
    tokens_BS = F.pad(drafts_BS, (0, 1)).scatter_(1, accepted_B[:, None], tokens_B[:, None])
    logprobs_T = drawn_log_probabilities(at_places_TV, temperature_T, tokens_BS.flatten())
    logprobs_BS = logprobs_T.view(B, S + 1)
    return Verified(accepted_B.tolist(), tokens_BS, logprobs_BS, places_T.view(B, S + 1))


class Drafter:
    """Drafts with a model's MTP layer for the engine, over the last layer of its pages.

    The state after each token is kept in `pages.states`, so the layer can continue anywhere: after a block of
    another request, after a part of a prompt, after the accepted drafts. `drafted` and `accepted` count
    tokens.
    """

    def __init__(self, model: GLM, max_drafts: int) -> None:
        if model.mtp is None:
            raise ValueError(
                "draft_tokens needs an MTP layer; this model has num_nextn_predict_layers = 0"
            )
        self.model = model
        self.max_drafts = max_drafts
        self.drafted = 0
        self.accepted = 0

    def read(self, pages: PagedCache, rows: list[Row]) -> None:
        """Let the layer read prompts that the trunk has just computed, and keep their keys."""
        spans: list[TableSpan] = []
        tokens: list[int] = []
        for row in rows:
            start = max(row.start, 1)  # slot 0 has no state before it
            if row.end > start:
                spans.append(TableSpan(row.table, start, row.end))
                tokens += row.ids[start : row.end]
        if spans:
            pages.mtp(spans, tokens, pages.states_before(spans))

    def draft(self, pages: PagedCache, rows: list[Row]) -> Tensor:
        """Draft for rows that decode: set each row's `drafts`, and its `draft_row` in the q (B, S, V) that is returned."""
        # Most drafts first, so that the rows that continue are always the first ones.
        rows = sorted(rows, key=lambda row: (-row.max_drafts, row.end - _drafter_length(row)))

        # The layer reads the tokens that came since the last time, with the trunk's states.
        spans = [TableSpan(row.table, _drafter_length(row), row.end) for row in rows]
        tokens = [token for row in rows for token in row.ids[_drafter_length(row) : row.end]]
        states_TD = pages.mtp(spans, tokens, pages.states_before(spans))
        ends = accumulate(span.stop - span.start for span in spans)
        states_BD = states_TD[[end - 1 for end in ends]]  # after the last token of each row

        distributions: list[Tensor] = []
        for step in range(rows[0].max_drafts):
            active = [row for row in rows if row.max_drafts > step]
            if step:
                # Then it reads its own drafts, with its own states.
                spans = [TableSpan(row.table, row.end + step - 1, row.end + step) for row in active]
                last_drafts = [row.drafts[-1] for row in active]
                states_BD = pages.mtp(spans, last_drafts, states_BD[: len(active)])
            q_BV = self._draft_one(active, states_BD, step)
            idle = len(rows) - len(active)
            distributions.append(F.pad(q_BV, (0, 0, 0, idle), value=1.0))
        for index, row in enumerate(rows):
            row.draft_row = index
        self.drafted += sum(row.max_drafts for row in rows)
        return torch.stack(distributions, 1)

    def _draft_one(self, rows: list[Row], states_BD: Tensor, step: int) -> Tensor:
        """Sample the next draft of each row from states (B, D), and return what it was sampled from, (B, V)."""
        sequences = [row.sequences[0] for row in rows]
        settings = SamplerSettings(sequences, states_BD.device)
        logits_BV = self.model.lm_head(states_BD)
        _, q_BV = distribution(
            logits_BV,
            settings.temperature_B,
            settings.top_p_B,
            settings.top_k_B,
            settings.min_p_B,
        )
        uniform_B = uniforms(settings.seeds_B, settings.next_index(sequences) + step, Purpose.DRAFT)
        for row, token in zip(rows, draw(q_BV, uniform_B).tolist(), strict=True):
            row.drafts.append(token)
        return q_BV


def _drafter_length(row: Row) -> int:
    """Return how many tokens of a decoding row the drafter has read."""
    return row.sequences[0].drafter_length
