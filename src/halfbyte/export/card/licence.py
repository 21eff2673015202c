"""Licences for a model card: of the base as the hub's metadata has it, of the data where known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from halfbyte.foreign_json import read_json
from halfbyte.model.folder import read_licence
from halfbyte.recipe.data_schema import DataRecipe

NOT_STATED = "not stated"

# The identifiers that the hub takes for ``license`` (hub docs, "Licenses"); a commit whose card
# has another one is refused.
_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0
odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 gemma grok2-community apple-amlr apple-ascl intel-research unknown other
"""
_KNOWN = frozenset(_NAMES.split())
# What the card of a model has and that of a data set has not.
_OF_A_MODEL = ("base_model", "library_name", "pipeline_tag", "model-index")


def licence_fields(licence: str | None) -> dict[str, Any]:
    """``license`` for the hub's metadata, with the name of one that the hub does not list."""
    if licence is None:
        return {}
    stated = licence.strip().lower()
    if stated in _KNOWN:
        return {"license": stated}
    name = re.sub(r"[^a-z0-9.]+", "-", stated).strip("-.")[:60]
    return {"license": "other", "license_name": name} if name else {"license": "other"}


def data_licences(data: DataRecipe) -> str:
    """What the sources of the rows say of their licence, in words; nothing is asked of a network.

    Looked at are a data set's card in the hub client's cache, the ``dataset_info.json`` of a folder
    that ``datasets`` saved, and a data set's card beside a file.
    """
    found = dict.fromkeys(_of_source(source.path) or NOT_STATED for source in data.all_sources)
    return ", ".join(found)


def _of_source(path: str) -> str | None:
    there = Path(path).expanduser()
    if there.is_dir():
        return _of_saved(there) or _of_card(there)
    if there.is_file():
        return _of_card(there.parent)
    return _of_hub(path)


def _of_saved(folder: Path) -> str | None:
    for info in (folder / "dataset_info.json", *sorted(folder.glob("*/dataset_info.json"))):
        try:
            found = read_json(info)
        except (OSError, ValueError):
            continue
        licence = found.get("license") if isinstance(found, dict) else None
        if isinstance(licence, str) and licence.strip():
            return licence.strip()
    return None


def _of_card(folder: Path) -> str | None:
    """The licence in the README of a folder, where that is the card of a data set."""
    licence = read_licence(folder)
    if licence is None:
        return None
    head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:100_000]
    is_model = any(re.search(rf"^{re.escape(key)}:", head, re.MULTILINE) for key in _OF_A_MODEL)
    return None if is_model else licence


def _of_hub(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        card = try_to_load_from_cache(name, "README.md", repo_type="dataset")
    except HFValidationError:
        return None
    return read_licence(Path(card).parent) if isinstance(card, str) else None
