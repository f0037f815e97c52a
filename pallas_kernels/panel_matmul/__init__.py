"""Products of a few rows and a matrix: see `api`."""
