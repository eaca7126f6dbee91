"""What merging an adapter changes in a checkpoint on disk, after checking that the adapter fits it.

Names and tensors on disk often differ from those in the model; `conversion.py` maps one to the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorafamily.deploy.checkpoint_entries import DTYPES, Entry, read_entry
from lorafamily.deploy.conversion import Group, Names, config_of, names_of
from lorafamily.deploy.folder import hash_of_bits, hash_of_shapes, listed
from lorafamily.deploy.merge import changed_weight
from lorafamily.deploy.saved import Saved, warn_of_other_base
from lorafamily.errors import FileError, StateError
from lorafamily.layers.kinds import LayerKind
from lorafamily.layers.target import kind_of_record

Change = Callable[[Tensor], Tensor]
INSTEAD = (
    "merge into the checkpoint it was quantised from, which the adapter fits, or let lorafamily merge --dequantise "
    "bfloat16 write an ordinary one"
)
"""What to do with a quantised checkpoint."""


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint, asked by the names that tensors have in the model that the adapter was made for."""

    base: Path
    entries: Mapping[str, Entry]
    names: Names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._in_memory(name, lambda entry: torch.empty(entry.shape, device="meta")).shape)

    def value(self, name: str) -> Tensor:
        return self._in_memory(name, read_entry)

    def _in_memory(self, name: str, read: Callable[[Entry], Tensor]) -> Tensor:
        """A tensor of the model that the checkpoint has, from plain floating-point tensors of one dtype."""
        group = self.names.of(name)
        assert group is not None
        sources = {source: self.entries[source] for source in group.sources}
        first = next(iter(sources))
        for source, entry in sources.items():
            if entry.dtype not in DTYPES:
                raise FileError(
                    f"{self.base}: {source} is stored as {entry.dtype}; merging needs plain floating-point weights. "
                    f"Where it is quantised, {INSTEAD}"
                )
            if entry.dtype != sources[first].dtype:
                raise FileError(
                    f"{self.base}: {source} is {entry.dtype} and {first} {sources[first].dtype}, and both "
                    "are in one tensor of the model; save the checkpoint in one dtype"
                )
        found = group.in_memory({source: read(entry) for source, entry in sources.items()})
        return found[name.removeprefix(self.names.prefix)]

    def refuse_tied(self, name: str) -> None:
        """Refuse a changed weight that the config ties to one that the checkpoint does not hold."""
        if absent := [at for at in self.names.partners(name) if at != name and self.names.of(at) is None]:
            raise StateError(
                f"{self.base}: {name} is {absent[0]} too, by the config's tie_word_embeddings: merging would change "
                "both, and in the model that the adapter was made for they were apart; save that model with both, and "
                "merge into it"
            )


