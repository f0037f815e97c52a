"""RMS norms whose rows are summed in one order: see `api`."""
