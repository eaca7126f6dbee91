"""Which tensors of a checkpoint become which of the model's.

transformers renames tensors when it loads them, and joins or splits some: the experts that a checkpoint of Mixtral
holds one by one are one 3-D parameter in the model. To find tensors as `from_pretrained` does, this file runs
transformers' own code on its conversion tables. Only names and shapes are read; the model is on the meta device.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafamily.deploy.folder import check_there, in_one_line, read_json
from lorafamily.errors import FileError
from lorafamily.layers.quantised import shapes_of

CONFIG = "config.json"


@dataclass(frozen=True)
class Group:
    """Tensors on disk that together become tensors of the model; mostly one that becomes one and is only renamed.

    `first`: the model's tensor; of several the one by which transformers collects them. `sources`: for each name on
    disk, in the order in which they are joined, the pattern that it matched. `transform`: transformers' conversion that
    joins and splits the tensors of `model`; None where they are only renamed. `disk_names`: the names on disk, by those
    that the reversed conversion yields.
    """

    first: str
    sources: Mapping[str, str | None]
    transform: Any = None
    model: Any = None
    disk_names: Mapping[str, str] = field(default_factory=dict)

    def in_memory(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from those on disk."""
        if self.transform is None:
            return {self.first: stored[next(iter(self.sources))]}
        transform = copy.deepcopy(self.transform)
        for name, pattern in self.sources.items():
            transform.add_tensor(self.first, name, pattern, stored[name])
        return self._converted(transform, self.first)

    def on_disk(self, in_memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk from the model's; the inverse of `in_memory`.

        Raises:
            ValueError: the conversion has no way back from them.
        """
        if self.transform is None:
            return dict.fromkeys(self.sources, in_memory[self.first])
        transform = self.transform.reverse_transform()
        firsts = set()
        for name, value in in_memory.items():
            first, pattern = transform.rename_source_key(name)
            if pattern is None:
                raise ValueError(f"no way back from {name}")
            transform.add_tensor(first, name, pattern, value)
            firsts.add(first)
        if len(firsts) > 1:
            raise ValueError(f"{' and '.join(in_memory)} go back to different tensors")
        found = self._converted(transform, firsts.pop())
        return {self.disk_names.get(name, name): value for name, value in found.items()}

    def _converted(self, transform: Any, first: str) -> dict[str, Tensor]:
        found = transform.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


@dataclass
class Names:
    """Where a checkpoint has the tensors of a model.

    `prefix`: what the adapter's names begin with and the model's do not. `groups`, `tied`, `refused`: by name in the
    model, the group that holds a tensor; the names that the config ties to it; why no group could hold it.
    `knows_ties`: whether a model of transformers told what the config ties. `parameters`: the shapes of the parameters
    of the model that the adapter was made for, with the checkpoint's config; None where its class is not known.
    """

    prefix: str = ""
    groups: dict[str, Group] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    knows_ties: bool = False
    parameters: dict[str, tuple[int, ...]] | None = None

    def of(self, name: str) -> Group | None:
        """The group that holds a tensor that the adapter calls by this name; None where the checkpoint has none."""
        return self.groups.get(name.removeprefix(self.prefix)) if name.startswith(self.prefix) else None

    def why_not(self, name: str) -> str:
        """Why `of` finds no group."""
        return self.refused.get(name.removeprefix(self.prefix), "is missing")

    def partners(self, name: str) -> tuple[str, ...]:
        """The names that the config ties to this one, itself among them."""
        partners = self.tied.get(name.removeprefix(self.prefix), ())
        return tuple(self.prefix + partner for partner in partners) or (name,)


def config_of(base: Path) -> dict[str, Any]:
    """A checkpoint's config; empty where there is none."""
    config = read_json(base / CONFIG, "") if (base / CONFIG).is_file() else {}
    return config if isinstance(config, dict) else {}


def names_of(base: Path, stored: Mapping[str, tuple[int, ...]], architecture: str, wanted: Iterable[str]) -> Names:
    """Where a checkpoint has the tensors of a model.

    If transformers does not have the model's class, names on disk are those in the model. If such a class wraps a
    model of transformers, and the checkpoint is of that one, names on disk lack the prefix that the wrapper adds.

    Args:
        base: the checkpoint's folder; its config.json is read.
        stored: shapes by name on disk.
        architecture: the class of the model that the adapter was made for.
        wanted: names in that model.

    Raises:
        FileError: the config is missing, or is not one of that architecture.
    """
    if (made_for := _class_of(architecture)) is not None:
        model = _on_meta(made_for, base)
        return replace(_found(model, stored), parameters=shapes_of(model))
    wanted = list(wanted)
    for name in config_of(base).get("architectures") or ():
        if (inside := _class_of(str(name))) is not None:
            names = _found(_on_meta(inside, base), stored)
            return replace(names, prefix=_prefix(wanted, names.groups))
    unchanged = {name: Group(name, {name: None}) for name in stored}
    return Names(_prefix(wanted, unchanged), unchanged)


def _prefix(wanted: list[str], groups: Mapping[str, Group]) -> str:
    """The shortest prefix without which the wanted names that begin with it are in `groups`; "" if there is none."""
    parts = next(iter(wanted), "").split(".")
    for length in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:length])
        if all(name.removeprefix(prefix) in groups for name in wanted if name.startswith(prefix)):
            return prefix
    return ""


