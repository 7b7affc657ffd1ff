"""Errors that the user can fix, and runs that failed."""


class UserError(Exception):
    """Something the user must change: a key, a value, a file.

    The message names the key or file, the value found there and what is allowed. The command line prints it
    as one line and exits with status 2.
    """


class FailedRun(Exception):
    """A run that must not become a row of a table; the message names method, round and client."""


class DivergedRun(FailedRun):
    """A run whose loss, update or score is no longer finite: its settings are at fault, not the machine."""
