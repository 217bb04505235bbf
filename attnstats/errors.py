"""The exception for bad input: a setting, file or model that the user can change, never a fault of this package.

The command line prints its message, one line with argument, value and remedy, and exits with code 2.
"""

from __future__ import annotations


class InputError(ValueError):
    """A setting, file or model that cannot be used. The message is one line and names argument and remedy."""
