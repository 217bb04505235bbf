"""The one exception that means "what you asked for cannot be done": bad input, never a fault of ours.

Raised at the border of the command line's modules (models, prompts, analyze) with argument, value and remedy in
one line; cli.py prints that line and exits with code 2. Every other exception keeps its traceback.
"""

from __future__ import annotations


class InputError(ValueError):
    """A setting, file or model that cannot be used. The message is one line and names argument and remedy."""
