"""Products of int8 activations and int8 weights: see `api`."""
