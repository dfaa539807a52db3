"""Check samplers and verifiers of drafts against their definition (paper 2.1; sampler settings of 4).

    from minglm.testing.inference import check_sampler, check_verifier
    check_sampler(my_sample)

With evenly spaced uniform numbers in place of random ones, the share of them that gives a token is its
probability, up to the spacing. The distribution is enumerated, not estimated, so a failure is a fault and
never bad luck.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from minglm.inference import Engine, Request
from minglm.inference.scoring import Text
from minglm.model.glm import GLM
from minglm.testing.model import tiny_model
from minglm.testing.strategies import holds, numbers, seeds

GRID = 1000  # uniform numbers for each distribution

Sampler = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Score = Callable[[GLM, Sequence[Text], float], list[Tensor]]
"""(model, texts, temperature) -> the log-probability of each scored token of each text."""
Verifier = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def distribution(logits: list[float], temperature: float, top_p: float) -> list[float] | None:
    """Return the probabilities a sampler must have, over the vocabulary, from the definition in plain Python.

    None if rounding decides what is in the nucleus.
    """
    largest = max(logits)
    weights = [math.exp((x - largest) / temperature) for x in logits]
    p = [weight / sum(weights) for weight in weights]
    kept: list[int] = []
    mass = 0.0
    most_likely_first = sorted(range(len(p)), key=lambda v: (-p[v], v))
    for v in most_likely_first:
        if mass >= top_p and kept:
            break
        kept.append(v)
        mass += p[v]
        if abs(mass - top_p) < 1e-5 and top_p < 1:
            return None
    return [x / mass if v in kept else 0.0 for v, x in enumerate(p)]


def check_sampler(sample: Sampler) -> None:
    """Check `sample(logits_BV, temperature_B, top_p_B, uniform_B) -> (tokens_B, logprobs_B)`.

    logits float32 (B, V); temperature and top_p float32 (B,); uniform float64 (B,) in [0, 1); tokens int64
    (B,) and log-probabilities float32 (B,). The tokens follow the softmax at the temperature, cut to the
    nucleus and normalised again; the log-probability is that of the softmax before the cut; temperature 0
    takes the largest logit, the first of equals, whatever the uniform number; rows do not influence each
    other. Raises AssertionError for a property that fails.
    """

    @holds(
        seed=seeds,
        V=st.integers(1, 6),
        temperature=st.floats(0.2, 3),
        top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.0]),
    )
    def enumerated(seed: int, V: int, temperature: float, top_p: float) -> None:
        """Give each token its share of a fine grid of uniform numbers."""
        logits_V = (2 * torch.randn(V, generator=numbers(seed))).round(decimals=2)
        expected = distribution(logits_V.double().tolist(), temperature, top_p)
        if expected is None:
            return
        grid_B = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
        temperature_B = torch.full((GRID,), temperature)
        top_p_B = torch.full((GRID,), top_p)
        tokens_B, logprobs_B = sample(logits_V.expand(GRID, V), temperature_B, top_p_B, grid_B)
        counts = torch.bincount(tokens_B, minlength=V).tolist()
        for v, (count, p) in enumerate(zip(counts, expected, strict=True)):
            # An interval of length p holds p * GRID points of the grid, give or take one at each end.
            assert abs(count - p * GRID) <= 2, (
                f"token {v}: {count} of {GRID} draws, probability {p:.4f}"
            )
            assert p or not count, f"token {v} is outside the nucleus and was drawn"
        full_V = (logits_V.double() / temperature).log_softmax(0)
        # float32 logits up to 40
        torch.testing.assert_close(logprobs_B.double(), full_V[tokens_B], atol=1e-5, rtol=0)

    @holds(V=st.integers(2, 6), temperature=st.floats(0.2, 3), top_p=st.sampled_from([1.0, 0.5]))
    def impossible_tokens(V: int, temperature: float, top_p: float) -> None:
        """Never draw a token of probability 0, not even with the smallest uniform number."""
        for possible in range(V):
            logits_BV = torch.full((1, V), -math.inf)
            logits_BV[0, possible] = 0.0
            for number in (0.0, 0.5):
                temperature_B = torch.tensor([float(temperature)])
                top_p_B = torch.tensor([float(top_p)])
                uniform_B = torch.tensor([number], dtype=torch.float64)
                tokens_B, logprobs_B = sample(logits_BV, temperature_B, top_p_B, uniform_B)
                assert tokens_B[0] == possible and logprobs_B[0] == 0, (
                    f"drew {tokens_B[0]} of probability 0"
                )

    @holds(seed=seeds, B=st.integers(1, 5), V=st.integers(1, 6))
    def greedy_and_mixed(seed: int, B: int, V: int) -> None:
        """Sample rows of all settings in one batch as if each were alone; greedy rows are deterministic."""
        # Whole numbers, so that ties for the largest are common.
        logits_BV = torch.randn(B, V, generator=numbers(seed)).round()
        temperature_B = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0])[:B]
        top_p_B = torch.tensor([1.0, 0.7, 1.0, 0.3, 0.95])[:B]
        uniform_B = torch.rand(B, generator=numbers(seed + 1), dtype=torch.float64)
        tokens_B, logprobs_B = sample(logits_BV, temperature_B, top_p_B, uniform_B)
        for b in range(B):
            one = slice(b, b + 1)
            alone = sample(logits_BV[one], temperature_B[one], top_p_B[one], uniform_B[one])
            assert tokens_B[b] == alone[0][0], "a row's token depends on the other rows"
            torch.testing.assert_close(logprobs_B[b], alone[1][0])
            if temperature_B[b] == 0:
                row = logits_BV[b].tolist()
                assert tokens_B[b] == row.index(max(row)), (
                    "temperature 0 must take the first of the largest logits"
                )
                expected = logits_BV[b].log_softmax(0)[tokens_B[b]]
                torch.testing.assert_close(logprobs_B[b], expected)


def check_verifier(verify: Verifier) -> None:
    """Check `verify(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B) -> (accepted_B, tokens_B)`.

    p float (B, S + 1, V); q float (B, S, V); drafts int64 (B, S); lengths int64 (B,); accept float64 (B, S)
    and last float64 (B,) in [0, 1); accepted and tokens int64 (B,). Enumerated over a vocabulary of up to
    four: all drafts, and evenly spaced numbers in place of random ones. The accepted drafts and the token
    after them have the probability that the target gives them, and so has each token of a row with fewer
    drafts than its neighbours. Raises AssertionError for a property that fails.
    """

    @holds(
        seed=seeds,
        S=st.integers(0, 2),
        V=st.integers(2, 4),
        zeros=st.booleans(),
        temperature=st.sampled_from([0.5, 1, 2]),
    )
    def exact(seed: int, S: int, V: int, zeros: bool, temperature: float) -> None:
        """Make every prefix of S + 1 tokens as likely as the target says, whatever was drafted."""
        V = min(V, 2) if S > 1 else V

        def probabilities(offset: int) -> Tensor:
            logits = torch.randn(S + 1, V, generator=numbers(seed + offset))
            return logits.mul(2 / temperature).softmax(-1)

        p = probabilities(0)
        q = probabilities(1)
        if zeros:  # a greedy target, and drafts that a cut has left out
            p[0] = torch.eye(V)[seed % V]
            q[0, 0] = 0.0
        q = q[:S] / q[:S].sum(1, keepdim=True)

        # All drafts, each with every point of a grid of uniform numbers.
        points = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in [12] * S + [24]]
        uniform = torch.cartesian_prod(*points).view(-1, S + 1)
        drafts = torch.tensor(list(itertools.product(range(V), repeat=S))).long().view(V**S, S)
        B = len(uniform) * len(drafts)
        drafts_BS = drafts.repeat_interleave(len(uniform), 0)
        uniform_BS = uniform.repeat(len(drafts), 1)
        p_BSV = p.expand(B, -1, -1) * 2  # not normalised
        q_BSV = q.expand(B, -1, -1) * 3
        lengths_B = torch.full((B,), S)
        accepted_B, tokens_B = verify(
            p_BSV, q_BSV, drafts_BS, lengths_B, uniform_BS[:, :S], uniform_BS[:, S]
        )

        # The probability of each token at each position, and of reaching that position.
        weight_B = q[torch.arange(S), drafts_BS].double().prod(1) / len(uniform)
        found = torch.zeros(S + 1, V, dtype=torch.float64)
        reached = torch.zeros(S + 1, dtype=torch.float64)
        for i in range(S + 1):
            token_B = torch.where(accepted_B > i, F.pad(drafts_BS, (0, 1))[:, i], tokens_B)
            here_B = weight_B * (accepted_B >= i)
            found[i].index_add_(0, token_B, here_B)
            reached[i] = here_B.sum()
        # A threshold lies within half a step of where the points say, in each of S + 1 numbers.
        for i in range(S + 1):
            error = (found[i] - reached[i] * p[i]).abs().max()
            assert error < (i + 1) / 24 + 1 / 48, (
                f"token {i}: {found[i].tolist()}, expected {(reached[i] * p[i]).tolist()}"
            )
        assert not (found[0][p[0] == 0] > 0).any(), "a token of probability 0 was accepted"

    @holds(seed=seeds, V=st.integers(2, 5))
    def rows_have_their_own_lengths(seed: int, V: int) -> None:
        """Give a row with fewer drafts what it gets alone."""
        p_BSV = torch.rand(3, 3, V, generator=numbers(seed + 3))
        q_BSV = torch.rand(3, 2, V, generator=numbers(seed + 2))
        drafts_BS = torch.randint(0, V, (3, 2), generator=numbers(seed))
        lengths_B = torch.tensor([0, 1, 2])
        uniform = torch.rand(3, 3, generator=numbers(seed + 9), dtype=torch.float64)
        accept_BS = uniform[:, :2]
        last_B = uniform[:, 2]
        accepted_B, tokens_B = verify(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B)
        for b, n in enumerate(lengths_B.tolist()):
            one = slice(b, b + 1)
            alone_accepted_B, alone_tokens_B = verify(
                p_BSV[one, : n + 1],
                q_BSV[one, :n],
                drafts_BS[one, :n],
                lengths_B[one],
                accept_BS[one, :n],
                last_B[one],
            )
            assert accepted_B[b] == alone_accepted_B[0], "a row depends on the others"
            assert tokens_B[b] == alone_tokens_B[0], "a row depends on the others"


def check_scorer(score: Score) -> None:
    """Check `score(model, texts, temperature)`, like that of `minglm.inference.scoring.Scorer`.

    What the engine recorded while it drew a token is what the score of the whole text says, to the last bit:
    for any lengths of prompts and answers, however a prompt was cut, with drafts and without, whatever shares
    the batch, and for answers that continue an earlier text.
    """

    @holds(
        shrink=False,
        seed=seeds,
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
        temperature=st.sampled_from([1.0, 0.7, 1.3]),
        top_p=st.sampled_from([1.0, 0.8]),
        drafts=st.sampled_from([0, 2]),
        cut=st.sampled_from([5, 2048]),
    )
    def same_bits(
        seed: int,
        lengths: list[int],
        temperature: float,
        top_p: float,
        drafts: int,
        cut: int,
    ) -> None:
        """Draw answers, continue the first one after tokens from elsewhere, and score all texts."""
        model = tiny_model(seed)
        engine = Engine(model, draft_tokens=drafts, prefill_tokens=cut)
        requests = []
        for i, length in enumerate(lengths):
            prompt = torch.randint(0, 24, (length,), generator=numbers(seed + i)).tolist()
            # The seed of the model, and not 0, so that the first draws of two examples differ.
            requests.append(Request(prompt, 9, temperature, top_p, seed + i, stop_ids=()))
        answers = engine.generate(requests)
        texts = []
        for request, answer in zip(requests, answers, strict=True):
            scored = [False] * len(request.prompt) + [True] * len(answer.tokens)
            texts.append(Text(request.prompt + answer.tokens, scored))
        recorded = [answer.logprobs for answer in answers]

        longer = Request([*texts[0].tokens, 1, 2, 3], 9, temperature, top_p, seed, stop_ids=())
        (answer,) = engine.generate([longer])
        scored = [*texts[0].scored, False, False, False] + [True] * len(answer.tokens)
        texts[0] = Text(longer.prompt + answer.tokens, scored)
        recorded[0] = recorded[0] + answer.logprobs

        found = score(model, texts, temperature)
        for number, (expected, logprobs_T) in enumerate(zip(recorded, found, strict=True)):
            assert logprobs_T.tolist() == expected, f"text {number} of {len(texts)}"
