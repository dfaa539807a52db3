"""History of a code base: read from real checkouts that git made; each commit once, with its issue and its diff."""

import json
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.sources import history
from minglm.data.sources.files import ReadOptions, user_files
from minglm.data.sources.history import Commit, commits, groups, references, texts


class Checkout:
    """A git checkout in a folder, made with git itself."""

    def __init__(self, folder):
        self.folder = folder
        self.clock = 1_700_000_000
        folder.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *words, author="Ada"):
        self.clock += 60
        who = {
            f"GIT_{role}_{what}": value
            for role in ("AUTHOR", "COMMITTER")
            for what, value in (
                ("NAME", author),
                ("EMAIL", "a@b.c"),
                ("DATE", f"{self.clock} +0000"),
            )
        }
        subprocess.run(
            ["git", "-C", str(self.folder), *words],
            check=True,
            capture_output=True,
            env={**os.environ, **who},
        )

    def commit(self, message, author="Ada", **files):
        for name, content in files.items():
            path = self.folder / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message, author=author)


@pytest.fixture
def checkout(tmp_path):
    """Make a pull request of two commits, two commits that name issue 3, a robot, a binary file and a lock file."""
    repository = Checkout(tmp_path / "code")
    repository.commit("First version of adding", add_py="def add(a, b):\n    return a - b\n")
    repository.git("checkout", "--quiet", "-b", "fix")
    repository.commit("Add, do not subtract (#7)", add_py="def add(a, b):\n    return a + b\n")
    repository.commit("Test the sum of numbers", test_py="assert add(1, 2) == 3\n")
    repository.git("checkout", "--quiet", "main")
    repository.commit("Say what it is for", README="Adds.\n")
    repository.git(
        "merge", "--quiet", "--no-ff", "--message", "Merge pull request #8 from ada/fix", "fix"
    )
    repository.commit(
        "Negative numbers, see #3", add_py="def add(a, b):\n    return a + b  # any sign\n"
    )
    repository.commit("bump all dependencies now", author="dependabot[bot]", deps="x==2\n")
    repository.commit(
        "More on #3: zero too", zero_py="assert add(0, 0) == 0\n", **{"package-lock.json": "{}"}
    )
    repository.commit("wip", junk_py="?\n")
    repository.commit("An image of the sum", logo=b"\0\1\2")
    issues = tmp_path / "issues.jsonl"
    rows = [
        {
            "number": 7,
            "title": "1+2 is -1",
            "body": "It should be 3.",
            "comments": ["Seen here too."],
        }
    ]
    rows += [{"number": 3, "title": "Signs"}]
    issues.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return repository


def test_a_pull_request_is_one_document_with_its_issue(checkout):
    """What was asked, the merge, its commits in order, each with its message and a unified diff."""
    found = [text for _, text in texts(checkout.folder, checkout.folder.parent / "issues.jsonl")]
    (request,) = [text for text in found if "Pull request" in text]
    change = "--- a/add.py\n+++ b/add.py\n@@ -1,2 +1,2 @@\n def add(a, b):\n-    return a - b\n+    return a + b"
    order = [
        "Issue #7: 1+2 is -1\n\nIt should be 3.\n\nSeen here too.",
        "Commit: Add, do not subtract (#7)\n\n" + change,
    ]
    order += ["Commit: Test the sum", "Pull request: Merge pull request #8"]
    places = [request.find(part) for part in order]
    assert -1 not in places and places == sorted(places)


def test_commits_on_one_issue_are_joined_and_noise_is_left_out(checkout):
    """Both commits on issue 3 are one document; robots, one-word messages, binary and lock files are nowhere."""
    found = [text for _, text in texts(checkout.folder, checkout.folder.parent / "issues.jsonl")]
    (signs,) = [text for text in found if "Issue #3: Signs" in text]
    assert "Negative numbers" in signs and "zero too" in signs and "package-lock" not in signs
    everything = "".join(found)
    assert not [
        word for word in ("dependabot", "deps", "wip", "junk", "logo") if word in everything
    ]
    assert len(found) == 4  # the first version, its purpose, the pull request, issue 3


