"""Options of the data: where text comes from and how it becomes tokens (paper 2.2, 2.3)."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from minglm.config.options import positive, share

SHORTEST_SEARCH = 8
"""Words of a run below which decontamination would remove innocent text too."""


class Quality(StrEnum):
    """Named ways to score the quality of a document; the path of a .jsonl file of labels is a third."""

    RUBRIC = "rubric"
    """Rules written by hand."""
    LEARNED = "learned"
    """A classifier trained on documents that the rubric has scored."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens (paper 2.2, 2.3)."""

    tokenizer: str = ""
    """Path of a tokenizer.json to use, for instance a released GLM one; empty: train one on the corpus."""
    corpus_megabytes: float = positive(12.0)
    """Upper bound on the text read from each built-in source."""
    files: tuple[str, ...] = ()
    """Your own data: text and code files, .jsonl, .jsonl.zst, .parquet, folders of these, hf:NAME, git:CHECKOUT."""
    stream_megabytes: float = 0.0
    """Upper bound on the text read from each data set given by name; 0: all of it."""
    fim_rate: float = share(0.5)
    """Share of source files rewritten for fill-in-the-middle. The paper applies it to all code but gives no rate."""
    fim_characters: int = 0
    """Length of the spans rewritten for fill-in-the-middle, so that one fits into a row; 0: whole files."""
    heldout: float = share(0.02)
    """Share of documents kept for validation, chosen by a hash of the document's name."""
    decontaminate: int = 13
    """Words of the runs by which training documents are compared with test tasks and held-out text; 0: off."""
    near_duplicates: float = share(0.0)
    """Jaccard similarity of five-word runs above which the worse of two documents is dropped, such as 0.7; 0: off."""
    semantic_duplicates: float = share(0.0)
    """Cosine of embeddings above which the worse of two documents is dropped (SemDedup), such as 0.95; 0: off."""
    quality: str = Quality.RUBRIC
    """Score documents by rules (rubric), by a classifier trained on these scores (learned), or by a
    classifier trained on a .jsonl file of text and label."""
    web_labels: str = ""
    """A .jsonl file of text and label (1: a page that teaches code), to find such pages among those without code tags."""
    lowest_share: float = 0.1
    """Share of prose, and of each language of code, that is dropped for its quality."""
    top_share: float = 0.1
    """Share of the best documents, which are repeated."""
    top_epochs: float = 3.0
    """How often the best documents are used. The paper uses its best pages more than 3.2 times."""
    educational: float = share(0.0)
    """Share of educational content above which mathematics and science are used twice; 0: off."""
    synthetic_documents: int = 2000
    """Documents drawn from each procedural generator (mathematics, science, questions, long ledgers)."""
    trajectories: int = 2000
    """Solved tasks drawn from each environment for mid-training (sources tasks:ENVIRONMENT)."""

    def check(self) -> None:
        """Raise ValueError, in one line, where fields do not fit together."""
        if 0 < self.decontaminate < SHORTEST_SEARCH:
            raise ValueError(
                f"data.decontaminate = {self.decontaminate}: shorter runs of words occur in innocent text too; "
                f"use {SHORTEST_SEARCH} to 13, or 0 to turn the search off"
            )
        if self.lowest_share + self.top_share > 1:
            raise ValueError(
                f"data.lowest_share = {self.lowest_share} and data.top_share = {self.top_share}: "
                "must sum to at most 1"
            )
        if self.quality not in list(Quality) and not Path(self.quality).is_file():
            raise ValueError(
                f"data.quality = {self.quality!r}: must be rubric, learned, or the path of a .jsonl file of labels"
            )
