"""Answer questions by searching and opening articles, hop by hop (paper 3.3.1, web search; Figure 8).

    What is the cook in Lund's boss's phone?
        search("the cook in Lund")  ->  Ida, Omar, Eva
        open("Ida")                 ->  cook in Lund, phone->305, rival->Eva, boss->Kim, friend->Omar
        open("Kim")                 ->  smith in Bern, phone->417, rival->Omar, boss->Ida, friend->Eva
        417

Questions are made as the paper's are, by walking a graph of knowledge and obfuscating where the walk begins: nobody is
named, only described, so that the first step is a search. The difficulty h is the number of articles that hold a part
of the answer, one after the other; the shortest way takes h + 2 turns.

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

Simplification: articles are a line of facts in one form, and each question has one way to its answer.
"""

import functools
import random
from collections.abc import Sequence
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
"""Few of each, so that a small vocabulary holds them as whole words."""
RELATIONS = ("boss", "friend", "rival")
ANSWER = "phone"
"""The relation that ends every way; its values are numbers of three digits."""
REQUESTS = ("What is {}?", "Tell me {}.", "Find {}.", "I need {}.")

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
def people(seed: int) -> Library:
    """Make a graph of people: who does what where, how they are related, and their phone numbers."""
    rng = random.Random(f"people/{seed}")
    names = rng.sample(NAMES.split(), PEOPLE)
    jobs = rng.sample(JOBS.split(), 4)
    towns = rng.sample(TOWNS.split(), 4)
    pairs = [f"{job} in {town}" for job in jobs for town in towns]
    numbers = rng.sample(range(100, 1000), PEOPLE)
    order = rng.sample([*RELATIONS, ANSWER], len(RELATIONS) + 1)
    articles = {}
    links = {}
    descriptions = {}
    for name, pair, number in zip(names, rng.sample(pairs, PEOPLE), numbers, strict=True):
        others = [other for other in names if other != name]
        known = dict(zip(RELATIONS, rng.sample(others, len(RELATIONS)), strict=True))
        links[name] = known | {ANSWER: str(number)}
        facts = [f"{relation}->{links[name][relation]}" for relation in order]
        articles[name] = ", ".join([pair, *facts])
        descriptions[name] = pair
    return Library(articles, links, descriptions)


def walk(
    rng: random.Random, library: Library, hops: int, last: str | None
) -> tuple[list[str], list[str]] | None:
    """Walk along `hops` relations. Return (titles and answer, relations), or None if no way of this length was found.

    last: the relation of the last step; None: any. No article is visited twice, so that no shorter way is right by luck.
    """
    starts = list(library.descriptions)
    for _ in range(TRIES if starts else 0):
        path = [rng.choice(starts)]
        relations = []
        while len(path) <= hops:
            links = library.links[path[-1]]
            if len(path) == hops:
                choices = [r for r in links if r == last or (last is None and links[r] not in path)]
            else:
                choices = [
                    r for r in links if links[r] in library.articles and links[r] not in path
                ]
            if not choices:
                break
            relations.append(rng.choice(choices))
            path.append(links[relations[-1]])
        else:
            return path, relations
    return None


def question(
    rng: random.Random, library: Library, world: int, path: list[str], relations: list[str]
) -> tuple[list[Message], dict[str, Any]]:
    """Ask for the end of a walk. Return (messages, label).

    Label: {"world": number of the graph, "start": description of the first article, "path": titles to open and the
    answer, "relations": one for each step of the path}.
    """
    start = library.descriptions[path[0]]
    asked = "'s ".join([f"the {start}", *relations])
    label = {"world": world, "start": start, "path": path, "relations": relations}
    return [user(rng.choice(REQUESTS).format(asked))], label


class Search(Environment):
    """Questions over articles; the difficulty is the number of articles to open, 1 to 8.

    worlds: graphs that all tasks are drawn from; None: a fresh one for each task.
    """

    name = "search"
    group = "agentic"
    chance = 0.0
    max_turns = 12
    difficulties = tuple(range(1, 9))
    default_difficulties = (1, 2, 3, 4)
    shown_difficulties = (1, 2)

    def __init__(self, worlds: int | None = None) -> None:
        self.worlds = worlds

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of search and open."""
        return TOOLS

    def library(self, label: Any) -> Library:
        """Return the articles of a task."""
        return people(label["world"])

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random question as (messages, label); see `question`."""
        world = rng.randrange(self.worlds or 2**40)
        library = people(world)
        found = walk(rng, library, difficulty, ANSWER)
        assert found, "a walk of this length exists in almost every graph"
        return question(rng, library, world, *found)

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return the graph and the way through it: in other words a question is the same."""
        return [label]

    def episode(self, task: Task) -> "SearchEpisode":
        """Return a fresh episode of `task`, with its articles."""
        return SearchEpisode(task, self.max_turns, self.library(task.label))

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Search for the description, open what remains to be opened, and say the answer."""
        start = f"the {task.label['start']}"
        path = task.label["path"]
        relations = task.label["relations"]
        turn = sum(message["role"] == "assistant" for message in conversation)
        if turn == 0:
            return assistant("", f"find {start}", [("search", {"query": start})])
        place = turn - 1  # on the path
        known = f"{path[place - 1]}'s {relations[place - 1]}" if place else start
        thought = "'s ".join([f"{known}->{path[place]}", *relations[place:]])
        if place < len(relations):
            return assistant("", thought, [("open", {"title": path[place]})])
        return assistant(path[place], thought)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return all that could be an answer at once, titles, and calls without end."""
        library = self.library(task.label)
        values = [value for links in library.links.values() for value in links.values()]
        first = next(iter(library.articles))
        everything = " ".join([*values[:MOST_LISTED], task.label["path"][-1]])
        texts = [everything, ", ".join(library.articles), task.label["path"][0]]
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
