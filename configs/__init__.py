"""One file a run; the docstring says how to start it and what to expect."""
