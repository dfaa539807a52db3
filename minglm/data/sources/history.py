"""Join issues, pull requests and commits of a code base in one context (paper 2.3, "repo-level code").

    document = issue or pull request (title, text, comments), then its commits, oldest first, each as
               message and unified diff

so that a model reads what was wrong, then what was done. The history is read with `git` from a checkout on
this machine, `--data.files git:CHECKOUT`; the issues, which are not part of it, from JSON lines that any
exporter can write: `git:CHECKOUT:issues.jsonl`, each with "number", "title" and optionally "body" and
"comments" (strings).

Choices, and why:
- A merge and the commits it brought are one document: a pull request. Commits outside of merges that name the same
  issue (#12) are one document too; all others are one document each. Every commit is in exactly one document.
- Noise is left out: commits by bots, commits with a message of fewer than MIN_MESSAGE_WORDS words, diffs of lock files,
  and files that git calls binary. A diff longer than MAX_DIFF_CHARACTERS is cut off at a line.
- Changes in held-out files are left out.

Simplified: the paper filters them with a model; here rules do.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_MESSAGE_WORDS = 3
MAX_DIFF_CHARACTERS = 20_000
"""Of one commit."""

BOTS = re.compile(r"\[bot\]|dependabot|renovate|github-actions", re.IGNORECASE)
GENERATED = re.compile(
    r"(^|/)(package-lock\.json|yarn\.lock|poetry\.lock|Cargo\.lock|go\.sum)$|\.min\.(js|css)$"
)

LOG_FORMAT = "--format=%H%x00%P%x00%an%x00%B%x01"
"""Hash, parents, author and message, separated by zero bytes; a byte 1 ends each commit."""

DIFF_OPTIONS = (
    "--format=",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--find-renames",
    "--unified=3",
)


@dataclass(frozen=True)
class Commit:
    """One commit."""

    sha: str
    parents: tuple[str, ...]
    """Hashes; a merge has two or more."""
    author: str
    message: str

    @property
    def is_merge(self) -> bool:
        """Return True if it joins two or more commits."""
        return len(self.parents) > 1


def _nothing(path: str) -> bool:
    return False


def _git(checkout: Path | str, *words: str) -> str:
    """Return the output of a git command in a checkout. Raises ValueError in one line."""
    command = ["git", "-C", str(checkout), "-c", "core.quotePath=false", *words]
    try:
        output = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise ValueError("data.files: git is not installed, so no history can be read") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[0] if lines else "git failed"
        raise ValueError(f"data.files: no history in {checkout}: {reason}") from None
    return output.decode("utf-8", "replace")


def commits(checkout: Path | str) -> list[Commit]:
    """Return all commits that lead to the checkout's head, each after its parents."""
    text = _git(checkout, "log", "--topo-order", "--reverse", LOG_FORMAT)
    history = []
    for entry in text.split("\1"):
        if entry.strip():
            sha, parents, author, message = entry.strip("\n").split("\0")
            history.append(Commit(sha, tuple(parents.split()), author, message.strip()))
    return history


def groups(history: Sequence[Commit]) -> list[list[Commit]]:
    """Return the commits that belong together, oldest first: a merge with what it brought; commits that name one issue.

    Every commit is in exactly one group.

    Args:
        history: commits, each after its parents; the last one is the head.
    """
    commit_of = {commit.sha: commit for commit in history}
    place = {commit.sha: n for n, commit in enumerate(history)}

    # The main line: from the head back over first parents.
    main_line = []
    sha = history[-1].sha if history else None
    while sha in commit_of:
        main_line.append(sha)
        sha = next(iter(commit_of[sha].parents), None)

    seen: set[str] = set()
    result: list[list[Commit]] = []
    group_of_issue: dict[int, list[Commit]] = {}
    for head in reversed(main_line):
        group = _new_ancestors(head, commit_of, seen)
        group.sort(key=lambda commit: place[commit.sha])
        numbers = references(group)
        issue = numbers[0] if len(group) == 1 and numbers else None
        if issue in group_of_issue:
            group_of_issue[issue] += group
            continue
        result.append(group)
        if issue is not None:
            group_of_issue[issue] = group
    return result


