"""Formulas by hand."""

import pytest

from pallas_kernels import roofline


def test_attention():
  shape = {'batch': 2, 'heads': 4, 'kv_heads': 2, 'width': 8}
  work = roofline.attention(q_size=3, kv_size=5, item_bytes=2, **shape)
  # 15 scores a head of 8 products each, twice over, a product is 2 operations.
  assert work.flops == 2 * 4 * 15 * 8 * 2 * 2
  queries, keys = 2 * 3 * 4 * 8, 2 * 5 * 2 * 8
  assert work.bytes == 2 * (2 * queries + 2 * keys) + 4 * 2 * 4 * 3
  half = roofline.attention(q_size=3, kv_size=5, density=0.5, **shape)
  assert half.flops == work.flops / 2
  both = roofline.attention(q_size=3, kv_size=5, backward=True, **shape)
  assert both.flops == 3.5 * work.flops


def test_decode_attention():
  shape = {'batch': 2, 'time': 3, 'slots': 50, 'heads': 4, 'kv_heads': 2}
  work = roofline.decode_attention(**shape, width=8, item_bytes=2)
  assert work.flops == 2 * 4 * (3 * 50) * 8 * 2 * 2
  cache, queries = 2 * (2 * 50 * 2 * 8), 2 * 3 * 4 * 8
  assert work.bytes == 2 * (cache + 2 * queries) + 4 * 2 * 4 * 3
  int8 = roofline.decode_attention(
    **shape, width=8, item_bytes=2, cache_bytes=1, tree=True
  )
  scales, bits = 2 * (2 * 50 * 2), 3 * 3
  assert work.bytes - int8.bytes == cache - 4 * scales - bits / 8


def test_matmul_and_the_bound():
  work = roofline.matmul(10, 20, 30, w_bits=4)
  assert work.flops == 2 * 10 * 20 * 30
  assert work.bytes == 4 * 300 + 300 + 4 * 200
  assert work.seconds(work.flops, 1e30) == pytest.approx(1)
  assert work.seconds(1e30, work.bytes / 2) == pytest.approx(2)
