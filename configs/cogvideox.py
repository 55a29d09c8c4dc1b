"""Fine-tune a released CogVideoX, whole or by low-rank adapters.

  hf download zai-org/CogVideoX-2b --local-dir=CogVideoX-2b
  python -m vdit_jax.cache --autoencoder=CogVideoX-2b/vae \
    --text_encoder=CogVideoX-2b --padding=seen --data=MINE --name=latents/mine \
    --data_dir=DATA
  python train.py --config=configs/cogvideox.py:CogVideoX-2b \
    --workdir=work/tuned --config.data.name=latents/mine \
    --config.data.data_dir=DATA --config.mesh.fsdp=1 --config.batch_size=1 \
    --config.lora.rank=128 --config.optim.lr=1e-3

Behind the colon stands a pipeline's folder, or a variant, `2b`, `5b`,
`5b_i2v`, `1_5_5b`, `1_5_5b_i2v`, whose folder is then --config.init_from.
`lora.rank` 0 trains all weights of the denoiser. Image-to-video variants train
from a dataset of videos; the others from such a one too, whose clips and
captions each step then encodes. Not run on released weights or a TPU: `python
-m vdit_jax.aot` says what the TPU compiler makes of them, README has figures.
"""

from ml_collections import ConfigDict

from vdit_jax.configs import defaults
from vdit_jax.models.cogvideox import autoencoder, denoiser, system
from vdit_jax.models.t5 import encoder as t5


def get_config(arg: str) -> ConfigDict:
  """Return the config of a variant, or for a pipeline's folder."""
  if arg in denoiser.VARIANTS:
    config = defaults.tune(
      system.SYSTEM,
      f"work/CogVideoX-{arg}",
      denoiser=defaults.module("cogvideox", denoiser.VARIANTS[arg]),
      autoencoder=defaults.module("cogvideox", autoencoder.VARIANTS[arg]),
      text_encoder=defaults.module("t5", t5.VARIANTS["v1_1_xxl"]),
      recipe=system.RECIPES[arg],
    )
  elif arg:
    config = defaults.tune_folder(system.SYSTEM, arg)
  else:
    raise ValueError(
      "configs/cogvideox.py needs what to fine-tune: a pipeline's folder or "
      f"one of {sorted(denoiser.VARIANTS)}, as in configs/cogvideox.py:2b"
    )
  config.objective.distribution = "uniform"
  config.objective.shift = 1.0
  return config
