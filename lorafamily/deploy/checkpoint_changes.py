"""What merging an adapter changes in a checkpoint on disk, checked against it.

Names on disk are often not those in the model, and neither are the tensors: `conversion.py` knows which are which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorafamily.deploy.checkpoint_entries import DTYPES, Entry
from lorafamily.deploy.conversion import CONFIG, Group, Names, names_of
from lorafamily.deploy.folder import listed, read_json
from lorafamily.deploy.merge import changed_weight
from lorafamily.deploy.saved import Saved
from lorafamily.errors import FileError, StateError
from lorafamily.layers.kinds import LayerKind
from lorafamily.layers.target import kind_of_record

Change = Callable[[Tensor], Tensor]


def changes_of(saved: Saved, entries: Mapping[str, Entry], base: Path) -> tuple[dict[str, Change], list[Group]]:
    """The change of each changed tensor, by its name in the model, and the groups that hold these tensors on disk.

    Raises:
        FileError: the adapter was not made for this checkpoint.
        StateError: an adapted weight is tied to another in the model, which would change too.
    """
    adapters: dict[str, list[tuple[str, LayerKind]]] = defaultdict(list)
    wrong = []
    for at, entry in saved.modules.items():
        kind = kind_of_record(entry)
        if kind is None:
            wrong.append(f"{at} is of a kind that is not registered here ({entry.get('kind')!r})")
            continue
        if entry.get("tied"):
            raise StateError(
                f"{' and '.join(entry['tied'])} are one tied tensor in the model: merging the adapter of {at} would "
                "change the others too; untie them (a clone of the weight) before merging"
            )
        adapters[kind.stored_as(at)].append((at, kind))
    shapes = {name: entry.shape for name, entry in entries.items()}
    names = names_of(base, shapes, saved.record["base"]["architecture"], [*adapters, *saved.extra_trained])
    groups: dict[int, Group] = {}
    changes: dict[str, Change] = {}
    for name, of in adapters.items():
        group = names.of(name)
        if group is None:
            wrong.append(f"{name} {names.why_not(name)}")
            continue
        _check_alone(name, names, base)
        shape = _shape_in_memory(group, name.removeprefix(names.prefix), entries, base)
        for at, kind in of:
            if (as_matrix := _as_matrix(kind, shape)) != saved.modules[at]["shape"]:
                wrong.append(f"{name} is {as_matrix} as (d_out, d_in), not {saved.modules[at]['shape']}")
        changes[name.removeprefix(names.prefix)] = partial(
            changed_weight, acting=[(kind, saved.adapters[at]) for at, kind in of]
        )
        groups[id(group)] = group
    for name, value in saved.extra_trained.items():
        together = _together(name, saved, names, base)
        found = [(other, group) for other in together if (group := names.of(other)) is not None]
        if not found:
            wrong.append(
                f"{name}, which trained along with the adapter, {names.why_not(name)}; save the model with it first"
            )
        for other, group in found:
            at = other.removeprefix(names.prefix)
            if (shape := _shape_in_memory(group, at, entries, base)) != tuple(value.shape):
                wrong.append(f"{other} is {list(shape)}, not {list(value.shape)}")
            changes[at] = partial(_instead, value=value)
            groups[id(group)] = group
    if wrong:
        raise FileError(f"{base}: not the checkpoint this adapter was made for: {listed(wrong)}{_if_quantised(base)}")
    return changes, [*groups.values()]


def _check_alone(name: str, names: Names, base: Path) -> None:
    """Refuse an adapted weight that loading the checkpoint would put in a second place.

    Raises:
        StateError: the config ties it to one that the checkpoint does not hold.
    """
    partners = [other for other in names.partners(name) if other != name]
    if without := [other for other in partners if names.of(other) is None]:
        raise StateError(
            f"{base}: {name} is {without[0]} too, by the config's tie_word_embeddings: merging would change both, and "
            "in the model that the adapter was made for they were apart; save that model with both, and merge into it"
        )


def _together(name: str, saved: Saved, names: Names, base: Path) -> tuple[str, ...]:
    """The names of all that take the value of what trained: itself, and what was tied to it in the model.

    Raises:
        StateError: it was not tied there, and the checkpoint's config ties it.
    """
    were = saved.record.get("tied", {}).get(name)
    if were is None:
        _check_alone(name, names, base)
        return (name,)
    apart = set(were) - set(names.partners(name))
    if missing := sorted(other for other in apart if names.of(other) is None):
        raise StateError(
            f"{base}: {' and '.join(were)} were one tied tensor in the model, and this checkpoint, whose config does "
            f"not tie them, has no {missing[0]}"
        )
    return tuple(were)


def _shape_in_memory(group: Group, name: str, entries: Mapping[str, Entry], base: Path) -> tuple[int, ...]:
    """The shape of a tensor of the model.

    Raises:
        FileError: its sources are not plain floating-point tensors of one dtype.
    """
    first = group.sources[0]
    for source in group.sources:
        if entries[source].dtype not in DTYPES:
            raise FileError(
                f"{base}: {source} is stored as {entries[source].dtype}; merging needs plain floating-point weights. "
                "Where it is quantised, merge into the checkpoint it was quantised from, which the adapter fits, or "
                "let lorafamily merge --dequantise bfloat16 write an ordinary one"
            )
        if entries[source].dtype != entries[first].dtype:
            raise FileError(
                f"{base}: {source} is {entries[source].dtype} and {first} {entries[first].dtype}, and both "
                "are in one tensor of the model; save the checkpoint in one dtype"
            )
    on_meta = {source: torch.empty(entries[source].shape, device="meta") for source in group.sources}
    return tuple(group.in_memory(on_meta)[name].shape)


def _if_quantised(base: Path) -> str:
    """A hint for messages where the checkpoint is quantised: packed weights have other names and shapes."""
    config = read_json(base / CONFIG, "") if (base / CONFIG).is_file() else {}
    if not isinstance(config, dict) or not config.get("quantization_config"):
        return ""
    return (
        "; by its config it is quantised: merge into the checkpoint it was quantised from, which the adapter fits, or "
        "let lorafamily merge --dequantise bfloat16 write an ordinary one"
    )


def _as_matrix(kind: LayerKind, shape: tuple[int, ...]) -> list[int]:
    try:
        return list(kind.matrix(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, IndexError):  # too few axes, or rows that the kind's parts do not share out
        return list(shape)


def _instead(weight: Tensor, value: Tensor) -> Tensor:
    return value.to(weight.dtype)
