"""Merging into a checkpoint on disk, tensor by tensor, so that a model larger than memory can be merged.

Shapes and dtypes stay, so the headers and the division into shards stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorafamily.deploy.checkpoint_changes import Change, changes_of
from lorafamily.deploy.checkpoint_entries import Entry, entries_of, is_weights, read_entry, refuse_used
from lorafamily.deploy.conversion import Group
from lorafamily.deploy.folder import bits_of
from lorafamily.deploy.saved import Saved
from lorafamily.errors import FileError

CHUNK = 1 << 24  # bytes copied at a time


def merge_checkpoint(
    base: Path, saved: Saved, out: Path, progress: Callable[[int], None] = lambda written: None
) -> None:
    """Write into `out` the checkpoint `base` with an adapter merged into its weights.

    The tensors are bitwise those that merging in memory and saving gives, since weights are rounded as `merge` rounds
    them. Everything is checked before anything is written; the folder is written next to its place and renamed into it.
    One tensor is in memory at a time, or those that the model joins into one: all experts of a layer. Where `save`
    noted hashes of the adapted weights, these are read once more, before anything is written.

    `progress`: called after every piece that was written, with its size in bytes.

    Raises:
        FileError: there is no checkpoint, the adapter was made for another (or for other weights, if `save` noted their
            hashes), a tensor is stored in a form that cannot be restored after loading, or `out` is not empty.
        StateError: in the model an adapted weight is tied to another, which merging would change too, or what is one
            trained tensor in the model is not one in the checkpoint.
    """
    refuse_used(out)
    entries = entries_of(base)
    changed = _ChangedTensors(*changes_of(saved, entries, base), entries)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a merge that was killed
    partial.mkdir(parents=True)
    try:
        files = {entry.file for entry in entries.values()}
        for file in sorted(base.iterdir()):
            if file in files:
                _rewrite(file, changed, partial / file.name, progress)
            elif file.is_file() and not is_weights(file):
                shutil.copyfile(file, partial / file.name)  # config, tokenizer; no weights in other formats
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # exists only after a failure


class _ChangedTensors:
    """The tensors on disk that merging changes: the model's are joined from them, changed, and split again.

    All tensors of one group are computed at once and kept until they are written.
    """

    def __init__(self, changes: Mapping[str, Change], group_of: Mapping[str, Group], entries: Mapping[str, Entry]):
        self.changes, self.group_of, self.entries = changes, group_of, entries
        self.ready: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, name: str) -> Tensor:
        """The new value of a tensor on disk; to be called once for each.

        Raises:
            FileError: joining and splitting unchanged tensors would not give back what is on disk.
        """
        if name not in self.ready:
            group = self.group_of[name]
            stored = {source: read_entry(self.entries[source]) for source in group.sources}
            in_memory = group.in_memory(stored)
            if group.transform is not None:  # transformers' operations, which may lose something unnoticed
                for source, again in group.on_disk(in_memory).items():
                    if not torch.equal(bits_of(again), bits_of(stored[source])):
                        file = self.entries[source].file
                        raise FileError(f"{file}: {source} would not come back from the model as it is on disk")
            del stored
            for target in in_memory.keys() & self.changes.keys():
                in_memory[target] = self.changes[target](in_memory[target])
            self.ready |= group.on_disk(in_memory)
        return self.ready.pop(name)


def _rewrite(source: Path, changed: _ChangedTensors, target: Path, progress: Callable[[int], None]) -> None:
    """Copy a safetensors file, with the changed tensors in place of the old ones."""
    with open(source, "rb") as old, open(target, "wb") as new:
        here = [(name, changed.entries[name]) for name in changed.group_of if changed.entries[name].file == source]
        for name, entry in sorted(here, key=lambda item: (item[1].begin, item[1].end)):
            _copy(old, new, entry.begin - old.tell(), progress)
            value = changed.take(name)
            new.write(bits_of(value).numpy().tobytes() if value.numel() else b"")
            old.seek(entry.end)
            progress(entry.end - entry.begin)
        _copy(old, new, source.stat().st_size - old.tell(), progress)


def _copy(old: BinaryIO, new: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    while size > 0:
        chunk = old.read(min(size, CHUNK))
        new.write(chunk)
        progress(len(chunk))
        size -= len(chunk)
