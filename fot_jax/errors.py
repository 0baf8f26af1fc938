"""Errors."""


class UserError(ValueError):
    """Bad input."""
