"""The command line. Everything heavy is imported by the command that needs it."""


def main() -> None:
    """The command ``halfbyte``."""
    import sys

    from halfbyte.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    app(prog_name="halfbyte")
