"""Models on the hub: the settings first, the weights once those are found good.

Log-in is the hub client's own: a token in the environment (``HF_TOKEN``) or the one it keeps after
``hf auth login``. Downloads show its progress on standard error and go on where they stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from halfbyte.errors import ModelError
from halfbyte.model.disk import require_space
from halfbyte.model.wording import reason

SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "README.md")
_WEIGHTS = ("*.safetensors",)
# Folders hold other formats of the same weights, as does Mistral's consolidated file.
_NOT_WANTED = ("*/*", "consolidated*", "adapter_*")


@dataclass(frozen=True)
class HubModel:
    """A model of which the settings are in ``folder`` and the weights may not be yet."""

    name: str
    commit: str
    folder: Path
    to_fetch: dict[str, int]  # weight file: bytes; of those that are not on this machine
    gguf: bool  # the weights are a GGUF file, which holds the settings too

    def fetch_weights(self) -> None:
        """Download the weights into ``folder``, after a look at the disk."""
        if not self.to_fetch:
            return
        require_space(self.folder, sum(self.to_fetch.values()), f"the weights of {self.name}")
        with _one_sentence(self.name):
            _snapshot(self.name, self.commit, list(self.to_fetch))


def looks_like_hub_name(name: str) -> bool:
    """``owner/name`` or ``name``, and not a path in disguise."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def find_hub_model(name: str, revision: str | None) -> HubModel:
    """Look the model up on the hub and download its settings.

    Without a network, a snapshot that is complete on this machine is taken. Raises ModelError for
    no such model, a licence that is not accepted, no network, and a repository without
    safetensors or GGUF weights.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    with _one_sentence(name):
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=20)
        except HfHubHTTPError:
            raise
        except _no_network():
            return _cached(name, revision)
        sizes = {f.rfilename: int(f.size or 0) for f in info.siblings or [] if _wanted(f.rfilename)}
        weights = _weights(name, sizes, [f.rfilename for f in info.siblings or []])
        # By the revision's name, so that the client notes which commit it was, for when it is
        # asked offline; what follows keeps to that commit.
        folder = Path(_snapshot(name, revision, list(SETTINGS)))
    commit = folder.name
    lacking = {
        file: sizes[file]
        for file in weights
        if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)
    }
    return HubModel(name, commit, folder, lacking, weights[0].endswith(".gguf"))


def _snapshot(
    name: str, revision: str | None, patterns: list[str], local_files_only: bool = False
) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        name,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=list(_NOT_WANTED),
        local_files_only=local_files_only,
    )


def _cached(name: str, revision: str | None) -> HubModel:
    from huggingface_hub.errors import LocalEntryNotFoundError

    absent = ModelError(
        f"{name} is not on this machine, or not all of it, and the hub cannot be reached: check "
        "the network and HF_HUB_OFFLINE, or name a local folder."
    )
    try:
        folder = Path(_snapshot(name, revision, [*SETTINGS, *_WEIGHTS], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise absent from error
    if not any(file.suffix in (".safetensors", ".gguf") for file in folder.iterdir()):
        raise absent
    return HubModel(name, folder.name, folder, {}, any(folder.glob("*.gguf")))


def _wanted(file: str) -> bool:
    return not any(fnmatch(file, pattern) for pattern in _NOT_WANTED)


def _weights(name: str, sizes: dict[str, int], everything: list[str]) -> list[str]:
    """The files that hold the model's weights."""
    weights = [file for file in sizes if any(fnmatch(file, w) for w in _WEIGHTS)]
    if weights:
        return weights
    ggufs = [file for file in sizes if file.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelError(
            f"{name} holds {len(ggufs)} GGUF files: download one of them and name that file."
        )
    pickled = [file for file in everything if file.endswith((".bin", ".pt", ".pth"))]
    why = (
        f"are pickled ({pickled[0]}), which can run code when read"
        if pickled
        else "are in none of the formats that are read"
    )
    raise ModelError(
        f"the weights of {name} {why}; halfbyte reads only safetensors and GGUF, so choose a "
        "copy in one of those."
    )


def _no_network() -> tuple[type[Exception], ...]:
    """What the client raises where no answer came; answers that are errors derive from it too.

    The class belongs to the HTTP library below it, which differs between its versions.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return (
        OfflineModeIsEnabled,
        next(c for c in HfHubHTTPError.mro() if c.__name__ == "HTTPError"),
    )


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn the hub client's errors into a ModelError."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is given only to those who accept its licence: accept it on "
            f"{constants.ENDPOINT}/{name} and log in (hf auth login, or HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no such revision on the hub: see model.revision.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"{name} is no file or folder of this machine, and the hub has no model of that name "
            "that this log-in may see: check the name."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"the hub does not give {name}: {reason(error)}.") from error
    except _no_network() as error:
        raise ModelError(
            f"the connection to the hub failed while {name} was downloaded ({reason(error)}): "
            "start again, and it goes on where it stopped."
        ) from error
    except OSError as error:
        raise ModelError(f"{name} could not be kept on this disk: {reason(error)}.") from error
