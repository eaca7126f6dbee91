"""Merging into a checkpoint on disk, tensor by tensor: a model larger than memory can be merged.

Merging changes bytes only, so headers and shards stay as they are.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorafamily.deploy.checkpoint_changes import Change, changes_of
from lorafamily.deploy.checkpoint_entries import Entry, bits_of, entries_of, is_weights, read_entry, refuse_used
from lorafamily.deploy.conversion import Group
from lorafamily.deploy.saved import Saved
from lorafamily.errors import FileError


def merge_checkpoint(
    base: Path, saved: Saved, out: Path, progress: Callable[[int], None] = lambda written: None
) -> None:
    """Write into `out` the checkpoint `base` with an adapter merged into its weights.

    Weights are rounded as `merge` rounds them: the tensors are those that merging in memory and saving gives.
    Everything is checked before anything is written; the folder is written next to its place and renamed into it.
    `progress` is told how many bytes were written, again and again. In memory is one tensor at a time, or as many as
    are one in the model: all experts of a layer.

    Raises:
        FileError: no checkpoint there, or one that the adapter was not made for, or that holds tensors in a form from
            which there is no way back; or `out` is not empty.
        StateError: an adapted weight is tied to another in the model, which would change too; as in memory.
    """
    refuse_used(out)
    entries = entries_of(base)
    changes = _Changes(*changes_of(saved, entries, base), entries)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a merge that was killed; mostly there is none
    partial.mkdir(parents=True)
    try:
        by_file: dict[Path, list[tuple[str, Entry]]] = defaultdict(list)
        for name, entry in entries.items():
            by_file[entry.file].append((name, entry))
        for file in sorted(base.iterdir()):
            if file in by_file:
                _rewrite(file, by_file[file], changes, partial / file.name, progress)
            elif file.is_file() and not is_weights(file):
                shutil.copyfile(file, partial / file.name)  # config, tokenizer; no weights in other formats
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after a failure; once renamed it is not there


class _Changes:
    """The changed tensors on disk, by name: the model's tensors are put together from them, changed, and taken apart.

    All that belongs to one tensor of the model is computed at once, and kept until it is written.
    """

    def __init__(self, changes: Mapping[str, Change], groups: list[Group], entries: Mapping[str, Entry]):
        self.changes, self.entries = changes, entries
        self.group_of = {source: group for group in groups for source in group.sources}
        self.ready: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.group_of

    @torch.no_grad()
    def changed(self, name: str) -> Tensor:
        """The tensor of that name on disk, once.

        Raises:
            FileError: what is on disk does not come back the same if nothing is changed.
        """
        if name not in self.ready:
            group = self.group_of[name]
            stored = {source: read_entry(self.entries[source]) for source in group.sources}
            held = group.in_memory(stored)
            if group.converter is not None:  # transformers' operations are its own; a loss would not be seen
                for source, again in group.on_disk(held).items():
                    if not torch.equal(bits_of(again), bits_of(stored[source])):
                        file = self.entries[source].file
                        raise FileError(f"{file}: {source} would not come back from the model as it is on disk")
            del stored
            for at in group.targets:
                if at in self.changes:
                    held[at] = self.changes[at](held[at])
            self.ready |= group.on_disk(held)
        return self.ready.pop(name)


def _rewrite(
    source: Path, entries: list[tuple[str, Entry]], changes: _Changes, target: Path, progress: Callable[[int], None]
) -> None:
    """Copy a safetensors file, with the tensors that change put in their place."""
    changing = sorted((entry for entry in entries if entry[0] in changes), key=lambda entry: entry[1].begin)
    with open(source, "rb") as old, open(target, "wb") as new:
        for name, entry in changing:
            _copy(old, new, entry.begin - old.tell(), progress)
            changed = changes.changed(name)
            new.write(bits_of(changed).numpy().tobytes() if changed.numel() else b"")
            old.seek(entry.end)
            progress(entry.end - entry.begin)
        _copy(old, new, source.stat().st_size - old.tell(), progress)


def _copy(old: BinaryIO, new: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    while size > 0:
        chunk = old.read(min(size, CHUNK))
        new.write(chunk)
        progress(len(chunk))
        size -= len(chunk)


CHUNK = 1 << 24  # bytes copied at a time
