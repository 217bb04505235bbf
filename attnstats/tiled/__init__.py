"""The backend "tiled": plain PyTorch in O(T) memory, and the compiled CPU sums."""
