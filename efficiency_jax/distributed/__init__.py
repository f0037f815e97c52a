"""More than one device and machine: jax.distributed and sharding by GSPMD."""
