"""KE and MEND: edits that a trained network makes of a gradient, and their training."""
