"""Sample videos from prompts; see `vdit_jax.sample`."""

from vdit_jax import sample, tool

if __name__ == "__main__":
  tool.run(sample.main, sample.FLAGS)
