"""Answer questions by searching and opening articles, hop by hop (paper 3.3.1, web search; Figure 8).

    What is the cook in Lund's boss's phone?
        search("the cook in Lund")  ->  Ida, Omar, Eva
        open("Ida")                 ->  cook in Lund, phone->305, rival->Eva, boss->Kim, friend->Omar
        open("Kim")                 ->  smith in Bern, phone->417, rival->Omar, boss->Ida, friend->Eva
        417

Questions are made as the paper's are, by walking a graph of knowledge and obfuscating where the walk begins:
nobody is named, only described, so that the first step is a search. The difficulty h is the number of
articles that hold a part of the answer, one after the other; the shortest way takes h + 2 turns.

    reward = 1  iff  the last message is the answer, character by character but for spaces around it and capitals

Choices
- Every task has a graph of its own, made from a number in its label. Nothing about it can be known beforehand, and
  reading is the only way. `Search(worlds=n)` draws all tasks from n graphs, to ask whether these were memorised.
- Guessing is worthless: the answer is one of 900 numbers. Each word of the description fits several people, both together
  one, and everyone has every relation, so another order of the same relations ends at another number.
- A thought resolves one relation and repeats what remains: `Ida's boss->Kim's phone`. So a turn needs the last thought
  and the last article only, however long the way is.
- A name follows a line break, an arrow or a tag, never a space, so that a small vocabulary has one word for it, not two.
  Articles are a line of plain text, and schemas are as short as JSON allows, because every prompt carries them.
- A title that does not exist is answered with a message, as on the web; the conversation goes on.
- `search:short` asks the same in single characters, with eight relations in place of three. What a relation leads to stands right
  after it there, as induction needs it; in English three tokens lie between, and small models take one of the other names
  (lesson 14; the agentic task of the toy besides the shop).

    e v.20  ->  search("e v.")  ->  U, I, G     open("U")  ->  e v.0nr1I2P3D4S5L6M7T8F     U2P0  ->  open("P")     P0rn

Simplification: articles are a line of facts in one form, and each question has one way to its answer.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import (
    Environment,
    Episode,
    Score,
    Task,
    assistant,
    no_answer,
    tool,
    user,
    verdict,
)
from minglm.envs.library import Library

NAMES = (
    "Ada Anna Ben Carl Cleo Dan Dora Eli Emil Eva Finn Gina Hans Hugo Ida Igor Jack Jana Kai Kim Lara Leo Max Mia "
    "Nora Olga Omar Otto Paul Rosa Sam Vera"
)
JOBS = "baker cook driver farmer judge miner nurse painter pilot smith teacher vet"
TOWNS = (
    "Berlin Bern Cairo Hanoi Kyiv Lima London Lund Moscow Oslo Paris Prague Rome Seoul Tokyo Vienna"
)


@dataclass(frozen=True, eq=False)
class Wording:
    """The words of questions and articles, and how they are joined."""

    names: tuple[str, ...]
    jobs: tuple[str, ...]
    towns: tuple[str, ...]
    relations: tuple[str, ...]
    answer: str
    """The relation that ends every way."""
    values: tuple[str, ...]
    """What it leads to."""
    requests: tuple[str, ...]
    """Questions, with a place for what is asked."""
    pair: str
    """A description, with places for a job and a town."""
    the: str
    """Before a description, in questions and in thoughts."""
    of: str
    """Between a person and a relation, or two relations."""
    leads: str
    """Between a relation and where it leads."""
    between: str
    """Between the facts of an article."""
    find: str
    """Before a description, in the first thought."""
    varied: bool
    """Whether each graph has an order of facts of its own, and a way may follow one relation twice."""


ENGLISH = Wording(
    names=tuple(NAMES.split()),
    jobs=tuple(JOBS.split()),
    towns=tuple(TOWNS.split()),
    relations=("boss", "friend", "rival"),
    answer="phone",
    values=tuple(map(str, range(100, 1000))),
    requests=("What is {}?", "Tell me {}.", "Find {}.", "I need {}."),
    pair="{} in {}",
    the="the ",
    of="'s ",
    leads="->",
    between=", ",
    find="find ",
    varied=True,
)
"""Few words of each kind, so that a small vocabulary holds them whole."""
SHORT = Wording(
    names=tuple("FGHIJKLMNOPQRSTU"),
    jobs=tuple("abcde"),
    towns=tuple("vwxyz"),
    relations=tuple("12345678"),
    answer="0",
    values=tuple(one + other for one in "fghijklmnopqrstu" for other in "fghijklmnopqrstu"),
    requests=("{}",),
    pair="{} {}.",
    the="",
    of="",
    leads="",
    between="",
    find="",
    varied=False,
)
"""The same in characters: letters and digits alternate, so that no tokenizer makes one token of two. A name
is no word of a description, also in lower case. A fact has one place in all articles, so that reading it is a
matter of one step back."""

PEOPLE = 12
"""Articles of a graph. Each of four jobs and each of four towns is that of about three people."""
RESULTS = 3
"""Titles that a search returns at most."""
MOST_LISTED = 100
"""Values in an answer that lists them all."""
TRIES = 50
"""Attempts to walk without coming back to an article."""


TOOLS = (tool("search", query="string"), tool("open", title="string"))


@functools.lru_cache(maxsize=1024)
def people(wording: Wording, seed: int) -> Library:
    """Make a graph of people: who does what where, how they are related, and their numbers."""
    rng = random.Random(f"people/{seed}")
    names = rng.sample(wording.names, PEOPLE)
    jobs = rng.sample(wording.jobs, 4)
    towns = rng.sample(wording.towns, 4)
    pairs = [wording.pair.format(job, town) for job in jobs for town in towns]
    values = rng.sample(wording.values, PEOPLE)
    order = [wording.answer, *wording.relations]
    if wording.varied:
        order = rng.sample([*wording.relations, wording.answer], len(order))
    articles = {}
    links = {}
    descriptions = {}
    for name, pair, value in zip(names, rng.sample(pairs, PEOPLE), values, strict=True):
        others = [other for other in names if other != name]
        related = rng.sample(others, len(wording.relations))
        known = dict(zip(wording.relations, related, strict=True))
        links[name] = known | {wording.answer: value}
        facts = [f"{relation}{wording.leads}{links[name][relation]}" for relation in order]
        articles[name] = wording.between.join([pair, *facts])
        descriptions[name] = pair
    return Library(articles, links, descriptions)


def walk(
    rng: random.Random, library: Library, hops: int, last: str | None, again: bool = True
) -> tuple[list[str], list[str]] | None:
    """Walk along `hops` relations.

    Return (titles and answer, relations), or None if no way of this length was found.

    last: the relation of the last step; None: any. again: whether a relation may be followed twice. No
    article is visited twice, and the answer is no title on the way but for capitals, which the score ignores, so
    that no shorter way is right by luck.
    """
    starts = list(library.descriptions)
    for _ in range(TRIES if starts else 0):
        path = [rng.choice(starts)]
        relations = []
        while len(path) <= hops:
            links = library.links[path[-1]]
            if len(path) == hops:
                passed = {title.casefold() for title in path}
                choices = [
                    r
                    for r in links
                    if r == last or (last is None and links[r].casefold() not in passed)
                ]
            else:
                choices = [
                    r
                    for r in links
                    if links[r] in library.articles
                    and links[r] not in path
                    and (again or r not in relations)
                ]
            if not choices:
                break
            relations.append(rng.choice(choices))
            path.append(links[relations[-1]])
        else:
            return path, relations
    return None


def question(
    rng: random.Random,
    wording: Wording,
    library: Library,
    world: int,
    path: list[str],
    relations: list[str],
) -> tuple[list[Message], dict[str, Any]]:
    """Ask for the end of a walk. Return (messages, label).

    Label: {"world": number of the graph, "start": description of the first article, "path": titles to open
    and the answer, "relations": one for each step of the path}.
    """
    start = library.descriptions[path[0]]
    asked = wording.of.join([f"{wording.the}{start}", *relations])
    label = {"world": world, "start": start, "path": path, "relations": relations}
    return [user(rng.choice(wording.requests).format(asked))], label


class Search(Environment):
    """Questions over articles; the difficulty is the number of articles to open, 1 to 8.

    worlds: graphs that all tasks are drawn from; None: a fresh one for each task. wording: of questions and
    articles. name: of the environment.
    """

    group = "agentic"
    chance = 0.0
    max_turns = 12
    difficulties = tuple(range(1, 9))
    default_difficulties = (1, 2, 3, 4)
    shown_difficulties = (1, 2)

    def __init__(
        self, worlds: int | None = None, wording: Wording = ENGLISH, name: str = "search"
    ) -> None:
        self.name = name
        self.worlds = worlds
        self.wording = wording

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of search and open."""
        return TOOLS

    def library(self, label: Any) -> Library:
        """Return the articles of a task."""
        return people(self.wording, label["world"])

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random question as (messages, label); see `question`."""
        world = rng.randrange(self.worlds or 2**40)
        library = people(self.wording, world)
        wording = self.wording
        found = walk(rng, library, difficulty, wording.answer, again=wording.varied)
        assert found, "a walk of this length exists in almost every graph"
        return question(rng, wording, library, world, *found)

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return the graph and the way through it: in other words a question is the same."""
        return [label]

    def episode(self, task: Task) -> "SearchEpisode":
        """Return a fresh episode of `task`, with its articles."""
        return SearchEpisode(task, self.max_turns, self.library(task.label))

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Search for the description, open what remains to be opened, and say the answer."""
        wording = self.wording
        start = f"{wording.the}{task.label['start']}"
        path = task.label["path"]
        relations = task.label["relations"]
        turn = sum(message["role"] == "assistant" for message in conversation)
        if turn == 0:
            return assistant("", f"{wording.find}{start}", [("search", {"query": start})])
        place = turn - 1  # on the path
        known = wording.of.join([path[place - 1], relations[place - 1]]) if place else start
        thought = wording.of.join([f"{known}{wording.leads}{path[place]}", *relations[place:]])
        if place < len(relations):
            return assistant("", thought, [("open", {"title": path[place]})])
        return assistant(path[place], thought)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return all that could be an answer at once, titles, and calls without end."""
        library = self.library(task.label)
        values = [value for links in library.links.values() for value in links.values()]
        first = next(iter(library.articles))
        everything = " ".join([*values[:MOST_LISTED], task.label["path"][-1]])
        texts = [everything, ", ".join(library.articles), *task.label["path"][:-1]]
        calls = [("search", {"query": ""}), ("open", {"title": first})]
        lazy = [assistant(text) for text in texts]
        lazy += [assistant("", None, [call]) for call in calls]
        lazy.append(assistant(everything, task.label["path"][-1], calls))
        return super().hack_probes(task) + lazy


class SearchEpisode(Episode):
    """A reader among the articles of one task."""

    def __init__(self, task: Task, max_turns: int, library: Library) -> None:
        super().__init__(task, max_turns)
        self.library = library
        self.reply: str | None = None

    async def respond(self, message: Message) -> list[Message]:
        """Run the calls of a message; a message without a call is the answer."""
        calls = message.get("tool_calls") or ()
        if not calls:
            self.reply = message["content"]
        return [
            {"role": "tool", "content": self.call(call["name"], call["arguments"])}
            for call in calls
        ]

    def call(self, name: str, arguments: dict[str, str]) -> str:
        """Return the result of one call: titles, or an article."""
        if name == "search":
            titles = self.library.search(arguments["query"], RESULTS)
            return "\n".join(titles) or "no article has these words"
        title = arguments["title"]
        return self.library.articles.get(title.strip(), "no article of this title")

    async def grade(self) -> Score:
        """Return 1 if the last message is the answer."""
        if self.reply is None:
            return no_answer()
        answer = self.task.label["path"][-1]
        return verdict(self.reply.strip().casefold() == answer.casefold())
