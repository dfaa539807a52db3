"""Search: the index ranks as the formula says, the graph has one way to an answer, and only the answer is paid."""

import collections
import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant, user
from minglm.envs.library import FREQUENCY_LIMIT, LENGTH_SHARE, Library, words
from minglm.envs.pages import PageSearch
from minglm.envs.search import ENGLISH, PEOPLE, RESULTS, SHORT, Search, people, walk
from minglm.testing.envs import check_chance, check_lazy_answers, play
from minglm.testing.strategies import seeds

SEARCH = Search()
WORDINGS = {"English": ENGLISH, "short": SHORT}
TEXTS = st.lists(st.sampled_from(["ab", "cd", "ef", "gh", "ij"]), max_size=8).map(" ".join)


def bm25(articles, query):
    """Score every article by the formula, word by word, without an index."""
    documents = [words(f"{title} {text}") for title, text in articles.items()]
    mean = sum(map(len, documents)) / len(documents)
    scores = dict.fromkeys(articles, 0.0)
    for word in set(words(query)):
        having = sum(word in document for document in documents)
        rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        for title, document in zip(articles, documents, strict=True):
            count = document.count(word)
            length = 1 - LENGTH_SHARE + LENGTH_SHARE * len(document) / mean
            scores[title] += (
                rarity * count * (FREQUENCY_LIMIT + 1) / (count + FREQUENCY_LIMIT * length)
            )
    return scores


@given(st.dictionaries(st.sampled_from("pqrstu"), TEXTS, min_size=1), TEXTS, st.integers(1, 7))
def test_search_ranks_by_bm25(articles, query, most):
    """The index finds the articles with a score above 0, the highest first, and equal ones in the order they are kept."""
    scores = bm25(articles, query)
    found = Library(articles, {}, {}).search(query, most)
    assert len(found) == min(most, sum(score > 0 for score in scores.values()))
    assert set(found) <= {title for title in articles if scores[title] > 0}
    order = sorted(articles, key=lambda title: -round(scores[title], 9))
    assert [round(scores[title], 9) for title in found] == [
        round(scores[title], 9) for title in order[: len(found)]
    ]
    places = [list(articles).index(title) for title in found]
    for this, after, one, other in zip(found, found[1:], places, places[1:], strict=False):
        assert scores[this] > scores[after] + 1e-9 or one < other or scores[this] != scores[after]


@pytest.mark.parametrize("wording", WORDINGS.values(), ids=WORDINGS)
@given(seed=seeds)
def test_each_half_of_a_description_fits_several_people(wording, seed):
    """Together the halves fit one: the first result of a search for it. So neither word alone is enough to guess."""
    library = people(wording, seed)
    for title, text in library.articles.items():
        assert text.startswith(library.descriptions[title])
    assert len(set(library.descriptions.values())) == PEOPLE == len(library.articles)
    for place in (0, -1):
        halves = collections.Counter(words(text)[place] for text in library.descriptions.values())
        assert len(halves) <= 4 and sum(count > 1 for count in halves.values()) >= 3
    for title, description in library.descriptions.items():
        assert library.search(description, RESULTS)[0] == title


@given(seeds, st.sampled_from(SEARCH.difficulties))
def test_the_question_names_the_way_and_nobody_on_it(seed, hops):
    """Its relations, followed from the person described, end at the answer; titles and answer are not in the prompt."""
    task = SEARCH.task(seed, seed, difficulties=(hops,))
    library = SEARCH.library(task.label)
    prompt = task.messages[-1]["content"]
    start, *relations = prompt.rstrip(".?").split("the ")[1].split("'s ")
    (here,) = [t for t, text in library.articles.items() if text.startswith(f"{start},")]
    for relation in relations:
        assert f"{relation}->{library.links[here][relation]}" in library.articles[here]
        here = library.links[here][relation]
    assert here == task.label["path"][-1] and len(relations) == hops
    assert not {here, *library.articles} & set(prompt.rstrip(".?").split())