def changes_of(saved: Saved, entries: Mapping[str, Entry], base: Path) -> tuple[dict[str, Change], dict[str, Group]]:
    """The change of each tensor by its name in the model, and the groups that hold these tensors by names on disk.

    If the adapted layers fit and the checkpoint's model has other parameters besides, a warning says so, as in `load`.

    Raises:
        FileError, StateError: as `merge_checkpoint`, of which this is the check.
    """
    adapters: dict[str, list[tuple[str, LayerKind]]] = defaultdict(list)
    wrong = []
    for at, entry in saved.modules.items():
        kind = kind_of_record(entry)
        if kind is None:
            wrong.append(f"{at} is of a layer kind that is not registered here ({entry.get('kind')!r})")
            continue
        if entry.get("tied"):
            raise StateError(
                f"{' and '.join(entry['tied'])} are one tied tensor in the model: merging the adapter of {at} would "
                "change the others too; untie them (a clone of the weight) before merging"
            )
        adapters[kind.stored_as(at)].append((at, kind))
    shapes = {name: entry.shape for name, entry in entries.items()}
    names = names_of(base, shapes, saved.record["base"]["architecture"], [*adapters, *saved.extra_trained])
    checkpoint = _Checkpoint(base, entries, names)
    groups: dict[str, Group] = {}
    changes: dict[str, Change] = {}
    for name, on_weight in adapters.items():
        group = names.of(name)
        if group is None:
            wrong.append(f"{name} {names.why_not(name)}")
            continue
        checkpoint.refuse_tied(name)
        shape = checkpoint.shape(name)
        misfits = [
            f"{name} is {as_matrix} as (d_out, d_in), not {saved.modules[at]['shape']}"
            for at, kind in on_weight
            if (as_matrix := _as_matrix(kind, shape)) != saved.modules[at]["shape"]
        ]
        wrong += misfits or _other_weights([at for at, _ in on_weight], name, saved, checkpoint)
        acting = [(kind, saved.adapters[at]) for at, kind in on_weight]
        changes[name.removeprefix(names.prefix)] = partial(changed_weight, acting=acting)
        groups |= dict.fromkeys(group.sources, group)
    for name, value in saved.extra_trained.items():
        named = [(other, names.of(other)) for other in _all_names(name, saved, checkpoint)]
        found = [(other, group) for other, group in named if group is not None]
        if not found:
            wrong.append(
                f"{name}, which trained along with the adapter, {names.why_not(name)}; save the model with it first"
            )
        for other, group in found:
            if (shape := checkpoint.shape(other)) != tuple(value.shape):
                wrong.append(f"{other} is {list(shape)}, not {list(value.shape)}")
            changes[other.removeprefix(names.prefix)] = value.to  # the weight on disk gives the dtype
            groups |= dict.fromkeys(group.sources, group)
    if wrong:
        hint = f"; by its config it is quantised: {INSTEAD}" if config_of(base).get("quantization_config") else ""
        raise FileError(f"{base}: not the checkpoint this adapter was made for: {listed(wrong)}{hint}")
    if names.parameters is not None:
        warn_of_other_base(saved, hash_of_shapes(names.parameters), str(base))
    return changes, groups


def _all_names(name: str, saved: Saved, checkpoint: _Checkpoint) -> list[str]:
    """The names in the model of an extra trained parameter: its own, and those of weights that were tied to it. Refused
    if it was tied in the model and not in the checkpoint, or the other way round: a tensor would be missing, or be
    overwritten that is another."""
    tied: list[str] | None = saved.record.get("tied", {}).get(name)
    if tied is None:
        checkpoint.refuse_tied(name)
        return [name]
    names = checkpoint.names
    were = f"{checkpoint.base}: {' and '.join(tied)} were one tied tensor in the model"
    stored = [other for other in tied if names.of(other) is not None]
    untied = [other for other in tied if other not in names.partners(name)]
    if missing := sorted(set(untied) - set(stored)):
        raise StateError(f"{were}, and this checkpoint, whose config does not tie them, has no {missing[0]}")
    if untied and names.knows_ties:
        raise StateError(
            f"{were}, and the config of this checkpoint does not tie them: {untied[0]} would be overwritten; merge "
            "into a checkpoint that ties them, or train with a base of which they are apart"
        )
    copies = stored if len(stored) > 1 else []
    values = {other: checkpoint.value(other) for other in copies}
    if other := next((at for at, value in values.items() if not torch.equal(value, values[stored[0]])), None):
        raise StateError(
            f"{were}, and this checkpoint has another value for {other} than for {stored[0]}, so that transformers "
            "would load them untied; merge into the checkpoint that the adapter was trained on"
        )
    return tied


def _other_weights(adapted: list[str], name: str, saved: Saved, checkpoint: _Checkpoint) -> list[str]:
    """The targets whose weight is not the one that `save(hash_base=True)` noted.

    The model may have had another dtype than the checkpoint: then its weights were these in that dtype.
    """
    noted = {at: saved.modules[at]["weight_hash"] for at in adapted if "weight_hash" in saved.modules[at]}
    if not noted:
        return []
    weight = checkpoint.value(name)
    dtypes = [weight.dtype, *(dtype for dtype in DTYPES.values() if dtype != weight.dtype)]
    if any(set(noted.values()) == {hash_of_bits(weight.to(dtype))} for dtype in dtypes):
        return []
    return [f"{at} has other weights" for at in noted]


def _as_matrix(kind: LayerKind, shape: tuple[int, ...]) -> list[int]:
    try:
        return list(kind.matrix(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, IndexError):  # too few axes, or rows that do not divide into the layer kind's parts
        return list(shape)
