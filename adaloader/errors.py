"""Errors that users meet, each with the value at fault and the remedy in its message."""


class ManagedTableError(RuntimeError):
    """An operation reached a managed table that is neither a lookup nor handled otherwise."""


class WholeTableError(ManagedTableError):
    """A lookup that would read every row of a managed table."""


class UnsupportedOptimizerError(ValueError):
    """An optimizer (or one of its options) that managed tables cannot be trained with."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or loaded into this model: names the file and what is wrong."""
