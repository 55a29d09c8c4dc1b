"""Networks of a run, changed."""

import pytest

from vdit_jax.models import networks
from vdit_jax.models.cogvideox import autoencoder as cogvideox_vae
from vdit_jax.models.vdit import autoencoder as causal_vae


def test_released_autoencoders_run_in_tiles():
  whole = cogvideox_vae.Autoencoder(cogvideox_vae.VARIANTS["5b"])
  modules = networks.tiled(networks.gather({"autoencoder": whole}))
  cfg = modules.autoencoder.cfg
  assert (cfg.tiled, cfg.tile, cfg.scale) == (True, (240, 360), 0.7)
  assert not whole.cfg.tiled
  ours = causal_vae.Autoencoder(causal_vae.VARIANTS["digits"])
  with pytest.raises(ValueError, match="that have tiles.*mesh.context"):
    networks.tiled(networks.gather({"autoencoder": ours}))
