"""Token credit inside RL trainers: one module per framework, none of them imported by the rest of the package."""
