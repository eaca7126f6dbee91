"""Changing what a module does without replacing it: the same object gets a subclass of its own class.

So names, `isinstance`, hooks and `save_pretrained` keep working, and leaving is giving the class back.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Mixin(nn.Module):
    """Base of what is put in front of a module's class; `super()` leads to the next mixin and at last to the class."""

    own_class: ClassVar[type[nn.Module]]
    """The class of the module without mixins."""
    mixins: ClassVar[tuple[type[Mixin], ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The subclass has no importable name; pickle and copy rebuild it from what it is made of.
        return _bare, (self.own_class, self.mixins), self.__dict__


def add_mixin(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin in front of the module's class; nothing if it is there."""
    own, mixins = _parts(module)
    if mixin not in mixins:
        module.__class__ = _mixed(own, (mixin, *mixins))


def drop_mixin(module: nn.Module, mixin: type[Mixin]) -> None:
    """Take a mixin off; without the last one the module has its own class again."""
    own, mixins = _parts(module)
    module.__class__ = _mixed(own, tuple(other for other in mixins if other is not mixin))


def _parts(module: nn.Module) -> tuple[type[nn.Module], tuple[type[Mixin], ...]]:
    return (module.own_class, module.mixins) if isinstance(module, Mixin) else (type(module), ())


_MIXED: dict[tuple[type, ...], type[nn.Module]] = {}


def _mixed(own: type[nn.Module], mixins: tuple[type[Mixin], ...]) -> type[nn.Module]:
    """The one class made of these."""
    if not mixins:
        return own
    made_of = (*mixins, own)
    if made_of not in _MIXED:
        name = "".join(cls.__name__ for cls in made_of)
        _MIXED[made_of] = type(name, made_of, {"__module__": own.__module__, "own_class": own, "mixins": mixins})
    return _MIXED[made_of]


def _bare(own: type[nn.Module], mixins: tuple[type[Mixin], ...]) -> nn.Module:
    mixed = _mixed(own, mixins)
    return mixed.__new__(mixed)
