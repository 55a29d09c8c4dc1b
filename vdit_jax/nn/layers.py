"""Blocks as one scan over stacked parameters, with what is computed again."""

from typing import Any

import flax.linen as nn
import jax

REMAT = ("none", "attention", "full")
ATTENDED = "attended"  # checkpoint_name of what attentions should run once for


def stack(block: type[nn.Module], cfg: Any, in_axes: Any) -> nn.Module:
  """Stack cfg.depth blocks, named "blocks", to be called on a carry.

  Args:
    block: module class of (cfg), whose call returns (carry, None).
    cfg: has depth, unroll and remat, one of `REMAT`.
    in_axes: of the arguments beside the carry, as `nn.scan` takes them.
  """
  if cfg.remat != "none":
    save = jax.checkpoint_policies.save_only_these_names(ATTENDED)
    policy = save if cfg.remat == "attention" else None
    block = nn.remat(block, prevent_cse=False, policy=policy)
  scanned = nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    length=cfg.depth,
    unroll=min(cfg.unroll, cfg.depth),
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(cfg, name="blocks")
