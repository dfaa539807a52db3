"""Attention over texts that share prompts and lie in one row, without padding (no section in the paper).

    row    prompt 1 | answer | answer | ... | prompt 2 | answer | ...
    out_i = sum_j P_ij v_j  as in `eager.py`, over   j in [prompt begin_i, prompt end_i)   and   j in [start_i, i]

The answers of a group have one prompt (paper 3.2), and a layer lets positions see each other in attention alone. So
the prompt passes through the model once, and each of its answers sees it. Its gradient is the sum over them, as if
each had a copy of its own.

The C form walks both ranges. `expanded` serves every other form: it copies queries, keys and values to whole texts,
attends there, and takes each position back once. Attention then costs what it did without sharing; the linear maps
and the experts, which are most of a model, are still computed once.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minglm.kernels.dispatch import Operation, select


class Text(NamedTuple):
    """A prompt and what follows it."""

    prompt: Hashable
    """Equal for texts with the same prompt."""
    prompt_length: int
    answer_length: int


class SharedPrompts(NamedTuple):
    """How texts (B, S), filled up on the right, lie in one row of T positions."""

    packed_T: Tensor
    """int64: which position of the texts, counted row by row, each position of the row is."""
    places_BS: Tensor
    """int64: where in the row each position of a text is; 0 beyond the end of the text."""
    documents_BS: Tensor
    """int32: 0 in a text and -1 beyond its end."""
    starts_T: Tensor
    """int64: the first position of its own prompt or answer, of each position of the row."""
    prompt_ranges: Tensor
    """int64 (T, 2): where the prompt of each answer begins and ends; equal in a prompt."""

    @classmethod
    def of(cls, texts: Sequence[Text], length: int) -> "SharedPrompts":
        """Lay texts into a row: each prompt before the first of its answers. length: S, at least that of each text."""
        packed: list[int] = []
        places: list[int] = []
        documents: list[int] = []
        starts: list[int] = []
        prompts: list[tuple[int, int]] = []
        known: dict[Hashable, tuple[int, int]] = {}
        for number, text in enumerate(texts):
            first = number * length  # of the text among all positions
            if text.prompt not in known:
                begin = len(packed)
                known[text.prompt] = (begin, begin + text.prompt_length)
                packed += range(first, first + text.prompt_length)
                starts += [begin] * text.prompt_length
                prompts += [(begin, begin)] * text.prompt_length

            begin = len(packed)
            prompt = known[text.prompt]
            packed += range(
                first + text.prompt_length, first + text.prompt_length + text.answer_length
            )
            starts += [begin] * text.answer_length
            prompts += [prompt] * text.answer_length

            beyond = length - text.prompt_length - text.answer_length
            places += [*range(*prompt), *range(begin, begin + text.answer_length), *[0] * beyond]
            documents += [0] * (length - beyond) + [-1] * beyond
        shape = (len(texts), length)
        return cls(
            torch.tensor(packed),
            torch.tensor(places).view(shape),
            torch.tensor(documents, dtype=torch.int32).view(shape),
            torch.tensor(starts),
            torch.tensor(prompts).view(-1, 2),
        )

    @property
    def positions_T(self) -> Tensor:
        """int64: the position of each token in its text, which rotates it."""
        return self.packed_T % self.places_BS.shape[1]

    def pack(self, x_BS: Tensor) -> Tensor:
        """Return the row (1, T, ...) of texts (B, S, ...)."""
        return x_BS.flatten(0, 1).index_select(0, self.packed_T)[None]

    def unpack(self, x_T: Tensor) -> Tensor:
        """Return texts (B, S, ...) of the row (1, T, ...)."""
        rows = x_T[0].index_select(0, self.places_BS.flatten())
        return rows.unflatten(0, self.places_BS.shape)

    def to(self, device: torch.device) -> "SharedPrompts":
        """Return the same on a device."""
        return SharedPrompts(*(x.to(device) for x in self))


def expanded(q_TNA: Tensor, k_TMA: Tensor, v_TMA: Tensor, shared: SharedPrompts) -> Tensor:
    """Compute `attention_to_prompts` of `eager.py` by the attention over whole texts: q and the result (1, T, N, A)."""
    texts = [shared.unpack(x) for x in (q_TNA, k_TMA, v_TMA)]
    attend = select(Operation.ATTENTION, q_TNA, head_dim=q_TNA.shape[3])
    return shared.pack(attend(*texts, shared.documents_BS))
