"""Kernels on two CPU cores: attention, decode attention, narrow products.

    python -m experiments.benchmark_kernels \\
      --config=configs/benchmark_kernels_cpu.py --workdir=runs/benchmark_kernels

float32 at the shape of SmolLM2 (9 query heads, 3 key heads, width 64), causal
but for the block-sparse cases. Two CPU cores and 8 GB of memory, some 6
minutes on a machine that does nothing else. With torch installed (make
test-peers, then .venv-peers/bin/python) its attention is a row too. `:tiny`
after the file's name runs every part in seconds.

FlashAttention on an A100 (arXiv 2205.14135, table 20, forward and backward,
head width 64): 1.73x PyTorch at n = 2048 and 1.68x at 4096, block-sparse 7.7x
and 15.7x; 10.6 and 20.4 times less memory (its table 21). RESULTS.md has ours.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  if variant not in ('', 'tiny'):
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  tiny = variant == 'tiny'
  config = ml_collections.ConfigDict()
  config.batch = 1
  config.heads = 9
  config.kv_heads = 3
  config.width = 64
  config.dtype = 'float32'
  # Those that cannot run here are left out; the first is the baseline.
  ours = ('blockwise',) if tiny else ('blockwise', 'llvm_cpu')
  config.attention = ('naive', 'jax.nn', 'torch', *ours)
  config.forward = (64, 128) if tiny else (512, 1024, 2048, 4096, 8192)
  config.backward = (64,) if tiny else (512, 1024, 2048)
  # Dense against a share of the tiles, without causal masking.
  config.sparse = (512,) if tiny else (2048, 8192)
  config.sparse_density = 0.25
  config.sparse_implementation = 'blockwise'
  # New tokens over caches with this many used slots.
  config.decode = ('reference', *ours)
  config.decode_queries = (1,) if tiny else (1, 16)
  config.decode_slots = (128,) if tiny else (256, 1024, 4096)
  config.decode_batch = 1
  # Products [m, k] x [k, n].
  config.products_of_few_rows = ours
  config.few_rows = (
    ((2, 64, 64),)
    if tiny
    else tuple((m, 2048, 49152) for m in (1, 2, 4, 8, 16))
  )
  config.products = ours
  config.int8 = (
    ((2, 64, 48),)
    if tiny
    else ((1, 576, 49152), (256, 576, 1536), (256, 576, 49152))
  )
  config.products_of_weights = ('blockwise',)
  config.dequant = (
    ((1, 64, 48),) if tiny else ((1, 576, 49152), (128, 576, 1536))
  )
  config.binary = (
    ((8, 64, 48),) if tiny else ((1024, 1024, 1024), (1, 576, 49152))
  )
  config.memory_size = 16 if tiny else 512  # MiB, read to measure the memory
  config.machine_size = 64 if tiny else 1024  # of the product that is the peak
  config.repeats = 5
  config.seed = 0
  return config
