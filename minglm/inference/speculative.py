"""Drafts from the MTP layer, and the test that makes them cost nothing in quality (paper 2.1; arXiv 2211.17192).

    draft x_i ~ q_i;   accept while u_i < min(1, p_i(x_i) / q_i(x_i));   at the first rejection draw from
    max(0, p_i - q_i), normalised;   after n accepted drafts draw one more, the bonus, from p_{n+1}

p is what the trunk would have drawn from, after temperature and cuts; q the same of the MTP layer. A draft x is kept
with probability min(p, q), and what is missing up to p comes from the rejections, so the tokens follow p exactly,
whatever q is: a bad draft costs time and nothing else.

GLM-4.5 has one MTP layer and applies it repeatedly: its own state takes the place of the trunk's for the next draft.
Released engines differ in whether that is the state before or after `shared_head.norm`; here it is after, like the
trunk's. The layer's key for token s (and the state before it) is kept in slot s, so a slot depends on the text up to
its token and on nothing later, and blocks can be shared; slot 0 has no state before it and is never read.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from minglm.inference.kv_cache import Table
from minglm.inference.sampling import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    Settings,
    distribution,
    draw,
    uniforms,
)


def verify(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B):
    """How many drafts of each row stand, and the token after them.

    p (B, S + 1, V): what to follow, at each draft and after the last; q (B, S, V): what the drafts int64 (B, S) were
    drawn from; neither has to be normalised. lengths int64 (B,): how many drafts a row has. accept (B, S), last (B,):
    uniform numbers. Returns accepted int64 (B,) and tokens int64 (B,).
    """
    B, S, V = q_BSV.shape
    p_BSV = p_BSV.double() / p_BSV.double().sum(-1, keepdim=True)
    q_BSV = q_BSV.double() / q_BSV.double().sum(-1, keepdim=True)
    p_BS, q_BS = (x.gather(2, drafts_BS[..., None])[..., 0] for x in (p_BSV[:, :S], q_BSV))
    index_S = torch.arange(S, device=p_BSV.device)
    stands_BS = (accept_BS * q_BS < p_BS) & (index_S < lengths_B[:, None])
    accepted_B = stands_BS.long().cumprod(1).sum(1)
    rows = torch.arange(B, device=p_BSV.device)
    target_BV = p_BSV[rows, accepted_B]
    rejected_B = accepted_B < lengths_B
    if S:
        rest_BV = (target_BV - q_BSV[rows, accepted_B.clamp(max=S - 1)]).clamp(min=0)
        rest_BV = torch.where(
            rest_BV.sum(1, keepdim=True) > 0, rest_BV, target_BV
        )  # p = q: never rejected but by rounding
        target_BV = torch.where(rejected_B[:, None], rest_BV, target_BV)
    return accepted_B, draw(target_BV, last_B)


def check(entries, logits_TV, q_BSV, settings):
    """Verify the drafts of a pass.

    entries: (sequence, row, place of its first logits); logits (T, V); q of `Drafter.draft`, None without drafts.
    Returns how many drafts stand (list), tokens int64 (B, S + 1), of which that many and one more count, and the
    probabilities before the cuts (B, S + 1, V).
    """
    device, B = logits_TV.device, len(entries)
    S = 0 if q_BSV is None else q_BSV.shape[1]
    lengths_B = torch.tensor([len(row.drafts) for _, row, _ in entries], device=device)
    places = torch.tensor(
        [at + min(i, len(row.drafts)) for _, row, at in entries for i in range(S + 1)],
        device=device,
    )
    drafts_BS = torch.tensor(
        [row.drafts + [0] * (S - len(row.drafts)) for _, row, _ in entries], device=device
    )
    drafts_BS = drafts_BS.view(B, S).long()
    columns = (settings.temperature_B, settings.top_p_B, settings.top_k_B, settings.min_p_B)
    columns = [None if x is None else x.repeat_interleave(S + 1) for x in columns]
    p_BSV, cut_BSV = (x.view(B, S + 1, -1) for x in distribution(logits_TV[places], *columns))
    if S:
        ones = torch.ones_like(q_BSV[:1])
        own = [row.draft if row.drafts else len(q_BSV) for _, row, _ in entries]
        q_BSV = torch.cat((q_BSV, ones))[own]
    else:
        q_BSV = cut_BSV[:, :0]
    index_B = settings.index([sequence for sequence, _, _ in entries])
    step_S = torch.arange(S, device=device)
    accept_BS = uniforms(settings.seeds_B[:, None], index_B[:, None] + step_S, ACCEPT)
    last_B = uniforms(settings.seeds_B, index_B, RESIDUAL)
    accepted_B, tokens_B = verify(cut_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B)
    tokens_BS = F.pad(drafts_BS, (0, 1)).scatter_(1, accepted_B[:, None], tokens_B[:, None])
    return accepted_B.tolist(), tokens_BS, p_BSV


@dataclass
class Span:
    """Slots `start` to `stop` of a table, in a pass of the MTP layer."""

    table: Table
    start: int
    stop: int


class Drafter:
    """Drafts with a model's MTP layer for the engine, over the last of its pages.

    The state after each token is kept in `pages.states`, so that the layer can begin wherever a text goes on: after a
    block of another request, after a part of a prompt, after the drafts that were accepted.
    """

    def __init__(self, model, most):
        if model.mtp is None:
            raise ValueError(
                "draft_tokens needs an MTP layer; this model has num_nextn_predict_layers = 0"
            )
        self.model, self.most = model, most
        self.drafted = self.accepted = 0

    def read(self, pages, rows):
        """Let the layer read prompts that the trunk has just computed, and keep their keys."""
        spans = [Span(row.table, max(row.start, 1), row.end) for row in rows if row.end > 1]
        if spans:
            tokens = [t for row in rows for t in row.ids[max(row.start, 1) : row.end]]
            self._pass(pages, spans, tokens, None)

    def draft(self, pages, rows):
        """Draft for rows that decode: sets `row.drafts` and `row.draft`, the place in what is returned, q (B, S, V).

        First the layer reads the tokens that came since the last time, with the trunk's states; then its own.
        """
        rows = sorted(rows, key=lambda row: (-row.room, row.end - row.draws[0].read))
        spans = [Span(row.table, row.draws[0].read, row.end) for row in rows]
        states_TD = self._pass(
            pages, spans, [t for row in rows for t in row.ids[row.draws[0].read : row.end]], None
        )
        ends = list(accumulate(span.stop - span.start for span in spans))
        states_BD, found = states_TD[[end - 1 for end in ends]], []
        for step in range(rows[0].room):
            active = [row for row in rows if row.room > step]
            if step:
                spans = [Span(row.table, row.end + step - 1, row.end + step) for row in active]
                states_BD = self._pass(
                    pages, spans, [row.drafts[-1] for row in active], states_BD[: len(active)]
                )
            sequences = [row.draws[0] for row in active]
            s = Settings(sequences, states_BD.device)
            q_BV = distribution(
                self.model.lm_head(states_BD), s.temperature_B, s.top_p_B, s.top_k_B, s.min_p_B
            )[1]
            tokens_B = draw(q_BV, uniforms(s.seeds_B, s.index(sequences) + step, DRAFT))
            for row, token in zip(active, tokens_B.tolist(), strict=True):
                row.drafts.append(token)
            found.append(F.pad(q_BV, (0, 0, 0, len(rows) - len(active)), value=1.0))
        for place, row in enumerate(rows):
            row.draft = place
        self.drafted += sum(row.room for row in rows)
        return torch.stack(found, 1)

    def _pass(self, pages, spans, tokens, states_TD):
        """One pass of the layer over these tokens and the states before them; by default the trunk's. States (T, D)."""
        return pages.mtp(
            spans, tokens, pages.states_before(spans) if states_TD is None else states_TD
        )
