"""What a parcel is, and which files of a folder go into one."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from halfbyte.errors import RunError
from halfbyte.export.beside import PAPERS, TOKENIZER
from halfbyte.export.card.loading import with_place
from halfbyte.export.card.metadata import on_base
from halfbyte.foreign_json import read_small

What = Literal["adapter", "model", "gguf"]

CARD = "README.md"
_TOKENIZER = (*TOKENIZER, "base_chat_template.jinja")
_SENT: dict[What, tuple[str, ...]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", *_TOKENIZER, *PAPERS),
    "model": (
        *("config.json", "generation_config.json", "merge.json", "halfbyte.json"),
        *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
        *_TOKENIZER,
        *PAPERS,
    ),
    "gguf": ("*.gguf", "*.Modelfile", "Modelfile", *PAPERS),
}


@dataclass(frozen=True)
class Parcel:
    """What would be sent: each file's name there, and its path here or its content."""

    what: What
    folder: Path
    files: dict[str, Path | bytes]
    left: list[str] = field(default_factory=list)  # names of what lies there and is not sent
    said: list[str] = field(default_factory=list)  # sentences for whoever sends it

    @property
    def card(self) -> str:
        """The model card as it is sent."""
        content = self.files[CARD]
        return content.decode() if isinstance(content, bytes) else content.read_text("utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def chosen_files(folder: Path, kind: What) -> tuple[dict[str, Path | bytes], list[str]]:
    """The files of ``kind`` in ``folder`` by name, and the names of the others there."""
    files: dict[str, Path | bytes] = {}
    left = []
    for path in sorted(folder.iterdir()):
        if path.name == CARD:
            continue
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _SENT[kind]):
            files[path.name] = inside(path, folder)
        else:
            left.append(path.name)
    return files, left


def inside(path: Path, folder: Path) -> Path:
    """``path``, unless it is a link to what lies elsewhere, which a folder of a stranger may have.

    The hub client's cache has links into a folder beside, named ``blobs``.
    """
    real, home = path.resolve(), folder.resolve()
    if not real.is_relative_to(home) and real.parent != home.parent.parent / "blobs":
        raise RunError(
            f"{path} is a link to a file outside of its folder, which is not sent; copy the file "
            "there, or remove the link."
        )
    return path


def own_card(card: Path, repo: str, base: str | None) -> bytes:
    """A card as it lies there, for the repository ``repo`` and on the base model ``base``."""
    try:
        text = read_small(card).decode("utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{card} cannot be read as text ({error}); mend or remove it.") from error
    return with_place(on_base(text, base, card), repo).encode()


def is_text(card: Path) -> bool:
    """Whether a card is there, and not empty."""
    return card.is_file() and bool(card.read_text("utf-8", errors="replace").strip())
