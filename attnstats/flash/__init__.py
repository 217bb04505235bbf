"""The fastest attention there is that returns its lse, and statistics beside it."""
