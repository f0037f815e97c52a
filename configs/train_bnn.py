"""Binarized networks on images: float, BinaryConnect, BNN; folded to bits.

    python -m experiments.train_bnn --config=configs/train_bnn.py \
      --workdir=runs/train_bnn

Dense layers on 10,000 digits of MNIST, divided by a seed into 8,000, 1,000 and
1,000: NOT the official split. The paper (arXiv 1602.02830) reports 0.96 % of
the official test images wrong with 3 x 4096 and dropout after 1,000 epochs on
50,000 digits, BinaryConnect 1.29 % (1511.00363), and a Maxout network of real
numbers 0.94 %.

After the file's name: `:fashion` is Fashion-MNIST, complete with its official
test images; `:convnet` the paper's network of convolutions on it (for CIFAR-10
there: 11.40 % wrong with BNN), its images within a border of black, and
`:convolutions` one that is narrower, for a CPU; `:ablations` takes parts of BNN
away; `:paper` is 3 x 4096 with dropout; `:tiny` a check of the machinery on
generated images. All but `:convolutions` and `:tiny` are minutes on one GPU and
half an hour to many hours on two CPU cores.

Fields:
  data: A set of data.images that a registry carries; 'generated' is ten
    patterns under noise.
  folder: Of official files, for the sets that no registry carries: 'mnist',
    'cifar10', 'svhn'. '' fetches.
  border: Pixels of black that are put around each image.
  methods: Of experiments.bnn_methods.
  convolutions, hidden: As those of binarization.networks.Config.
  dropout: Shares of pixels and of hidden numbers left out in training.
  epochs, batch, learning_rate, last_learning_rate: Adam, with a rate that falls
    exponentially.
  seeds: How often each method is trained.
  repeats: Timed samples of inference.
"""

import ml_collections

VARIANTS = 'fashion', 'convnet', 'convolutions', 'ablations', 'paper', 'tiny'


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; see the head of the file for `variant`."""
  if variant and variant not in VARIANTS:
    raise ValueError(f'variants are {", ".join(VARIANTS)}, got {variant!r}.')
  config = ml_collections.ConfigDict()
  config.data = 'mnist-10k'
  config.folder = ''
  config.border = 0
  config.methods = (
    'float',
    'BinaryConnect',
    'BinaryConnect stochastic',
    'BNN',
    'BNN stochastic',
    'ternary',
  )
  config.convolutions = ()
  config.hidden = (1024, 1024, 1024)
  config.dropout = (0.0, 0.0)
  config.epochs = 60
  config.batch = 100
  config.learning_rate = 3e-3
  config.last_learning_rate = 3e-6
  config.seed = 0
  config.seeds = 3
  config.repeats = 20
  if variant == 'fashion':
    config.data = 'fashion-mnist'
    config.epochs = 20
  if variant == 'convnet':
    config.data = 'fashion-mnist'
    config.border = 2  # 32 x 32, as CIFAR-10 has them: halved three times
    config.methods = ('float', 'BNN')
    config.convolutions = tuple(
      (channels, pooled)
      for channels in (128, 256, 512)
      for pooled in (False, True)
    )
    config.hidden = (1024, 1024)
    config.epochs = 15
    config.learning_rate = 1e-3
    config.seeds = 1
  if variant == 'convolutions':
    config.data = 'fashion-mnist'
    config.methods = ('float', 'BNN')
    config.convolutions = (
      (32, False),
      (32, True),
      (64, False),
      (64, True),
    )
    config.hidden = (256, 256)
    config.epochs = 5
    config.seeds = 1
  if variant == 'ablations':
    config.methods = (
      'BNN',
      'BNN, slope not clipped',
      'BNN, weights not clipped',
      'BNN without normalization',
      'BNN, approx sign',
      'BNN, swish sign',
      'BNN, shift norm',
      'BNN, real ends',
      'BNN, Bop',
      'BNN, shifts alone',
    )
  if variant == 'paper':
    config.methods = ('float', 'BinaryConnect', 'BNN')
    config.hidden = (4096, 4096, 4096)
    config.dropout = (0.2, 0.5)
    config.epochs = 200
    config.seeds = 1
  if variant == 'tiny':
    config.data = 'generated'
    config.methods = ('float', 'BNN', 'BNN stochastic')
    config.hidden = (64,)
    config.epochs = 10
    config.batch = 50
    config.seeds = 1
    config.repeats = 1
  return config
