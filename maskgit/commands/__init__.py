"""The `maskgit` commands, one file each; imported by nothing but the entry points.

A command's module has `HELP` (one line), `EXAMPLE` (a command line that runs as it stands),
`add_arguments(parser)` and `run(args)`, which returns an exit status or None for success. It
imports torch, and what needs torch, inside `run`: help must not wait for it.
"""
