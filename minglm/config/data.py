"""Where text comes from and how it becomes tokens (paper 2.2, 2.3)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens (paper 2.2, 2.3)."""

    tokenizer: str = ""
    """Path of a tokenizer.json to use, a released GLM one for instance; empty: train one on the corpus."""
    corpus_megabytes: float = 12.0
    """Upper bound on the text read from each built-in source."""
    files: tuple[str, ...] = ()
    """Your own data: text and code files, .jsonl, .jsonl.zst, .parquet, folders of these, hf:NAME, git:CHECKOUT."""
    stream_megabytes: float = 0.0
    """Upper bound on the text read from each data set by name; 0: all of it."""
    fim_rate: float = 0.5
    """Share of source files rewritten for fill-in-the-middle. The paper applies it to all code but gives no rate."""
    fim_characters: int = 0
    """Length of the spans rewritten for fill-in-the-middle, so that one fits into a row; 0: whole files."""
    heldout: float = 0.02
    """Share of documents kept for validation, chosen by a hash of the document's name."""
    decontaminate: int = 13
    """Words of the runs by which training documents are searched for test tasks and held-out text; 0: no search."""
    near_duplicates: float = 0.0
    """Jaccard similarity of five-word runs from which the worse of two documents goes, 0.7 for instance; 0: off."""
    semantic_duplicates: float = 0.0
    """Cosine of embeddings from which the worse of two documents goes (SemDedup), 0.95 for instance; 0: off."""
    quality: str = "rubric"
    """Score by rules (rubric), by a classifier they taught (learned), or by one taught by a .jsonl of text, label."""
    web_labels: str = ""
    """A .jsonl of text, label (1: a page that teaches code), to find such pages among those without a code tag."""
    lowest_share: float = 0.1
    """Share of prose and of each language of code that is dropped, by quality."""
    top_share: float = 0.1
    """Share that is repeated."""
    top_epochs: float = 3.0
    """How often it comes. The paper lets its best pages come more than 3.2 times."""
    educational: float = 0.0
    """Share of educational content from which mathematics and science come twice; 0: off."""
    synthetic_documents: int = 2000
    """Documents drawn from each procedural generator (mathematics, science, questions, long ledgers)."""
    trajectories: int = 2000
    """Solved tasks drawn from each environment for mid-training (sources reasoning and agent)."""
