"""Search in real text: Python's own library, or a folder of your documents, as a graph of knowledge (paper 3.3.1).

    search:python           modules and classes of the standard library; links: module, base, first and last class
    search:FOLDER           its .txt, .md and .rst files; links: the first, second and third title that a text mentions

    What is the page on coroutine wrapped's base's module?

The title of a document is the name of its file. A page is described by the two rarest words of its text that
together find it first; pages without such words begin no question. Everything else is as in `search`, the
oracle too, so these are for showing and testing what was learned on graphs of people, and for RL of a model
that reads English.

Simplification: a mention is the title as whole words, in any case; relations have no meaning but their order.
"""

import ast
import functools
import itertools
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minglm.chat.messages import Message
from minglm.common.mistakes import shown
from minglm.envs.library import Library, words
from minglm.envs.search import Search, question, walk

PREFIX = "search:"
FORM = "search:FOLDER of documents"
PYTHON = "python"
SUFFIXES = (".txt", ".md", ".rst")
ORDINALS = ("first link", "second link", "third link")
MOST_CHARACTERS = 600
"""Of a text, in an article."""
MOST_BYTES = 40_000
"""Of a module of the standard library; larger ones are left out."""
LEAST_LETTERS = 4
"""Of a word that describes a page."""


class PageSearch(Search):
    """Questions over the pages of one library.

    Raises ValueError, in one line, for a folder that gives no questions.

    name: as in the module's header.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        source = name.removeprefix(PREFIX)
        texts, links = python_pages() if source == PYTHON else document_pages(source)
        self.pages = described(texts, links)
        rng = random.Random(0)
        found = [hops for hops in (1, 2, 3, 4) if walk(rng, self.pages, hops, None)]
        if not found:
            raise ValueError(
                f"{name}: no page mentions the title of another, so nothing can be asked"
            )
        self.difficulties = self.default_difficulties = tuple(found)
        self.shown_difficulties = tuple(found[:2])

    @functools.cached_property
    def chance(self) -> float:  # type: ignore[override]
        """Return the share of the most frequent answer among two hundred questions, rounded up by two errors."""
        rng = random.Random(0)
        answers = Counter()
        for _ in range(200):
            _, label = self.draw(rng, rng.choice(self.difficulties))
            answers[label["path"][-1]] += 1
        return min(1.0, answers.most_common(1)[0][1] / 200 + 0.07)

    def library(self, label: Any) -> Library:
        """Return the pages."""
        return self.pages

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random question as (messages, label), as `Search.draw` does; there is one world."""
        found = walk(rng, self.pages, difficulty, None)
        while found is None:  # a way of this length was found when the pages were read
            found = walk(rng, self.pages, difficulty, None)
        return question(rng, self.wording, self.pages, 0, *found)


def described(texts: Mapping[str, str], links: Mapping[str, Mapping[str, str]]) -> Library:
    """Return a library of these texts with their links below, and a description of each page that has one."""
    articles = {}
    for title, text in texts.items():
        facts = [f"{relation}->{value}" for relation, value in links[title].items()]
        articles[title] = "\n".join([text[:MOST_CHARACTERS].strip(), ", ".join(facts)])
    plain = Library(articles, links, {})
    descriptions = {}
    for title, text in texts.items():
        own = set(words(title))
        candidates = {w for w in words(text[:MOST_CHARACTERS]) if w.isalpha() and w not in own}
        ranked = sorted(
            (len(plain.places[word]), word) for word in candidates if len(word) >= LEAST_LETTERS
        )
        clue = " ".join(word for _, word in ranked[:2])
        description = f"page on {clue}"
        if clue and plain.search(f"the {description}", 1) == [title]:
            descriptions[title] = description
    return Library(articles, links, descriptions)


def document_pages(folder: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Read the documents of a folder. Return {title: text} and {title: {ordinal: title mentioned}}.

    Raises ValueError for a folder that is missing or holds no text. A file that is not UTF-8 is read as far as it is.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{PREFIX}{shown(folder)}: there is no such folder")
    texts: dict[str, str] = {}
    taken = {""}
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            if not text:
                continue
            title = re.sub(r"[_\s-]+", " ", file.stem)
            place = file.relative_to(path)
            # The score ignores capitals, so a title that differs in them alone would be two documents.
            for name in (title, str(place.with_suffix("")), str(place)):
                title = name.strip()
                if title.casefold() not in taken:
                    break
            taken.add(title.casefold())
            texts[title] = text
    if not texts:
        kinds = ", ".join(SUFFIXES)
        raise ValueError(f"{PREFIX}{shown(folder)}: no {kinds} file with text in it")
    named = {tuple(words(title)): title for title in texts}
    lengths = sorted({len(name) for name in named if name}, reverse=True)
    links = {}
    for title, text in texts.items():
        mentioned = itertools.islice(mentions(words(text), named, lengths, title), len(ORDINALS))
        links[title] = dict(zip(ORDINALS, mentioned, strict=False))
    return texts, links


def mentions(
    text: Sequence[str], named: Mapping[tuple[str, ...], str], lengths: Sequence[int], own: str
) -> Iterator[str]:
    """Yield the titles that a text mentions, each once, by the place of the first mention; at one place the longest first.

    text: its words. named: {words of a title: title}. lengths: of the titles in words, the longest first. own: its title.
    """
    found = {own}
    for place in range(len(text)):
        for length in lengths:
            title = named.get(tuple(text[place : place + length]), own)
            if title not in found:
                found.add(title)
                yield title


def python_pages() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Read docstrings and classes of the standard library.

    Return {title: text} and {title: {relation: title}}.
    """
    texts: dict[str, str] = {}
    links: dict[str, dict[str, str]] = {}
    for module, tree in _modules():
        texts[module] = ast.get_docstring(tree) or ""
        links[module] = {}
        classes = []
        for node in tree.body:
            # A class that shares its name has no page: an answer must say which is meant.
            if isinstance(node, ast.ClassDef) and node.name.lower() not in map(str.lower, texts):
                classes.append(node.name)
                texts[node.name] = ast.get_docstring(node) or ""
                links[node.name] = {"module": module}
                if node.bases and isinstance(node.bases[0], ast.Name):
                    links[node.name]["base"] = node.bases[0].id
        if classes:
            links[module]["first class"] = classes[0]
            links[module]["last class"] = classes[-1]
    return texts, links


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield (name, syntax tree) of the small modules of the standard library."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        if file.stat().st_size <= MOST_BYTES:
            yield file.stem, ast.parse(file.read_text(encoding="utf-8"))
