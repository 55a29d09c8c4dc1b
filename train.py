"""Train an autoencoder or a denoiser; see `vdit_jax.train`."""

from absl import app

from vdit_jax import train

if __name__ == "__main__":
  app.run(train.main)
