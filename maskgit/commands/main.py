"""The `maskgit` command: imports the subcommand asked for, and makes exit statuses of errors."""

import argparse
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import FrameType
from typing import NoReturn

from maskgit.common import UserError, nearest
from maskgit.common.signals import deadly

# Each a module of this package.
COMMANDS = (
    "sample",
    "edit",
    "train",
    "tokenize",
    "plot",
    "evaluate",
    "import",
    "download",
    "push",
    "doctor",
)

# What a full or a locked disk says: no bug, so no traceback.
DISK = {errno.ENOSPC: 1, errno.EDQUOT: 1, errno.EFBIG: 1}
DISK |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY), 2)
DISK |= dict.fromkeys((errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR), 2)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors and whose help starts with an example."""

    def __init__(self, prog: str, example: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)
        self.example = example

    def format_help(self) -> str:
        return f"example: {self.example}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def check_options(self, arguments: Sequence[str]) -> None:
        """UserError for an option that the parser does not know, naming the nearest it does."""
        known = self._option_string_actions
        for argument in arguments:
            if argument == "--":
                return
            option = argument.partition("=")[0]
            if (
                re.match("--.|-[A-Za-z]", option)
                and option not in known
                and option[:2] not in known
            ):
                hint = nearest(option, (name for name in known if name.startswith("--")))
                raise UserError(f"{self.prog} has no option {option}: {hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `maskgit ARGUMENTS` (by default the process's own) and return its exit status.

    0: done as asked. 2: a mistake in the command, the config or the input, told in one line.
    130: interrupted. 143: terminated. 1: anything else, with a traceback unless it is no bug.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            return dispatch(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        return _fail(error, error.status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _close_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in DISK:
            raise
        if error.filename is None:
            _close_output()
        where = error.filename or "the output"
        return _fail(f"cannot write {where}: {error.strerror}", DISK[error.errno])


def dispatch(
    arguments: Sequence[str],
    prog: str = "maskgit",
    package: str = __package__,
    commands: Sequence[str] = COMMANDS,
) -> int:
    """Parse the arguments and run the command of `package` that they name.

    A command that is itself a package with COMMANDS has subcommands, found in the same way.
    """
    if not arguments:
        raise UserError(f"which command? {prog} {{{','.join(commands)}}} (see {prog} --help)")
    name, *rest = arguments
    if name in commands:
        command = import_module(_module(package, name))
        if hasattr(command, "COMMANDS"):
            return dispatch(rest, f"{prog} {name}", command.__name__, command.COMMANDS)
        with deadly():
            parser = Parser(f"{prog} {name}", command.EXAMPLE, command.HELP)
            command.add_arguments(parser)
            parser.check_options(rest)
            parsed = parser.parse_intermixed_args(rest)
        return command.run(parsed) or 0
    if name in ("-h", "--help"):
        print(overview(prog, package, commands))
        return 0
    if name == "--version" and commands is COMMANDS:
        import maskgit

        print(f"maskgit {maskgit.__version__}")
        return 0
    what = "option" if name.startswith("-") else "command"
    raise UserError(f"unknown {what} {name!r}: {nearest(name, (*commands, '--help'))}")


def overview(prog: str, package: str, commands: Sequence[str]) -> str:
    """What `maskgit --help` prints, and `maskgit COMMAND --help` of one with subcommands."""
    modules = {name: import_module(_module(package, name)) for name in commands}
    return "\n".join(
        [
            f"example: {next(iter(modules.values())).EXAMPLE}",
            "",
            f"usage: {prog} COMMAND [options]",
            "",
            "commands:",
            *(f"  {name:<11}{module.HELP}" for name, module in modules.items()),
            "",
            f"{prog} COMMAND --help tells the rest; maskgit --version the version.",
        ]
    )


def _module(package: str, name: str) -> str:
    """Where a command is: `clip-score` in clip_score.py, `import` in import_.py."""
    return f"{package}.{name.replace('-', '_')}{'_' if iskeyword(name) else ''}"


def _fail(message: object, status: int) -> int:
    print("maskgit:", " ".join(str(message).splitlines()), file=sys.stderr)
    return status


def _close_output() -> None:
    """Send what stdout still holds nowhere, or Python complains at exit that it cannot write it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)  # as an exception, so that half-written files are removed
