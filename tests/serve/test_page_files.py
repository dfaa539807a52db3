"""The chat page's files and suggestions, as the server sends them."""

import re
from pathlib import Path

import pytest
from helpers.serving import Script, running

from minglm.chat.parser import FormatError
from minglm.envs import ENVIRONMENTS
from minglm.serve.examples import GENERAL, MOST, TASKS, examples
from minglm.serve.page_files import FOLDER, read_page_files

REFERENCES = {
    ".html": re.compile(r'\b(?:src|href)="([^"]+)"'),
    ".js": re.compile(r'^import .*?"([^"]+)";', re.MULTILINE),
}


def referenced(name, text):
    """The paths, in the page's folder, that a file of the page refers to."""
    found = set()
    for target in REFERENCES[Path(name).suffix].findall(text):
        if target.startswith("page/"):  # from the page itself, which is at /
            found.add(target.removeprefix("page/"))
        elif target.startswith("./"):
            found.add((Path(name).parent / target).as_posix())
        else:
            found.add(target)
    return found


def loaded_from(name, files):
    """A file and all that it loads, directly or not."""
    done, waiting = set(), {name}
    while waiting:
        name = waiting.pop()
        done.add(name)
        if Path(name).suffix in REFERENCES and not name.startswith("vendor/"):
            waiting |= referenced(name, files[name].body.decode()) - done
    return done


def test_the_page_loads_its_own_files_and_no_others():
    """What the page refers to is in its folder, and nothing in the folder is without use."""
    files = read_page_files()
    assert loaded_from("index.html", files) == set(files)


def test_a_reference_to_another_host_is_seen():
    """The broken twin: a page that takes a script from elsewhere, or a file that is not there."""
    page = '<script src="https://cdn.example/marked.js"></script>\n<link href="page/gone.css">'
    found = referenced("index.html", page)
    assert found == {"https://cdn.example/marked.js", "gone.css"} and not found & set(
        read_page_files()
    )


def test_no_script_or_style_stands_in_the_page():
    """A content security policy without 'unsafe-inline' lets the whole page work."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)


def test_every_fault_of_format_has_its_words():
    """The page says each fault that the parser names in a sentence, and no other."""
    script = read_page_files()["turns.js"].body.decode()
    table = script.partition("FORMAT_FAULTS = {")[2].partition("};")[0]
    said = dict(re.findall(r'^  (\w+): "([A-Z].+\.)",$', table, re.MULTILINE))
    assert set(said) == set(FormatError) and len(set(said.values())) == len(said)


def test_every_library_has_its_licence_and_is_named():
    """The folder of a library names its version, holds its licence, and is listed in the README."""
    listed = (FOLDER / "vendor" / "README.md").read_text(encoding="utf-8")
    folders = [path for path in (FOLDER / "vendor").iterdir() if path.is_dir()]
    assert len(folders) == 3
    for folder in folders:
        assert re.search(r"-\d+\.\d+\.\d+$", folder.name) and f"`{folder.name}`" in listed
        assert (folder / "LICENSE").stat().st_size > 500


def test_files_are_sent_with_their_types_and_kept_by_browsers():
    """Libraries may be kept for ever; our own files are asked for by their hash; no other path is served."""
    with running(Script(lambda prompt: "<|user|>")) as (http, _, _):
        page = http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["cache-control"] == "no-cache"
        again = http.get("/", headers={"If-None-Match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name, file in read_page_files().items():
            sent = http.get(f"/page/{name}")
            assert sent.content == file.body and sent.headers["content-type"] == file.media_type
            assert ("immutable" in sent.headers["cache-control"]) == name.startswith("vendor/")
        for path in (
            "",
            "gone.js",
            "../app.py",
            "..%2fapp.py",
            "vendor/README.md",
            "%2fetc/passwd",
        ):
            missing = http.get(f"/page/{path}")
            assert missing.status_code == 404 and "error" in missing.json(), path


@pytest.mark.parametrize(
    "names", [("retail",), ("arithmetic", "code", "retail", "instructions"), ("code",) * 2]
)
def test_suggestions_are_easy_unseen_tasks_of_the_models_environments(names):
    """Each suggestion is a task of the test split, of the least difficulty, with the tools of its environment."""
    found = examples(names)
    assert len(found["examples"]) == MOST
    assert {idea["kind"] for idea in found["examples"]} == set(names)
    assert all(name in found["about"] for name in names)
    for idea in found["examples"]:
        environment = ENVIRONMENTS[idea["kind"]]
        assert idea["tools"] == list(environment.tools())
        easiest = [min(environment.default_difficulties)]
        tests = [environment.task(index, 0, "test", easiest) for index in range(TASKS)]
        assert idea["text"] in [task.messages[-1]["content"] for task in tests]
    assert len({idea["text"] for idea in found["examples"]}) == MOST


def test_without_environments_the_suggestions_are_general():
    """The server of a released checkpoint suggests what any model may be asked; the page gets it from its route."""
    with running(Script(lambda prompt: "<|user|>")) as (http, _, _):
        found = http.get("/page/examples.json").json()
    assert [idea["text"] for idea in found["examples"]] == list(GENERAL) and found["about"] == ""
    with running(Script(lambda prompt: "<|user|>"), environments=("retail",)) as (http, _, _):
        assert http.get("/page/examples.json").json() == examples(["retail"])
