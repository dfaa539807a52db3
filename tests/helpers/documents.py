"""Steps of the data build as functions of a list of documents, for tests of one step."""

from minglm.data.cleaning import minhash, semdedup
from minglm.data.cleaning.decontaminate import Index
from minglm.data.cleaning.exact import digest, originals
from minglm.data.cleaning.selection import DocumentRecord, best_first
from minglm.data.sources import corpus


def read_corpus(config, seed=0):
    """Return all documents of a config, without empty ones and exact copies."""
    documents = [d for d in corpus.documents(config, seed) if d.text.strip()]
    return [documents[n] for n in originals([(digest(d), d.heldout) for d in documents])]


def best_documents_first(documents):
    """Return indices of documents, the best one first, as the build orders them."""
    return best_first([DocumentRecord.of(document) for document in documents])


def near_duplicates(documents, threshold):
    """Return the documents without near duplicates."""
    values = minhash.signatures([d.text for d in documents])
    stays = minhash.keep_best(values, threshold, best_documents_first(documents))
    return [document for document, stay in zip(documents, stays, strict=True) if stay]


def semantic_duplicates(documents, threshold):
    """Return the documents without semantic duplicates."""
    values = semdedup.embed([d.text for d in documents])
    stays = semdedup.keep_best(values, threshold, best_documents_first(documents))
    return [document for document, stay in zip(documents, stays, strict=True) if stay]


def decontaminate(documents, sets):
    """Return the documents without an item of these evaluation sets."""
    found = Index(sets).search([document.text for document in documents])
    return [document for n, document in enumerate(documents) if n not in found]
