"""Tracebacks, warnings and log lines of a command, without the secrets that libraries put in."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

from halfbyte.redaction import redact


def hide_secrets() -> None:
    """Let what this process prints of errors, warnings and log records be redacted."""
    sys.excepthook = print_error
    threading.excepthook = _print_of_thread
    sys.unraisablehook = _print_unraisable
    as_it_was, make_record = warnings.formatwarning, logging.getLogRecordFactory()

    def formatwarning(*args: Any, **kwargs: Any) -> str:
        return redact(as_it_was(*args, **kwargs))

    def redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[0] is not None:
                record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)))
        except Exception:  # the handler says of a record that cannot be formatted what is wrong
            return record
        record.msg, record.args = redact(text), ()
        return record

    warnings.formatwarning = formatwarning
    logging.setLogRecordFactory(redacted_record)


def print_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of ``error`` as Python does, redacted."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact(text), end="", file=sys.stderr)


def _print_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else "unknown"
    print(f"Exception in thread {name}:", file=sys.stderr)
    error = args.exc_value or args.exc_type()
    print_error(args.exc_type, error, args.exc_traceback)


def _print_unraisable(args: Any) -> None:
    print(redact(f"{args.err_msg or 'Exception ignored in'}: {args.object!r}"), file=sys.stderr)
    if args.exc_value is not None:
        print_error(args.exc_type, args.exc_value, args.exc_traceback)
