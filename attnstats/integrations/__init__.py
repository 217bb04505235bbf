"""Token credit inside RL trainers, one module per framework; nothing else in the package imports them."""
