"""Audit answers by detectors that no reward uses (paper 3.4, pathologies): the judge is not the teacher.

    squeezed     bytes of the text, compressed, over its bytes                < 0.6, of 40 bytes or more: it repeats itself
    strange      mean of -log2 p(character | two before) by counts of clean text      above 99% of other clean texts
    unfinished   not a sentence: a bracket or tag of markup in it, or no full stop at its end

RL against the detectors of `rewards.pathology` may learn what they overlook. These three see other things: a
compressor knows no runs, a model of characters knows no scripts, and the grammar knows no tags by name. Each
can be wrong alone, and says so on the clean texts that it is measured on.

Choices: additive smoothing by a tenth of a count, over the characters that were seen and one for all others.
A short text has no meaningful ratio, so `squeezed` wants 40 bytes.

Simplified: one model of characters for all languages, so text that changes between two of them is strange
only where it changes.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

FLAGS = ("squeezed", "strange", "unfinished")
LEAST_BYTES = 40
LEAST_RATIO = 0.6
SMOOTHING = 0.1
ORDER = 3  # characters of an n-gram
SENTENCE = re.compile(r"[^<>\[\]{}|]*[.。!！?？]\s*")


class CharacterModel:
    """How usual the characters of a text are, by counts of trigrams of clean text.

    fitted: texts to count. calibrated: other clean texts, one in a hundred of which is strange.
    """

    def __init__(self, fitted: Iterable[str], calibrated: Sequence[str]) -> None:
        self.grams: Counter[str] = Counter()
        self.contexts: Counter[str] = Counter()
        characters = set()
        for text in fitted:
            framed = self._framed(text)
            characters.update(framed)
            for end in range(ORDER, len(framed) + 1):
                gram = framed[end - ORDER : end]
                self.grams[gram] += 1
                self.contexts[gram[:-1]] += 1
        self.kinds = len(characters) + 1
        bits = sorted(self.bits(text) for text in calibrated)
        self.bound = bits[math.ceil(0.99 * len(bits)) - 1] if bits else math.inf

    def bits(self, text: str) -> float:
        """Return the mean of -log2 of the probability of its characters and of its end."""
        framed = self._framed(text)
        total = 0.0
        for end in range(ORDER, len(framed) + 1):
            gram = framed[end - ORDER : end]
            count = self.grams[gram] + SMOOTHING
            total -= math.log2(count / (self.contexts[gram[:-1]] + SMOOTHING * self.kinds))
        return total / (len(framed) - ORDER + 1)

    @staticmethod
    def _framed(text: str) -> str:
        return "\0" * (ORDER - 1) + text + "\0"


def compression_ratio(text: str) -> float:
    """Return the compressed bytes over the bytes of a text; 1 for one without any."""
    data = text.encode("utf-8", "replace")
    return len(zlib.compress(data, 9)) / len(data) if data else 1.0


def audit(text: str, model: CharacterModel) -> dict[str, bool]:
    """Return the flags of one answer, {name: bool}: those of `FLAGS`."""
    is_long = len(text.encode("utf-8", "replace")) >= LEAST_BYTES
    return {
        "squeezed": is_long and compression_ratio(text) < LEAST_RATIO,
        "strange": model.bits(text) > model.bound,
        "unfinished": not SENTENCE.fullmatch(text.strip()),
    }