@given(seeds, st.sampled_from(SEARCH.difficulties))
def test_the_shortest_way_takes_two_turns_more_than_hops(seed, hops):
    """A search, an article for each hop, the answer; with one turn less the episode ends unpaid."""
    task = SEARCH.task(seed, seed, difficulties=(hops,))
    turns = [m for m in SEARCH.demonstrate(task) if m["role"] == "assistant"]
    assert len(turns) == hops + 2
    hasty = Search()
    hasty.max_turns = hops + 1
    played = play(hasty, task, turns)
    assert played.done and played.score.value == 0


@pytest.mark.parametrize(
    ("text", "value"), [("{}", 1), (" {}\n", 1), ("{}.", 0), ("0{}", 0), ("{} {}", 0), ("", 0)]
)
def test_the_answer_is_compared_whole(text, value):
    """Spaces around the number are ignored, and nothing else."""
    task = SEARCH.task(0, 0)
    answer = task.label["path"][-1]
    assert play(SEARCH, task, [assistant(text.format(answer, answer))]).score.value == value


def test_a_title_or_a_word_that_does_not_exist_is_a_message():
    """The conversation goes on after it, and the answer is still paid."""
    task = SEARCH.task(0, 0, difficulties=(1,))
    lost = [("open", {"title": "Nobody"}), ("search", {"query": "?"}), ("open", {"title": ""})]
    turns = [m for m in SEARCH.demonstrate(task) if m["role"] == "assistant"]
    played = play(SEARCH, task, [assistant("", None, lost), *turns])
    texts = [message["content"] for message in played.replies[0]]
    assert texts == ["no article of this title", "no article has these words", texts[0]]
    assert played.score.value == 1


def test_tasks_of_few_worlds_are_questions_of_those():
    """Search(worlds=3) asks about three graphs, in every split, and the splits share no question."""
    few = Search(worlds=3)
    asked = {}
    for split in ("train", "test"):
        tasks = few.tasks(60, 0, split)
        assert {task.label["world"] for task in tasks} == {0, 1, 2}
        asked[split] = {str(task.label) for task in tasks}
    assert not asked["train"] & asked["test"]


class NamesThem(Search):
    """A right title on the way is as good as the answer, so a search without reading pays."""

    def episode(self, task):
        episode = super().episode(task)
        grade = episode.grade

        async def lenient():
            if episode.reply and episode.reply in task.label["path"]:
                episode.reply = task.label["path"][-1]
            return await grade()

        episode.grade = lenient
        return episode


class Named(Search):
    """The same graph and the same question for every task, so that one answer is right everywhere."""

    def draw(self, rng, difficulty):
        label = {"world": 0, "start": "?", "path": ["?", "417"], "relations": [ENGLISH.answer]}
        return [user(f"What is it? {rng.random()}")], label

    def problem(self, messages, label):
        return [messages]

    def oracle(self, task, conversation, rng):
        return assistant("417", "417")


def test_broken_twins_are_refused():
    """The contract finds an answer that is too easy: a title on the way, or one number for every question."""
    with pytest.raises(AssertionError, match="earns"):
        check_lazy_answers(NamesThem())
    with pytest.raises(AssertionError, match="everywhere"):
        check_chance(Named())


@pytest.mark.parametrize("wording", WORDINGS.values(), ids=WORDINGS)
def test_relations_of_a_person_differ(wording):
    """Boss, friend and rival are three people, none of them oneself; a wrong relation leads elsewhere."""
    for seed in range(50):
        for title, links in people(wording, seed).links.items():
            related = {links[name] for name in wording.relations}
            assert len(related | {title}) == len(wording.relations) + 1


@given(seeds)
def test_a_short_way_follows_no_relation_twice(seed):
    """So what remains of a question follows from the relation that was read last. English ways may repeat one."""
    for hops in SEARCH.difficulties:
        path = ENVIRONMENTS["search:short"].task(seed, seed, difficulties=(hops,)).label
        assert len(set(path["relations"])) == hops == len(path["path"]) - 1


@given(st.integers(0, 10**6), seeds)
def test_a_short_conversation_says_the_same_as_an_english_one(index, seed):
    """Each relation in the question, read in the article that was opened, leads to the next call, or is the answer."""
    short = ENVIRONMENTS["search:short"]
    task = short.task(index, seed)
    conversation = short.demonstrate(task)
    start, relations = task.messages[0]["content"].split(".")
    opened = [m["content"] for m in conversation if m["role"] == "tool"][1:]
    assert opened[0].startswith(f"{start}.") and re.fullmatch("[1-8]*0", relations)
    said = [m["tool_calls"][0]["arguments"] for m in conversation[5::2] if m.get("tool_calls")]
    reached = [call["title"] for call in said] + [conversation[-1]["content"]]
    for relation, article, value in zip(relations, opened, reached, strict=True):
        assert re.search(rf"[.A-Za-z]{relation}{value}", article)


