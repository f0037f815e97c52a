"""Smaller students: losses that compare two distributions."""
