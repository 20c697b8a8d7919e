"""Causal tracing: where in the model a fact is recalled, per fact and averaged over facts."""
