"""Experiments: flags to config, config to library calls, calls to results."""
