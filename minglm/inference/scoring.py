"""Say how likely the tokens of given texts are, with the bits of the engine that drew them (paper 3.5).

    log mu(y_t), recorded when y_t was drawn    =    log pi(y_t), computed here from the same weights, bit for bit

A trainer's forward pass and an engine's add up the same numbers in other orders, so their log-probabilities
differ by rounding, and now and then by an expert. Two ways make them equal. Either the training pass and the
engine both use forms of every operation whose result for a row does not depend on the other rows; or the
values come from one computation. This is the second. In the C decoder every number of a token depends on its
own text alone (`cpu_decoder.py`), so a text that is read in one pass, beside any others, has the bits that it
had when it was drawn token by token. What the trainer adds is the
gradient: it is computed by the training pass, at activations that differ by rounding, and belongs to the same
function (`minglm.rl.exact`).

Choices. C and not slower products in PyTorch: the products of PyTorch on a CPU promise nothing about the rows
beside a row, and tiles of one fixed size make every pass slower, where this adds one pass without gradients
to an update. The blocks of the cache have to be as large as the engine's, because attention adds up block by
block.
"""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from minglm.inference.kv_cache import BLOCK_SIZE, BlockTable
from minglm.inference.pages import TableSpan, decoder_for
from minglm.inference.sampling import drawn_log_probabilities
from minglm.model.glm import GLM

TOKENS_PER_PASS = 2048
"""Most tokens of one pass, unless a single text is longer."""


class Text(NamedTuple):
    """Tokens, and which of them to score."""

    tokens: Sequence[int]
    scored: Sequence[bool]
    """False for the first token: nothing predicts it."""


class Scorer:
    """Scores texts with the C decoder. Reads the weights of the model anew in each call.

    model: float32, on a CPU. block: of the engine whose bits are wanted. Raises ValueError, one line, where
    the C decoder cannot run.
    """

    def __init__(self, model: GLM, block: int = BLOCK_SIZE) -> None:
        with torch.inference_mode():
            decoder = decoder_for(model)
        if not decoder.same_bits_in_any_batch:
            raise ValueError(
                "exact log-probabilities need the C decoder: a float32 model on a CPU, grouped-query attention, one group "
                "of experts, kernels = auto, and a C compiler"
            )
        self.pages = decoder(model, block)
        self.block = block

    @torch.inference_mode()
    def log_probabilities(self, texts: Sequence[Text], temperature: float) -> list[Tensor]:
        """Return, for each text, the log-probability of each scored token at the temperature: float32 (scored,)."""
        self.pages.read_weights()
        found: list[Tensor] = []
        waiting: list[Text] = []
        tokens = 0
        for text in texts:
            if waiting and tokens + len(text.tokens) > TOKENS_PER_PASS:
                found += self._pass(waiting, temperature)
                waiting = []
                tokens = 0
            waiting.append(text)
            tokens += len(text.tokens)
        if waiting:
            found += self._pass(waiting, temperature)
        return found

    def _pass(self, texts: Sequence[Text], temperature: float) -> list[Tensor]:
        """Score texts that are read in one pass, each in blocks of its own."""
        spans: list[TableSpan] = []
        tokens: list[int] = []
        wanted: list[int] = []  # the place before each scored token
        targets: list[int] = []
        counts: list[int] = []
        used = 0  # blocks
        for text in texts:
            length = len(text.tokens)
            scored = list(compress(range(length), text.scored))
            wanted += [len(tokens) + position - 1 for position in scored]
            targets += [text.tokens[position] for position in scored]
            counts.append(len(scored))
            tokens += text.tokens

            table = BlockTable()
            table.length = length
            needed = -(-length // self.block)
            table.blocks = list(range(used, used + needed))
            used += needed
            spans.append(TableSpan(table, 0, length))
        self.pages.begin([], used)
        _, logits_TV = self.pages.trunk(spans, tokens, wanted)
        temperature_T = torch.full((len(wanted),), float(temperature))
        logprobs_T = drawn_log_probabilities(logits_TV, temperature_T, torch.tensor(targets).long())
        return list(logprobs_T.split(counts))