def _class_of(architecture: str) -> Any:
    """A model class of transformers whose checkpoints are converted by tables; None where there is no such class."""
    try:
        import transformers
        from transformers import core_model_loading  # noqa: F401 - not before transformers 5
    except ImportError:
        return None
    found = getattr(transformers, architecture, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _on_meta(cls: Any, base: Path) -> Any:
    """A model of this class with the checkpoint's config, which must be there and of this class."""
    import transformers

    check_there(base / CONFIG, "a checkpoint has the config of its model")
    model_type = config_of(base).get("model_type")
    known = transformers.CONFIG_MAPPING
    try:
        config = known[model_type].from_json_file(base / CONFIG) if model_type in known else None
        if config is not None and not isinstance(config, cls.config_class):
            # That of the text model is in a vision-language model's config.
            inside = getattr(config, getattr(cls.config_class, "base_config_key", ""), None)
            if isinstance(inside, cls.config_class):
                config = inside
            elif not _given(cls, config.model_type):
                config = None
        if config is not None:
            with torch.device("meta"):
                return cls._from_config(config)
    except Exception as error:  # a constructor can raise anything
        raise FileError(
            f"{base / CONFIG}: no {cls.__name__} can be made of it to find names by ({in_one_line(error)})"
        ) from None
    raise FileError(
        f"{base / CONFIG}: of model_type {model_type!r}, which {cls.__name__}, the model that the adapter was made "
        "for, is not"
    )


def _given(cls: Any, model_type: str) -> bool:
    """Whether an auto class makes models of this class from another's config, as LlamaForCausalLM from InternLM3's."""
    from transformers.models.auto import modeling_auto

    tables = [names for at, names in vars(modeling_auto).items() if at.endswith("_MAPPING_NAMES")]
    found = [names.get(model_type) for names in tables]
    return any(cls.__name__ in (names if isinstance(names, tuple) else (names,)) for names in found)


def _found(model: Any, stored: Mapping[str, tuple[int, ...]]) -> Names:
    """Where a checkpoint has the tensors of a model of transformers, as its loading finds them."""
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
    names = Names(knows_ties=True)
    for first, sources in collected.items():
        patterns = set(sources.values())
        if patterns == {None} and len(sources) == 1:
            names.groups[first] = Group(first, sources)
        elif None in patterns or len({id(by_pattern[str(pattern)]) for pattern in patterns}) > 1:
            names.refused[first] = f"is in the checkpoint more than once, as {' and as '.join(sources)}"
        else:
            transform = by_pattern[str(next(iter(patterns)))]
            disk_names = {halfway[name]: name for name in sources}
            _add_group(names, Group(first, sources, transform, model, disk_names), stored, state)
    # What the config ties. If the checkpoint holds both, transformers ties them only where they are equal.
    targets_of: dict[str, list[str]] = defaultdict(list)
    for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        targets_of[source].append(target)
    for source, targets in targets_of.items():
        names.tied |= dict.fromkeys([source, *targets], (source, *targets))
    return names


def _moved(halfway: str, bare: str, renamed: str) -> str:
    """A name with the prefix added or removed that made `renamed` of `bare`."""
    if renamed.endswith(bare):
        return renamed.removesuffix(bare) + halfway
    return halfway.removeprefix(bare.removesuffix(renamed))


def _add_group(names: Names, group: Group, stored: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Add a group, or why there is none: joining and splitting tensors without values must restore names and shapes."""
    shapes = {name: torch.empty(stored[name], device="meta") for name in group.sources}
    try:
        joined = group.in_memory(shapes)
        again = {name: value.shape for name, value in group.on_disk(joined).items()}
    except Exception as error:  # models may define operations of their own, which can raise anything
        names.refused[group.first] = f"cannot be put back as it is on disk ({in_one_line(error)})"
        return
    for target, value in joined.items():
        if target not in state or state[target].shape != value.shape:
            wanted = list(state[target].shape) if target in state else "no tensor of the model"
            shape, source = list(value.shape), next(iter(shapes))
            names.refused[group.first] = f"comes out as {shape} from {source} and others, not {wanted}"
            return
    if again != {name: value.shape for name, value in shapes.items()}:
        lost = sorted(shapes.keys() ^ again.keys()) or [name for name in shapes if again[name] != shapes[name].shape]
        names.refused[group.first] = f"cannot be put back as it is on disk ({lost[0]} would not come back)"
        return
    names.groups |= dict.fromkeys(joined, group)
