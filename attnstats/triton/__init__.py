"""The backend "triton": plan, buffers and launches of our kernels, and the table of their tiles."""
