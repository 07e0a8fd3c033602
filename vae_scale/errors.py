"""What a user can mend is said in one line."""

import errno
import functools
import os
import re
import sys
from collections.abc import Sequence
from typing import Protocol


class UserError(Exception):
    """Something the user can mend. Its text names the file or option at fault, what is wrong and what to do."""


def one_line(error: Exception) -> str:
    """The text of `error` folded into a single line; what a terminal would obey, or could not print, is spelled out."""
    text = " ".join(str(error).split())
    return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def shown(text: str) -> str:
    """A location, or a text with one in it, without what may be secret.

    URLs lose user, password and query; a `pipe:` loses all of its command but the program.
    """
    if text.startswith("pipe:"):
        program = re.match(r"pipe:\s*(\w[\w./-]*|/[\w./-]+)(?=\s|$)", text)
        return f"pipe:{program[1]} ..." if program else "pipe:..."
    return re.sub(r"(\w+://)(?:[^/?#\s]*@)?([^?#\s]*)(?:[?#].*)?", r"\1\2", text, flags=re.DOTALL)


class Command(Protocol):
    """A verb's `main`."""

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        """Runs the verb with the command line `argv`, by default the process's own."""


def command(main: Command) -> Command:
    """Makes a verb's `main` end as a command should.

    A `UserError` or a full disk becomes one line on standard error and exit code 2; Ctrl-C becomes exit code 130.
    Everything else is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            sys.exit(_fail(one_line(error)))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            sys.exit(_fail(f"{error.filename or 'a file'}: {error.strerror}; free some space or choose another folder"))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return wrapped


def _fail(text: str) -> int:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    who = f"rank {os.environ.get('RANK', '?')}: " if ranks > 1 else ""
    print(f"{who}error: {text}", file=sys.stderr, flush=True)
    return 2
