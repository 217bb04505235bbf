"""The command line. Each command is a module: `add_parser` declares its options, `run` returns the exit code.

`run` raises InputError for bad input. arguments.py has the options that commands share, job.py their steps.
"""
