"""The one exception that a user causes: the command line prints its message as one line and exits with code 2."""


class InputError(Exception):
    """Bad input. The message is one line: what was expected, what came, and what to do."""
