"""Train an autoencoder or a denoiser; see `vdit_jax.train`."""

from vdit_jax import tool, train

if __name__ == "__main__":
  tool.run(train.main)
