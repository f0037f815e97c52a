"""Accelerator kernels, one folder an operation; knows jax and nothing else."""
