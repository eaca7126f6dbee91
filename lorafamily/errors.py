"""The errors that lorafamily raises. Every message says what was asked, where, and what would be right."""


class LoraFamilyError(ValueError):
    """Base of everything this package raises on purpose; a `ValueError`, because the caller can mend it."""


class MethodError(LoraFamilyError):
    """An unknown method, an option no part of it takes, or a combination without meaning."""


class TargetError(LoraFamilyError):
    """Targets that match nothing, or something that cannot carry an adapter."""


class BudgetError(LoraFamilyError):
    """A budget or rank that is no positive number, or too small for the matched layers."""


class StateError(LoraFamilyError):
    """The model is not in the state the call needs: name taken or unknown, merged, without adapters."""


class FileError(LoraFamilyError):
    """An adapter folder that is missing, damaged, or made for another model."""


class AllocationError(LoraFamilyError):
    """A rank schedule that cannot run as set."""


class DataError(LoraFamilyError):
    """Batches that are missing, empty, or not what the model takes."""


class TrainingError(LoraFamilyError):
    """A run that must not go on: no gradient reaches an adapter, or a number is not finite."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is not finite: the run diverged, where nothing is wrong with the model."""
