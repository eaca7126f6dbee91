"""Which tensors of a checkpoint are which of the model's.

transformers renames what it loads, and puts tensors together or takes them apart: experts that a checkpoint of Mixtral
holds one by one are one 3-D parameter in the model. Its own code is run here on its tables, so that names are found as
`from_pretrained` finds them. Only names and shapes are read; the model is on the meta device.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafamily.deploy.folder import read_json
from lorafamily.errors import FileError

CONFIG = "config.json"


@dataclass(frozen=True)
class Group:
    """Tensors on disk that become tensors of the model together, mostly one that becomes one and is only renamed.

    `sources`: names on disk, in the order in which they are put together; `targets`: names in the model; `converter`:
    what transformers puts them together with, None where they are only renamed.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    converter: _Converter | None = None

    def in_memory(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from those on disk."""
        if self.converter is None:
            return {self.targets[0]: stored[self.sources[0]]}
        return self.converter.forward({name: stored[name] for name in self.sources})

    def on_disk(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk from the model's; the inverse of `in_memory`."""
        if self.converter is None:
            return {self.sources[0]: held[self.targets[0]]}
        return self.converter.back({name: held[name] for name in self.targets})


@dataclass
class Names:
    """The names of a model's tensors, and where a checkpoint has them.

    `prefix`: what the adapter's names begin with and the model's do not. `tied`: names in the model that are one tensor
    there, if the checkpoint does not hold them apart.
    """

    prefix: str = ""
    groups: dict[str, Group] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Group | None:
        """What holds a tensor that the adapter calls by that name; None where the checkpoint has nothing for it."""
        return self.groups.get(name.removeprefix(self.prefix)) if name.startswith(self.prefix) else None

    def why_not(self, name: str) -> str:
        """Why a tensor is not to be found."""
        return self.refused.get(name.removeprefix(self.prefix), "is missing")

    def partners(self, name: str) -> tuple[str, ...]:
        """The names of all that are one tensor with this one in the model, itself among them."""
        partners = self.tied.get(name.removeprefix(self.prefix), ())
        return tuple(self.prefix + partner for partner in partners) or (name,)


def names_of(base: Path, stored: Mapping[str, tuple[int, ...]], architecture: str, wanted: Iterable[str]) -> Names:
    """Where a checkpoint has the tensors of a model.

    Of a class that transformers does not have, names on disk are those in the model; where such a class wraps a model
    that the checkpoint is of, without what they begin with.

    Args:
        base: the checkpoint's folder; its config.json is read.
        stored: shapes by name on disk.
        architecture: the class of the model that the adapter was made for.
        wanted: names in that model.

    Raises:
        FileError: the config is missing, or is not one of that architecture.
    """
    wanted = list(wanted)
    own = _class_of(architecture)
    if own is not None:
        read_json(base / CONFIG, "a checkpoint has the config of its model")
        return _found(_on_meta(own, base), stored)
    if (base / CONFIG).is_file():
        config = read_json(base / CONFIG, "")
        for name in (config.get("architectures") or ()) if isinstance(config, dict) else ():
            if (inner := _class_of(str(name))) is not None:
                names = _found(_on_meta(inner, base), stored)
                names.prefix = _prefix(wanted, names.groups)
                return names
    plain = {name: Group((name,), (name,)) for name in stored}
    return Names(_prefix(wanted, plain), plain)


def _prefix(wanted: Iterable[str], groups: Mapping[str, Group]) -> str:
    """The beginning of the wanted names without which all that have it are names of the model; "" if there is none."""
    parts = next(iter(wanted), "").split(".")
    for length in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:length])
        inside = [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]
        if all(name in groups for name in inside):
            return prefix
    return ""


