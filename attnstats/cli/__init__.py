"""The commands of the command line, a module each: `add_parser` says what can be given, `run` does it.

`run` returns the exit code and raises InputError for what the user can mend. cli.py calls them; options.py has what
several of them take.
"""
