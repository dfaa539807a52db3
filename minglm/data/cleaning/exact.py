"""Find exact copies: documents with the same source and text (paper 2.2)."""

import hashlib
from collections.abc import Sequence

from minglm.data.store.documents import Document

DIGEST_BYTES = 16


def digest(document: Document) -> bytes:
    """Return sixteen bytes that two documents share exactly when they have the same source and text."""
    content = f"{document.source}\0{document.text}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def originals(records: Sequence[tuple[bytes, bool]]) -> list[int]:
    """Return the indices of the documents that are not exact copies, in order.

    A held-out document whose text is also in the training data counts as the copy.

    Args:
        records: (digest, heldout) of each document.
    """
    first: dict[bytes, int] = {}
    # Training documents come first, each kind in its own order (the sort is stable).
    for index in sorted(range(len(records)), key=lambda i: records[i][1]):
        key, _ = records[index]
        first.setdefault(key, index)
    return sorted(first.values())
