"""Fine-tune a released Wan, whole or by low-rank adapters.

  hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir=Wan2.1-T2V-1.3B
  python -m vdit_jax.cache --autoencoder=Wan2.1-T2V-1.3B/vae \
    --text_encoder=Wan2.1-T2V-1.3B --padding=zeroed --data=MINE \
    --name=latents/mine --data_dir=DATA
  python train.py --config=configs/wan.py:Wan2.1-T2V-1.3B \
    --workdir=work/tuned --config.data.name=latents/mine \
    --config.data.data_dir=DATA --config.mesh.fsdp=1 --config.batch_size=1 \
    --config.lora.rank=32 --config.optim.lr=1e-4

Behind the colon stands a pipeline's folder, or a variant, `1_3b`, `14b`,
`14b_i2v`, `14b_flf2v`, `a14b`, `a14b_i2v`, `5b`, whose folder is then
--config.init_from. Of 2.2's two denoisers `--config.network` names the one that
is trained: `denoiser`, of high noise, or `denoiser_2`, of low. Not run on
released weights or a TPU: `python -m vdit_jax.aot` says what the TPU compiler
makes of them.
"""

from ml_collections import ConfigDict

from vdit_jax.configs import defaults
from vdit_jax.models.clip import vision
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.wan import autoencoder, denoiser, system


def get_config(arg: str) -> ConfigDict:
  """Return the config of a variant, or for a pipeline's folder."""
  if arg not in denoiser.VARIANTS:
    if not arg:
      raise ValueError(
        "configs/wan.py needs what to fine-tune: a pipeline's folder or one of "
        f"{sorted(denoiser.VARIANTS)}, as in configs/wan.py:1_3b"
      )
    return _tuned(defaults.tune_folder(system.SYSTEM, arg))
  cfg, vae = denoiser.VARIANTS[arg], "2_2" if arg == "5b" else "2_1"
  encoders = {"text_encoder": defaults.module("t5", t5.VARIANTS["umt5_xxl"])}
  if cfg.image_width:
    tower = vision.VARIANTS["vit_h_14"]
    encoders["image_encoder"] = defaults.module("clip", tower)
  config = defaults.tune(
    system.SYSTEM,
    f"work/Wan-{arg}",
    denoiser=defaults.module("wan", cfg),
    autoencoder=defaults.module("wan", autoencoder.VARIANTS[vae]),
    recipe=system.RECIPES[arg],
    **encoders,
  )
  if cfg.width == denoiser.VARIANTS["14b"].width:
    # 75,600 tokens on 64 chips with 95 GB.
    config.batch_size, config.denoiser.remat = 64, "attention"
  return _tuned(config)


def _tuned(config: ConfigDict) -> ConfigDict:
  """Draw noise levels as Wan is fine-tuned: uniform, shifted as it samples."""
  config.objective.distribution = "uniform"
  config.objective.shift = 5.0
  return config
