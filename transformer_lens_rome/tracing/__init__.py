"""Where a model recalls a fact: causal traces, and their averages."""
