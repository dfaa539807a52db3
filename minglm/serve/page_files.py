"""Provide the files of the chat page as the server sends them (no section in the paper).

`page/` has the page, its style, its scripts, and the libraries that it uses. All are read once, when the
server starts: they are 250 KB, and a path that is not among them cannot be reached. What is under `vendor/`
has its version in its path, so browsers may keep it for a year; for the rest they ask each time, by its hash.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Type by suffix. Files of other types, such as licences, are not sent."""
KEEP = "public, max-age=31536000, immutable"
ASK_FIRST = "no-cache"


class PageFile(NamedTuple):
    """A file with its headers."""

    body: bytes
    media_type: str
    etag: str
    """Changes whenever the file does."""
    cache_control: str


def read_page_files() -> dict[str, PageFile]:
    """Read all files of the page, by their path in its folder."""
    files = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix not in MEDIA_TYPES:
            continue
        name = path.relative_to(FOLDER).as_posix()
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        cache_control = KEEP if name.startswith("vendor/") else ASK_FIRST
        files[name] = PageFile(body, MEDIA_TYPES[path.suffix], etag, cache_control)
    return files
