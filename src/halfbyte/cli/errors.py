"""How a command ends when something is wrong.

Exit codes: 0 done; 2 the user can mend it (one sentence on standard error) or typed it wrong; 130
stopped by Ctrl-C; 1 what `halfbyte data` looked at has errors, or, with its traceback, a defect of
halfbyte.
"""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from halfbyte.cli.units import visible
from halfbyte.errors import HalfbyteError, gave_up
from halfbyte.redaction import redact

FOUND_ERRORS = 1
USER_ERROR = 2
STOPPED = 130


class Commands(TyperGroup):
    """The group of all commands: a HalfbyteError of any of them becomes its one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HalfbyteError as error:
            print(f"halfbyte: {visible(' '.join(str(error).split()))}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print("halfbyte: stopped", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                raise
            name = visible(str(error.filename))
            print(
                f"halfbyte: {name[:60]}{'…' * (len(name) > 60)} is no name that a file can have "
                f"({error.strerror}).",
                file=sys.stderr,
            )
            raise typer.Exit(USER_ERROR) from None
        except BaseException as error:
            if not gave_up(error):
                raise
            words = visible(" ".join(redact(str(error)).split())).rstrip(".")
            print(f"halfbyte: a library gave up on what it was given ({words}).", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from error
