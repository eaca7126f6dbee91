"""The errors that lorafamily raises. Every message says what was wrong, where, and what would be right."""


class LoraFamilyError(ValueError):
    """Base of all errors that this package raises on purpose: a `ValueError`, because the caller can correct it."""


class MethodError(LoraFamilyError):
    """An unknown method, an option that it does not have, or methods that cannot be combined."""


class TargetError(LoraFamilyError):
    """Targets that match nothing, or match layers that cannot carry an adapter."""


class BudgetError(LoraFamilyError):
    """A budget or rank that is not positive, or too small for the matched layers."""


class StateError(LoraFamilyError):
    """The model is not in the state that the call needs: a name is taken or unknown, merged, without adapters."""


class FileError(LoraFamilyError):
    """An adapter folder that is missing, damaged, or made for another model."""


class AllocationError(LoraFamilyError):
    """A rank schedule whose settings are impossible."""


class DataError(LoraFamilyError):
    """Batches that are missing, empty, or of a form that the model does not take."""


class TrainingError(LoraFamilyError):
    """A run that must not continue: no gradient reaches an adapter, or a value is not finite."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is not finite: the run diverged, though the model is set up correctly."""
