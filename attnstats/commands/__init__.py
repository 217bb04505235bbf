"""The commands of `attnstats`: one module each, with `add_parser(commands)` and `run(options)`. Called by cli.py."""
