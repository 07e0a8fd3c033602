"""Errors that a user can fix, and how commands report them."""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """An error that the user can fix. Its message names the file or option, what is wrong and what to do."""


def one_line(error: Exception) -> str:
    """Returns the message of `error` as a single line, with unprintable characters escaped."""
    text = " ".join(str(error).split())
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def redact(text: str) -> str:
    """Returns `text` without the user names, passwords and queries of URLs in it."""
    return re.sub(r"(\w+://)(?:[^/?#\s]*@)?([^?#\s]*)(?:[?#].*)?", r"\1\2", text, flags=re.DOTALL)


def cli_main(main: Callable[P, None]) -> Callable[P, None]:
    """Decorates the `main` of a command.

    A `UserError` or a full disk becomes one line on standard error and exit code 2, Ctrl-C exit code 130. Any other exception
    is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            _exit(one_line(error))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            _exit(f"{error.filename or 'a file'}: {error.strerror}; free some space or choose another folder")
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return wrapper


def _exit(message: str) -> None:
    rank = f"rank {os.environ.get('RANK', '?')}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
