"""Package metadata; the settings of tools are in pyproject.toml."""

import pathlib

import setuptools

_README = pathlib.Path(__file__).parent / 'README.md'

_EXTRAS = {
  'cpu': ['llvmlite'],  # kernels for the CPU
  'tpu': ['jax[tpu]'],
  'cuda': ['jax[cuda13]'],
  'hub': ['huggingface_hub'],
  'peers': [
    'torch',
    'transformers',
    'llama-cpp-python',
    'bitsandbytes',
    'qwix',
    'scikit-learn',
    'torchao',
  ],
  'aot': [
    'libtpu',
    *(
      f'{name} ; sys_platform == "linux"'
      for name in (
        'jax-cuda13-plugin',
        'jax-cuda13-pjrt',
        'nvidia-cuda-nvcc',
        'nvidia-cuda-runtime',
        'nvidia-nvjitlink',
        'nvidia-nvvm',
      )
    ),
  ],
  'test': ['pytest>=8', 'pytest-xdist', 'hypothesis'],
  'dev': ['ruff', 'pre-commit'],
  'notebooks': ['jupytext', 'nbclient', 'ipykernel'],
}

setuptools.setup(
  name='efficiency-jax',
  version='0.1.0',
  description='Exact, measured techniques for cheap language models in JAX.',
  long_description=_README.read_text() if _README.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  # experiments, configs and tests stay in the checkout: their names are too
  # general for everybody's site-packages.
  packages=setuptools.find_packages(
    include=['efficiency_jax*', 'pallas_kernels*']
  ),
  # Trained drafts; see efficiency_jax/drafts.py.
  package_data={'efficiency_jax': ['shipped/*.safetensors']},
  install_requires=[
    'jax>=0.10',
    'flax>=0.12',
    'optax>=0.2.5',
    'grain>=0.2.16',
    'orbax-checkpoint>=0.12,<1',
    'chex>=0.1.90',
    'absl-py>=2.1',
    'numpy',
    'scipy',
    'ml_collections',
    'tokenizers',
    'safetensors',
    'gguf',
    'jinja2',
    'rich',
    'matplotlib',
  ],
  extras_require=_EXTRAS,
  classifiers=[
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
