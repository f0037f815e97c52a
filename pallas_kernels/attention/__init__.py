"""Attention of whole sequences: see `api`."""
