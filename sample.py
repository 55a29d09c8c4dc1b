"""Sample videos from prompts; see `vdit_jax.sample`."""

from absl import app

from vdit_jax import sample

if __name__ == "__main__":
  app.run(sample.main)
