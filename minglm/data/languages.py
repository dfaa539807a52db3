"""Name the programming languages that are read: their suffixes, and how a line of comment begins (paper 2.2).

The names are those of Pygments too, which splits the text of a file into tokens for
`minglm.data.cleaning.code_tokens`.
"""

from typing import NamedTuple


class Language(NamedTuple):
    """A programming language."""

    suffixes: tuple[str, ...]
    comment: str
    """What a line of comment begins with."""


LANGUAGES = {
    "python": Language((".py", ".pyi"), "#"),
    "c": Language((".c", ".h"), "//"),
    "c++": Language((".cpp", ".cc", ".cxx", ".c++", ".hpp", ".hh", ".hxx", ".ipp"), "//"),
    "cuda": Language((".cu", ".cuh"), "//"),
    "c#": Language((".cs",), "//"),
    "f#": Language((".fs", ".fsx"), "//"),
    "java": Language((".java",), "//"),
    "kotlin": Language((".kt", ".kts"), "//"),
    "scala": Language((".scala", ".sc"), "//"),
    "groovy": Language((".groovy", ".gradle"), "//"),
    "javascript": Language((".js", ".mjs", ".cjs", ".jsx"), "//"),
    "typescript": Language((".ts", ".mts", ".cts", ".tsx"), "//"),
    "go": Language((".go",), "//"),
    "rust": Language((".rs",), "//"),
    "zig": Language((".zig",), "//"),
    "swift": Language((".swift",), "//"),
    "objective-c": Language((".m", ".mm"), "//"),
    "d": Language((".d",), "//"),
    "dart": Language((".dart",), "//"),
    "php": Language((".php",), "//"),
    "ruby": Language((".rb", ".rake"), "#"),
    "perl": Language((".pl", ".pm"), "#"),
    "lua": Language((".lua",), "--"),
    "shell": Language((".sh", ".bash", ".zsh"), "#"),
    "powershell": Language((".ps1", ".psm1"), "#"),
    "r": Language((".r",), "#"),
    "julia": Language((".jl",), "#"),
    "elixir": Language((".ex", ".exs"), "#"),
    "erlang": Language((".erl", ".hrl"), "%"),
    "haskell": Language((".hs",), "--"),
    "ocaml": Language((".ml", ".mli"), "//"),
    "clojure": Language((".clj", ".cljs", ".cljc"), ";"),
    "common-lisp": Language((".lisp", ".cl"), ";"),
    "scheme": Language((".scm", ".rkt"), ";"),
    "fortran": Language((".f90", ".f95", ".f03", ".f08"), "!"),
    "nim": Language((".nim",), "#"),
    "sql": Language((".sql",), "--"),
    "verilog": Language((".v",), "//"),
    "vhdl": Language((".vhd", ".vhdl"), "--"),
    "proto": Language((".proto",), "//"),
}

LANGUAGE_OF_SUFFIX = {
    suffix: name for name, language in LANGUAGES.items() for suffix in language.suffixes
}
CODE_SUFFIXES = tuple(LANGUAGE_OF_SUFFIX)
