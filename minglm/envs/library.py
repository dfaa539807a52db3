"""Keep articles that can be searched and opened: what the web is to a search agent (paper 3.3.1, web search).

    score(article, query) = sum over words w of the query of
        ln(1 + (N - n_w + 0.5) / (n_w + 0.5)) * f_w * (k + 1) / (f_w + k * (1 - b + b * length / mean length))

BM25 (Robertson et al., 1994) with the usual k = 1.2 and b = 0.75: a word counts by how few of the N articles
have it (n_w) and, with falling returns, by how often it stands in this one (f_w). Equal scores keep the order
of the articles, so a search is a function of its query. An inverted index makes a search cost what its words'
articles cost.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

FREQUENCY_LIMIT = 1.2  # k
LENGTH_SHARE = 0.75  # b
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


@dataclass
class Library:
    """Articles, with an index of their words that is made by the first search."""

    articles: Mapping[str, str]
    """{title: text}."""
    links: Mapping[str, Mapping[str, str]]
    """{title: {relation: what stands in this relation to it}}, the facts of the text that questions ask for."""
    descriptions: Mapping[str, str]
    """{title: words that find this article first}, of those that a question may begin with."""

    @cached_property
    def lengths(self) -> list[int]:
        """Count the words of each article, its title included."""
        return [len(words(f"{title} {text}")) for title, text in self.articles.items()]

    @cached_property
    def places(self) -> dict[str, list[tuple[int, int]]]:
        """Index the words: {word: [(number of an article, how often it has the word)]}."""
        places = defaultdict(list)
        for number, (title, text) in enumerate(self.articles.items()):
            for word, count in Counter(words(f"{title} {text}")).items():
                places[word].append((number, count))
        return dict(places)

    def search(self, query: str, most: int) -> list[str]:
        """Return the titles of at most `most` articles that share a word with the query, the best first."""
        total = len(self.lengths)
        mean = sum(self.lengths) / max(1, total)
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(words(query)):
            places = self.places.get(word, ())
            rarity = math.log(1 + (total - len(places) + 0.5) / (len(places) + 0.5))
            for number, count in places:
                length = 1 - LENGTH_SHARE + LENGTH_SHARE * self.lengths[number] / mean
                weight = count * (FREQUENCY_LIMIT + 1) / (count + FREQUENCY_LIMIT * length)
                scores[number] += rarity * weight
        best = sorted(scores, key=lambda number: (-scores[number], number))
        titles = list(self.articles)
        return [titles[number] for number in best[:most]]
