"""Floor 10: the command line. One file a command, loaded when it is called, so that `headwise --help` is instant.

No code stands here: files named `list` and `eval` become names of this package, in place of Python's own.
"""

from headwise.cli.dispatch import COMMANDS, main

__all__ = ["COMMANDS", "main"]
