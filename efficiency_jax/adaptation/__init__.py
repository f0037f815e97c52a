"""Models adapted by training few weights."""
