"""Data sets that Hugging Face's `save_to_disk` wrote: state.json, which lists streams of arrow, beside them."""

from __future__ import annotations

import json
from typing import Any

from clipfast.data.places import exists, is_folder, read_bytes
from clipfast.engine.base import Source
from clipfast.engine.listing import Wanted
from clipfast.engine.tables import Tables
from clipfast.errors import ImageError, InputError

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def is_saved(place: str) -> bool:
    """Whether a folder is a saved data set, or the splits of one."""
    return exists(f"{place}/{_STATE}") or exists(f"{place}/{_SPLITS}")


def open_saved(place: str, wanted: Wanted) -> Source:
    """A saved data set as a source: its rows in order.

    Raises InputError for a folder that is none, or is damaged, and for one with several splits: one is to be named.
    """
    if not is_folder(place):
        raise InputError(f"there is no folder {place}: give the one that save_to_disk wrote.")
    if not exists(f"{place}/{_STATE}"):
        if not exists(f"{place}/{_SPLITS}"):
            raise InputError(f"{place} is no saved data set: it has neither {_STATE} nor {_SPLITS}.")
        splits = list(map(str, _json(place, _SPLITS).get("splits") or []))
        if not splits:
            raise InputError(f"{place} has no splits: {_SPLITS} lists none.")
        if len(splits) > 1:
            names = " or ".join(f"hf:{place}/{name}" for name in splits)
            raise InputError(f"{place} has the splits {', '.join(splits)}: name one, {names}.")
        return open_saved(f"{place}/{splits[0]}", wanted)
    state = _json(place, _STATE)
    if state.get("_indices_data_files"):
        raise InputError(f"{place} was saved by an old version of datasets, as a selection of rows: save it once more.")
    try:
        files = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{place}/{_STATE} is damaged: it does not list the files of data.") from error
    if not files:
        raise InputError(f"{place} is an empty data set: {_STATE} lists no data.")
    return Tables("saved", place, place, files, wanted)


def _json(place: str, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(read_bytes(place, name)))
    except ImageError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{place}/{name} is damaged: {error}.") from error
