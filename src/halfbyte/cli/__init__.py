"""The command line. Everything heavy is imported by the command that needs it."""


def main() -> None:
    """The command ``halfbyte``."""
    import os
    import sys

    # PyTorch's library warns of each of its switches that it calls experimental. It reads this
    # when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from halfbyte.cli.tracebacks import hide_secrets, print_error

    hide_secrets()
    from halfbyte.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    try:
        app(prog_name="halfbyte")
    except Exception as error:  # a defect; typer's own hook would print it with what is secret
        print_error(type(error), error, error.__traceback__)
        sys.exit(1)