def _new_ancestors(head: str, commit_of: Mapping[str, Commit], seen: set[str]) -> list[Commit]:
    """Return a commit and those of its ancestors that were not seen before, and add them to `seen`."""
    stack = [head]
    new = []
    while stack:
        sha = stack.pop()
        if sha in commit_of and sha not in seen:
            seen.add(sha)
            new.append(commit_of[sha])
            stack += commit_of[sha].parents
    return new


def references(group: Sequence[Commit]) -> list[int]:
    """Return the numbers of the issues and pull requests that the messages name, in order, each once."""
    numbers = []
    for commit in group:
        numbers += [int(digits) for digits in re.findall(r"#(\d{1,7})\b", commit.message)]
    return list(dict.fromkeys(numbers))


def diff(checkout: Path | str, commit: Commit, is_hidden: Callable[[str], bool] = _nothing) -> str:
    """Return what a commit changed, as a unified diff; "" for a merge.

    Args:
        is_hidden: returns True for a path whose changes are left out.
    """
    if commit.is_merge:
        return ""
    changes = re.split(r"(?m)^(?=diff --git )", _git(checkout, "show", *DIFF_OPTIONS, commit.sha))
    kept = []
    for change in changes:
        header = re.match(r"diff --git a/.* b/(.*)\n", change)
        if header is None:
            continue
        path = header[1]
        if is_hidden(path) or GENERATED.search(path) or "\nBinary files " in change:
            continue
        # Leave out the lines of the header, up to the names of the two files.
        _, *body = re.split(r"(?m)^(?=--- )", change, maxsplit=1)
        kept += body
    text = "".join(kept)
    if len(text) <= MAX_DIFF_CHARACTERS:
        return text
    return text[: text.rfind("\n", 0, MAX_DIFF_CHARACTERS) + 1]


def document(
    checkout: Path | str,
    group: Sequence[Commit],
    issues: Mapping[int, dict[str, Any]],
    is_hidden: Callable[[str], bool] = _nothing,
) -> str:
    """Return the text of a group: the issues it names, then each commit; "" if no change is left."""
    sections = [
        _issue_text(number, issues[number]) for number in references(group) if number in issues
    ]
    changed = False
    for commit in group:
        if BOTS.search(commit.author):
            continue
        if not commit.is_merge and len(commit.message.split()) < MIN_MESSAGE_WORDS:
            continue
        changes = diff(checkout, commit, is_hidden)
        if commit.is_merge:
            sections.append(f"Pull request: {commit.message}\n\n{changes}".rstrip())
        elif changes:
            sections.append(f"Commit: {commit.message}\n\n{changes}".rstrip())
            changed = True
    return "\n\n".join(sections) + "\n" if changed else ""


def _issue_text(number: int, issue: Mapping[str, Any]) -> str:
    paragraphs = [f"Issue #{number}: {issue['title']}"]
    for text in [issue.get("body") or "", *(issue.get("comments") or [])]:
        if text:
            paragraphs.append(str(text).strip())
    return "\n\n".join(paragraphs)


def read_issues(path: Path | str) -> dict[int, dict[str, Any]]:
    """Return {number: issue} from JSON lines.

    Raises ValueError naming the line without a number or a title.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.files: cannot read the issues {path}: {error}") from None
    issues = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            issue = json.loads(line)
            issues[int(issue["number"])] = {"title": issue["title"], **issue}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'data.files: {path}, line {number}: needs a "number" and a "title"'
            ) from None
    return issues


def texts(
    checkout: Path | str,
    issues: Path | str | None = None,
    is_hidden: Callable[[str], bool] = _nothing,
) -> Iterator[tuple[str, str]]:
    """Yield (short hash, text) of every document of a checkout's history, in order of its last merge or commit.

    Args:
        issues: path of JSON lines.
        is_hidden: returns True for a path whose changes are left out.

    Raises:
        ValueError: if there is no history.
    """
    issue_of = read_issues(issues) if issues else {}
    for group in groups(commits(checkout)):
        text = document(checkout, group, issue_of, is_hidden)
        if text:
            yield group[-1].sha[:12], text
