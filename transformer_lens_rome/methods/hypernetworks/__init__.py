"""KE and MEND: trained networks that turn a gradient into an edit, and their training."""
