"""Code that every backend shares: arguments, geometry, mask patterns, autograd and the wire format of traced calls."""
