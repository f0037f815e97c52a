"""The one training loop: state, step, optimizers, objectives, logbook."""
