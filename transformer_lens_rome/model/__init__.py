"""The running model of either class: where things are in it, and how it is run."""
