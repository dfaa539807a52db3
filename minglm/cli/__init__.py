"""The command line: one file a verb, with `add_arguments(parser)` and `main(args)` (no section in the paper).

A verb's module is imported when the verb is used, and imports torch, numpy and tyro inside `main`: `--help`
needs none of them. `registry` names the verbs, `main` finds the one that was asked for.
"""