def test_changes_of_heldout_files_are_left_out(checkout, monkeypatch):
    """A held-out file of the checkout does not come back through its history."""
    # Which file is held out follows from its path, and that is another each time.
    with monkeypatch.context() as patch:
        patch.setattr(
            "minglm.data.sources.files.is_heldout", lambda name, share: name.endswith("test.py")
        )
        found = list(user_files([f"git:{checkout.folder}"], ReadOptions(heldout=0.1)))
    assert found
    assert all(d.source == "repository" and "1, 2) == 3" not in d.text for d in found)
    whole = list(user_files([f"git:{checkout.folder}:{checkout.folder.parent}/issues.jsonl"]))
    assert any("1, 2) == 3" in d.text for d in whole)
    assert any("Issue #7" in d.text for d in whole)
    assert len({d.name for d in whole}) == len(whole)


def test_a_long_diff_ends_at_a_line(checkout, monkeypatch):
    """What is too long is cut after a whole line."""
    monkeypatch.setattr(history, "MAX_DIFF_CHARACTERS", 300)
    checkout.commit(
        "A very long table of numbers", table_py="".join(f"x{n} = {n}\n" for n in range(100))
    )
    text = history.diff(checkout.folder, commits(checkout.folder)[-1])
    assert 200 < len(text) <= 300
    assert text.endswith("\n")
    assert text.splitlines()[-1].startswith("+x")


@st.composite
def histories(draw):
    """Draw random histories: each commit follows one of the last three, and may merge another; some name an issue."""
    made = []
    for n in range(draw(st.integers(0, 12))):
        parents = [made[draw(st.integers(max(0, n - 3), n - 1))].sha] if n else []
        if n > 1 and draw(st.booleans()):
            parents.append(draw(st.sampled_from([c.sha for c in made if c.sha not in parents])))
        issue = draw(st.sampled_from(["", " #1", " (#2)"]))
        made.append(Commit(f"{n}", tuple(parents), "Ada", f"Change number {n}{issue}"))
    return made


@given(histories())
def test_every_commit_is_in_exactly_one_group(made):
    """All commits that lead to the head are grouped, none twice, each after its parents; the same history gives the
    same groups."""
    reached = set()
    waiting = [made[-1].sha] if made else []
    while waiting:
        sha = waiting.pop()
        if sha not in reached:
            reached.add(sha)
            waiting += made[int(sha)].parents
    found = groups(made)
    assert sorted(c.sha for group in found for c in group) == sorted(reached)
    for group in found:
        assert [int(c.sha) for c in group] == sorted(int(c.sha) for c in group)
    assert groups(made) == found


def test_references_are_numbers_after_a_hash():
    """#12 is one, in order and once; a colour and a hash without a number are none."""
    group = [Commit("a", (), "", "Fix #12, #3 and #12"), Commit("b", (), "", "colour #fff, # 5")]
    assert references(group) == [12, 3]


def test_mistakes_are_one_line(tmp_path, checkout):
    """No checkout, an empty one, issues that are missing or wrong: each one line with its name."""
    with pytest.raises(ValueError, match=r"no history in .*absent: "):
        list(user_files([f"git:{tmp_path / 'absent'}"]))
    Checkout(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no history in .*empty: "):
        list(user_files([f"git:{tmp_path / 'empty'}"]))
    with pytest.raises(ValueError, match=r"cannot read the issues .*none\.jsonl"):
        list(user_files([f"git:{checkout.folder}:{tmp_path / 'none.jsonl'}"]))
    (tmp_path / "bad.jsonl").write_text(
        '{"number": 1, "title": "x"}\n{"number": 2}\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r'bad\.jsonl, line 2: needs a "number" and a "title"'):
        list(user_files([f"git:{checkout.folder}:{tmp_path / 'bad.jsonl'}"]))
