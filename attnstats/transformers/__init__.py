"""Statistics of transformers models: capture, attach, masks, caches, selection, recording."""
