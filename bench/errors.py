"""What ends a command with a sentence: an error with exit code 2, or a pause with 0."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from the user: says what was given, what is allowed and what to do next."""


class SharedError(UserError):
    """One that all processes meet together, so the first one alone tells it and gives the exit code."""


class Paused(Exception):
    """The time that was given is up: not an error, and the same command goes on."""
