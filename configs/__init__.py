"""A file for each thing that can be trained; `vdit_jax.configs` in a wheel."""
