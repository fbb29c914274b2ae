"""The one error that the command line turns into a sentence and exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from the user: says what was given, what is allowed and what to do next."""
