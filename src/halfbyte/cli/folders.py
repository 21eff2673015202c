"""Run folders as they are named on the command line; light, where ``halfbyte.run`` is not."""

from __future__ import annotations

from pathlib import Path


def run_folder(folder: Path | None) -> Path:
    """``folder``, or the latest run. Raises RunError where it holds no run."""
    from halfbyte.run.folder import latest_run, require_run

    if folder is None:
        return latest_run()
    require_run(folder)
    return folder
