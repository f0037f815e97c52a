"""Kernels on one Hopper GPU: attention, decode attention, narrow products.

    python -m experiments.benchmark_kernels \\
      --config=configs/benchmark_kernels_gpu.py --workdir=runs/kernels_gpu

bfloat16, head width 128, causal, one H100 or H200. Baselines are XLA's naive
program, which needs 35 GB at 16384, cuDNN (through jax.nn), jax's own Hopper
kernel and, where torch is installed with CUDA, its own attention.

On an H200 (RESULTS.md) attention, decode attention and the products of integers
took three and a half minutes; seven sizes of quantized weights, in this kernel
alone, took one and a half. The chart of FlashAttention-3 for an H100
(github.com/Dao-AILab/flash-attention), causal forward, width 128, sequences of
4096, 8192, 16384: FlashAttention-2 319, 333, 335 TFLOP/s, Triton 353, 369, 378,
cuDNN 518, 529, 539, FlashAttention-3 579, 602, 616.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The settings."""
  config = ml_collections.ConfigDict()
  config.batch = 2
  config.heads = 16
  config.kv_heads = 16
  config.width = 128
  config.dtype = 'bfloat16'
  config.attention = (
    'naive',
    'cudnn',
    'attention_mgpu',
    'torch',
    'blockwise',
    'mosaic_gpu',
  )
  config.forward = (1024, 4096, 8192, 16384)
  config.backward = (1024, 4096, 8192)
  config.sparse = ()  # the Hopper kernel takes no tile lists yet
  config.sparse_density = 0.25
  config.sparse_implementation = 'blockwise'
  config.decode = ('blockwise', 'mosaic_gpu')
  config.decode_queries = (1, 64)
  config.decode_slots = (8192,)
  config.decode_batch = 64
  config.products = ('blockwise', 'mosaic_gpu')
  config.products_of_few_rows = ('blockwise',)
  config.few_rows = ()
  # The first product of a feed-forward, as in LLM.int8()'s table of speeds.
  widths = (768, 1024, 2048, 4096, 5120, 8192, 12288)
  config.int8 = (
    (8192, 8192, 8192),
    (16, 8192, 8192),
    *((2048, width, 4 * width) for width in widths),
  )
  config.products_of_weights = ('blockwise', 'mosaic_gpu')
  config.dequant = ((1, 8192, 28672), (128, 8192, 28672))
  config.binary = ((8192, 8192, 8192),)
  config.machine_size = 8192
  config.memory_size = 8192  # MiB, read to measure the memory
  config.repeats = 9
  config.seed = 0
  return config
