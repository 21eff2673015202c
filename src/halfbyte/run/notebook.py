"""A run in a notebook: the hub's token, the report in a cell, the files to take along."""

from __future__ import annotations

import html
import os
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

from halfbyte.run.folder import require_run

TOKEN = "HF_TOKEN"
CHECKPOINTS = "checkpoints"


def take_colab_token() -> str:
    """On Colab, take the hub's token from the secret ``HF_TOKEN``; says what was found.

    The token goes into this process's environment, where the hub client looks for it, and is
    never shown. An environment that already has one is left as it is.
    """
    if os.environ.get(TOKEN):
        return f"the hub token of the environment variable {TOKEN} is used"
    try:
        userdata: Any = import_module("google.colab.userdata")
    except ImportError:
        return "not on Colab: the hub client's own log-in is used, if there is one"
    try:
        token = userdata.get(TOKEN)
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
        token = None
    if not token:
        return (
            f"no secret {TOKEN} that this notebook may read: public models and data need none "
            "(for a gated model, add it under the key in the left margin)"
        )
    os.environ[TOKEN] = token
    return f"the hub token of the Colab secret {TOKEN} is used"


def report_html(folder: Path, height: int = 900) -> str:
    """The report of the run in ``folder`` in a frame of ``height`` pixels.

    It stands in a frame of its own so that its style and the notebook's leave each other alone.
    Raises RunError where the folder holds no run.
    """
    require_run(folder)
    text = html.escape((folder / "report.html").read_text(encoding="utf-8"))
    style = f"width:100%;height:{height}px;border:1px solid #8888;background:white"
    return f'<iframe srcdoc="{text}" sandbox style="{style}"></iframe>'


def pack_run(folder: Path) -> Path:
    """Put what the run in ``folder`` made, all but its checkpoints, into ``<folder>.zip``.

    Raises RunError where the folder holds no run.
    """
    require_run(folder)
    target = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and inside.parts[0] != CHECKPOINTS:
                archive.write(path, Path(folder.name) / inside)
    return target
