"""What a reader leaves out or changes of a scene that it can still read, said on the terminal."""

import sys


def say_note(text: str) -> None:
    """Print one line where errors go: standard output is for results."""
    print(f"note: {text}", file=sys.stderr)
