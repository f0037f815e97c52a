"""Products of matrices of signs: see `api`."""
