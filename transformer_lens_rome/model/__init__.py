"""Access to the model, of either class: its parts, its hooks and its forward passes."""
