"""Errors for the person at the keyboard: the message is one sentence with a way out."""


class PlanError(ValueError):
    """What was asked for cannot be run; the message says what was expected."""


class CheckpointError(OSError):
    """A checkpoint cannot be made, found or written."""