def write(folder, **texts):
    """Write texts as documents; return the name of the environment over them."""
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return f"search:{folder}"


def drawn(env, hops):
    """Return a task of any split: which has the few questions of a small folder depends on the folder's name."""
    return env.made(*env.draw(random.Random(0), hops), hops)


def test_documents_are_linked_by_the_titles_they_mention(tmp_path):
    """In the order of the first mention, as whole words in any case, never to themselves."""
    name = write(
        tmp_path,
        iron_age="The iron age began with furnaces. Bronze, then THE WHEEL, then bronze again.",
        bronze="Copper and tin make bronze. Wheels are another matter.",
        the_wheel="Potters turned the wheel before carts had one, in the iron age.",
    )
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", bronze="Another page of this name.")
    env = PageSearch(name)
    links = env.library(None).links
    assert links["more/bronze"] == {}
    assert links["iron age"] == {"first link": "bronze", "second link": "the wheel"}
    assert links["bronze"] == {} and links["the wheel"] == {"first link": "iron age"}
    assert env.difficulties == (1, 2)
    for hops in env.difficulties:
        task = drawn(env, hops)
        conversation = env.demonstrate(task)
        assert play(env, task, conversation[1::2]).score.value == 1
        assert len(conversation[1::2]) == hops + 2


def test_no_way_ends_at_a_title_that_it_passed_but_for_capitals():
    """Or the title that a search finds would be paid: a module abc, whose class has the base ABC."""
    links = {"abc": {"first class": "X"}, "X": {"base": "ABC", "module": "Abc"}}
    library = Library({"abc": "letters", "X": "one"}, links, {"abc": "letters"})
    assert walk(random.Random(0), library, 2, None) is None
    links["X"]["base"] = "ABCD"
    assert walk(random.Random(0), library, 2, None) == (
        ["abc", "X", "ABCD"],
        ["first class", "base"],
    )


def test_titles_of_documents_differ_by_more_than_capitals_and_spaces_around_them(tmp_path):
    """The score ignores these, so two documents would be one answer; a title with a space before it could not be said."""
    (tmp_path / "more").mkdir()
    write(tmp_path, __iron__="Before Bronze.", bronze="Before iron.")
    name = write(tmp_path / "more", Bronze="Another page, of the iron age.").removesuffix("/more")
    (tmp_path / "bronze.txt").write_text("A third page.", encoding="utf-8")
    env = PageSearch(name)
    titles = env.library(None).articles
    assert len({title.strip().casefold() for title in titles}) == len(titles) == 4
    for hops in env.difficulties:
        task = drawn(env, hops)
        conversation = env.demonstrate(task)
        assert play(env, task, conversation[1::2]).score.value == 1


@pytest.mark.parametrize(
    ("texts", "mistake"),
    [
        (None, "no such folder"),
        ({}, "file with text in it"),
        ({"a": "alone"}, "nothing can be asked"),
    ],
)
def test_a_folder_without_questions_is_one_line(tmp_path, texts, mistake):
    """A folder that is missing, empty, or without links is refused by its name."""
    name = f"search:{tmp_path}/missing" if texts is None else write(tmp_path, **texts)
    with pytest.raises(ValueError, match=mistake) as error:
        ENVIRONMENTS[name]
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_questions_over_python():
    """The oracle finds every description first and is paid for ways of all lengths; lazy answers are not."""
    env = ENVIRONMENTS["search:python"]
    for task in env.tasks(12, 0):
        conversation = env.demonstrate(task)
        turns = [message for message in conversation if message["role"] == "assistant"]
        assert play(env, task, turns).score.value == 1
        assert conversation[2]["content"].split("\n")[0] == task.label["path"][0]
        assert all(play(env, task, [probe]).score.value == 0 for probe in env.hack_probes(task))
