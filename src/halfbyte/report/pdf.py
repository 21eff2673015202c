"""The HTML report on paper, through Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from halfbyte.errors import RunError

PROGRAMS = ("chromium", "google-chrome", "chromium-browser")
LONGEST = 120  # seconds


def print_pdf(page: Path) -> bytes:
    """``page`` printed. Raises RunError where no Chromium is found or it prints nothing."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        raise RunError(
            f"--pdf needs Chromium, and none of {', '.join(PROGRAMS)} is in PATH; install one, or "
            f"print {page} from a browser."
        )
    # Chromium refuses to run as root in its sandbox. The page holds no script and loads nothing.
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="halfbyte-pdf-") as folder:
        paper = Path(folder, "report.pdf")
        command = [
            program,
            "--headless",
            *root,
            "--disable-gpu",
            "--disable-quic",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={folder}/profile",
            "--no-pdf-header-footer",
            f"--print-to-pdf={paper}",
            page.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=LONGEST, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunError(
                f"{program} did not print {page} ({type(error).__name__}); print it from a browser."
            ) from error
        if done.returncode != 0 or not paper.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RunError(
                f"{program} did not print {page} (exit code {done.returncode}"
                f"{': ' + said[-1] if said else ''}); print it from a browser."
            )
        return paper.read_bytes()
