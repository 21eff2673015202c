"""The command line as a test types it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from halfbyte.cli.app import app


def halfbyte(*words: object, code: int = 0) -> Result:
    """``halfbyte WORDS``, which must end with ``code``; raises what no user should see."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result
