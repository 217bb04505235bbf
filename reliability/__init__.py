"""What looks for errors that nobody has reported yet: seeded faults, sanitizers, and the versions that are supported.

docs/reliability.md has the results and says which of it runs when.
"""
