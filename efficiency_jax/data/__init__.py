"""Texts and tasks: what models read, train on and are measured with."""
