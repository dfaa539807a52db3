"""The history of a code base: issues, pull requests and commits joined in one context (paper 2.3, "repo-level code").

    document = issue or pull request (title, text, comments), then its commits, oldest first, each as
               message and unified diff

so that a model reads what was wrong, then what was done. The history is read with `git` from a checkout on this
machine, `--data.files git:CHECKOUT`; the issues, which are no part of it, from JSON lines that any exporter can write:
`git:CHECKOUT:issues.jsonl`, each with "number", "title" and, if there are, "body" and "comments" (strings).

Choices, and why:
- A merge and the commits it brought are one document: a pull request. Commits outside of merges that name the same
  issue (#12) are one document too; others stand alone. Every commit is in exactly one document.
- Noise is left out: commits of robots, of fewer than WORDS words, diffs of lock files, and what git calls binary. A
  diff longer than LONGEST is cut off at a line.
- Changes of files that are held out are left out.

Simplified: the paper filters them with a model; here rules do.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

WORDS = 3
LONGEST = 20_000
"""Characters of the diff of one commit."""

ROBOTS = re.compile(r"\[bot\]|dependabot|renovate|github-actions", re.IGNORECASE)
GENERATED = re.compile(
    r"(^|/)(package-lock\.json|yarn\.lock|poetry\.lock|Cargo\.lock|go\.sum)$|\.min\.(js|css)$"
)


@dataclass(frozen=True)
class Commit:
    """One commit: its hash, those of its parents, who wrote it, and the message."""

    sha: str
    parents: tuple
    author: str
    message: str


def _git(checkout, *words):
    """Output of a git command in a checkout, as text. Raises ValueError in one line."""
    command = ["git", "-C", str(checkout), "-c", "core.quotePath=false", *words]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout.decode(
            "utf-8", "replace"
        )
    except FileNotFoundError:
        raise ValueError("data.files: git is not installed, so no history can be read") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode("utf-8", "replace").strip().splitlines()[:1] or ["git failed"]
        raise ValueError(f"data.files: no history in {checkout}: {reason[0]}") from None


def commits(checkout):
    """All commits that lead to the checkout's head, each after its parents."""
    text = _git(checkout, "log", "--topo-order", "--reverse", "--format=%H%x00%P%x00%an%x00%B%x01")
    fields = [entry.strip("\n").split("\0") for entry in text.split("\1") if entry.strip()]
    return [
        Commit(sha, tuple(parents.split()), author, message.strip())
        for sha, parents, author, message in fields
    ]


def groups(history):
    """Commits that belong together, as lists, oldest first: a merge with what it brought; commits that name one issue.

    history: commits, each after its parents, the last one the head. Every commit is in exactly one group.
    """
    known, place = {c.sha: c for c in history}, {c.sha: n for n, c in enumerate(history)}
    chain, at = [], history[-1].sha if history else None
    while at in known:
        chain.append(at)
        at = next(iter(known[at].parents), None)
    seen, found, by_issue = set(), [], {}
    for head in reversed(chain):
        waiting, brought = [head], []
        while waiting:
            sha = waiting.pop()
            if sha in known and sha not in seen:
                seen.add(sha)
                brought.append(known[sha])
                waiting += known[sha].parents
        group = sorted(brought, key=lambda c: place[c.sha])
        number = next(iter(references(group)), None) if len(group) == 1 else None
        if number in by_issue:
            by_issue[number] += group
        else:
            found.append(group)
            if number is not None:
                by_issue[number] = group
    return found


def references(group):
    """Numbers of the issues and pull requests that the messages name, in order, each once."""
    return list(
        dict.fromkeys(int(n) for c in group for n in re.findall(r"#(\d{1,7})\b", c.message))
    )


def diff(checkout, commit, hidden=lambda path: False):
    """What a commit changed, in unified form: "" for a merge. hidden(path): whether changes of a file are left out."""
    if len(commit.parents) > 1:
        return ""
    options = (
        "--format=",
        "--no-color",
        "--no-ext-diff",
        "--no-textconv",
        "--find-renames",
        "--unified=3",
    )
    kept = []
    for change in re.split(r"(?m)^(?=diff --git )", _git(checkout, "show", *options, commit.sha)):
        header = re.match(r"diff --git a/.* b/(.*)\n", change)
        if (
            header
            and not hidden(header[1])
            and not GENERATED.search(header[1])
            and "\nBinary files " not in change
        ):
            body = re.split(r"(?m)^(?=--- )", change, maxsplit=1)
            kept.append(body[1] if len(body) > 1 else "")
    text = "".join(kept)
    return text if len(text) <= LONGEST else text[: text.rfind("\n", 0, LONGEST) + 1]


def document(checkout, group, issues, hidden=lambda path: False):
    """The text of a group: what was asked, then each commit; "" where nothing worth reading is left."""
    parts = []
    for number in references(group):
        if number in issues:
            issue = issues[number]
            talk = [issue.get("body") or "", *(issue.get("comments") or [])]
            parts.append(
                "\n\n".join(
                    [f"Issue #{number}: {issue['title']}", *(str(t).strip() for t in talk if t)]
                )
            )
    asked = len(parts)
    for commit in group:
        merge = len(commit.parents) > 1
        if ROBOTS.search(commit.author) or (not merge and len(commit.message.split()) < WORDS):
            continue
        changes = diff(checkout, commit, hidden)
        if changes or merge:
            parts.append(
                f"{'Pull request' if merge else 'Commit'}: {commit.message}\n\n{changes}".rstrip()
            )
    changed = any(part.startswith("Commit: ") for part in parts[asked:])
    return "\n\n".join(parts) + "\n" if changed else ""


def read_issues(path):
    """{number: issue} from JSON lines. Raises ValueError naming the line without a number or a title."""
    found = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.files: cannot read the issues {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                issue = json.loads(line)
                found[int(issue["number"])] = {"title": issue["title"], **issue}
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'data.files: {path}, line {number}: needs a "number" and a "title"'
                ) from None
    return found


def texts(checkout, issues=None, hidden=lambda path: False):
    """(name, text) of every document of a checkout's history, in order of its last merge or commit.

    issues: path of JSON lines, or None. hidden(path): files whose changes are left out. Raises ValueError where there
    is no history.
    """
    known = read_issues(issues) if issues else {}
    for group in groups(commits(checkout)):
        text = document(checkout, group, known, hidden)
        if text:
            yield group[-1].sha[:12], text