def _class_of(architecture: str) -> Any:
    """A model class of transformers whose checkpoints are converted by tables; None where there is no such thing."""
    try:
        import transformers
        from transformers import core_model_loading  # noqa: F401 - not before transformers 5
    except ImportError:
        return None
    found = getattr(transformers, architecture, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _on_meta(cls: Any, base: Path) -> Any:
    import transformers

    said = read_json(base / CONFIG, "a checkpoint has the config of its model")
    model_type = said.get("model_type") if isinstance(said, dict) else None
    known = transformers.CONFIG_MAPPING
    config = known[model_type].from_dict(said) if model_type in known else None
    if config is not None and not isinstance(config, cls.config_class):
        inner = getattr(cls.config_class, "base_config_key", "")
        config = getattr(config, inner, None) if inner else None  # the text model of one that sees, too
    if not isinstance(config, cls.config_class):
        raise FileError(
            f"{base / CONFIG}: of model_type {model_type!r}, which {cls.__name__}, the model that the adapter was made "
            "for, is not"
        )
    try:
        with torch.device("meta"):
            return cls._from_config(config)
    except Exception as error:  # whatever a constructor wants that is not there
        why = " ".join(str(error).split())
        raise FileError(
            f"{base / CONFIG}: no {cls.__name__} can be made of it to find names by ({type(error).__name__}: {why})"
        ) from None


def _found(model: Any, stored: Mapping[str, tuple[int, ...]]) -> Names:
    """The names of a model of transformers on disk, as its loading finds them."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, dict[str, str | None]] = defaultdict(dict)
    halfway: dict[str, str] = {}
    for name in sorted(stored, key=loading.dot_natural_key):
        bare, _ = loading.rename_source_key(name, renamings, converters)
        renamed, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if renamed in state:
            collected[renamed][name] = pattern
            if pattern is not None:
                halfway[name] = _moved(loading.apply_renamings(name, renamings), bare, renamed)
    names = Names()
    for first, sources in collected.items():
        patterns = set(sources.values())
        if patterns == {None} and len(sources) == 1:
            names.groups[first] = Group(tuple(sources), (first,))
        elif None in patterns or len({id(by_pattern[str(pattern)]) for pattern in patterns}) > 1:
            names.refused[first] = f"is in the checkpoint more than once, as {' and as '.join(sources)}"
        else:
            transform = by_pattern[str(next(iter(patterns)))]
            converter = _Converter(transform, first, {k: str(v) for k, v in sources.items()}, halfway, model)
            _add(names, converter, stored, state, first)
    _add_tied(names, model)
    return names


def _moved(halfway: str, bare: str, renamed: str) -> str:
    """A name with the same prefix put before it, or taken from it, as made `renamed` of `bare`."""
    if renamed.endswith(bare):
        return renamed.removesuffix(bare) + halfway
    return halfway.removeprefix(bare.removesuffix(renamed))


def _add(
    names: Names, converter: _Converter, stored: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], first: str
) -> None:
    """Note a group, tried on tensors without values: whatever does not come back as it was is refused."""
    shapes = {name: torch.empty(stored[name], device="meta") for name in converter.sources}
    try:
        held = converter.forward(shapes)
        group = Group(tuple(shapes), tuple(held), converter)
        again = {name: value.shape for name, value in converter.back(held).items()}
    except Exception as error:  # its operations are anybody's
        why = " ".join(str(error).split()) or "no way back"
        names.refused[first] = f"cannot be put back as it is on disk ({type(error).__name__}: {why})"
        return
    for target, value in held.items():
        if target not in state or state[target].shape != value.shape:
            wanted = list(state[target].shape) if target in state else "no tensor of the model"
            names.refused[first] = f"comes out as {list(value.shape)} from {group.sources[0]} and others, not {wanted}"
            return
    if again != {name: value.shape for name, value in shapes.items()}:
        gone = sorted(shapes.keys() ^ again.keys()) or [name for name in shapes if again[name] != shapes[name].shape]
        names.refused[first] = f"cannot be put back as it is on disk ({gone[0]} would not come back)"
        return
    names.groups |= dict.fromkeys(group.targets, group)


def _add_tied(names: Names, model: Any) -> None:
    """Note what the config ties. Where the checkpoint holds both, transformers compares them when it loads."""
    of: dict[str, list[str]] = defaultdict(list)
    for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        of[source].append(target)
    for source, targets in of.items():
        names.tied |= dict.fromkeys([source, *targets], (source, *targets))


class _Converter:
    """A conversion of transformers on certain tensors, in both directions.

    `sources`: for each name on disk the pattern that it matched; `halfway`: its name after renaming, which the way back
    leads to.
    """

    def __init__(self, transform: Any, first: str, sources: dict[str, str], halfway: Mapping[str, str], model: Any):
        self.transform, self.first, self.sources, self.model = transform, first, sources, model
        self.disk_name = {halfway[name]: name for name in sources}

    def forward(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        transform = copy.deepcopy(self.transform)
        for name, pattern in self.sources.items():
            transform.add_tensor(self.first, name, pattern, stored[name])
        return self._converted(transform, self.first)

    def back(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        transform = self.transform.reverse_transform()
        firsts = set()
        for name, value in held.items():
            first, pattern = transform.rename_source_key(name)
            if pattern is None:
                raise ValueError(f"no way back from {name}")
            transform.add_tensor(first, name, pattern, value)
            firsts.add(first)
        if len(firsts) > 1:
            raise ValueError(f"{' and '.join(held)} go back to different tensors")
        found = self._converted(transform, firsts.pop())
        return {self.disk_name.get(name, name): value for name, value in found.items()}

    def _converted(self, transform: Any, first: str) -> dict[str, Tensor]:
        found = transform.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
