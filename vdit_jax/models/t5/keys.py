"""The encoders of transformers' T5, mT5 and UMT5: tables for `convert`.

A folder may hold the encoder alone (`T5EncoderModel`, as in diffusers'
pipelines) or the whole of a released T5 (`T5ForConditionalGeneration`), of
which the encoder is taken: text-to-video needs nothing of the decoder, so its
tensors are neither read nor written back.

The embedding is `shared.weight`. Some files have it a second time, or only, as
`encoder.embed_tokens.weight`. `shared.weight` is what is written: transformers
ties the other to it.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from vdit_jax.convert import rules
from vdit_jax.models.t5 import encoder

# Which forms of `feed_forward_proj` are gated. transformers takes gated-gelu
# to mean the tanh form, gelu_new.
_GATED = {"relu": False, "gated-gelu": True, "gated-gelu_new": True}

# transformers' own defaults of fields that configs older than them lack.
_T5 = {"relative_attention_max_distance": 128, "feed_forward_proj": "relu"}
_MT5 = _T5 | {"feed_forward_proj": "gated-gelu"}

_FIELDS = {
  "vocab_size": "vocab_size",
  "width": "d_model",
  "depth": "num_layers",
  "heads": "num_heads",
  "head_dim": "d_kv",
  "mlp_width": "d_ff",
  "buckets": "relative_attention_num_buckets",
  "max_distance": "relative_attention_max_distance",
  "eps": "layer_norm_epsilon",
}

_COPY = "encoder.embed_tokens.weight"
_DECODER = r"decoder\..+", r"lm_head\.weight"


def config(
  source: dict[str, Any], dtype: Any, *, absent: dict, layer_bias: bool
) -> encoder.Config:
  """Translate a config.json.

  Args:
    source: the config.json.
    dtype: compute type.
    absent: values of fields that `source` need not have.
    layer_bias: whether each layer has a position bias, which the class says
      and not its config.

  Raises:
    ValueError: if sizes are missing, or the activation is of another model.
  """
  source = absent | source
  wanted = [*_FIELDS.values(), "feed_forward_proj"]
  if missing := [name for name in wanted if name not in source]:
    raise ValueError(f"config.json of a T5 must have {missing}; add them")
  form = source["feed_forward_proj"]
  if form not in _GATED:
    raise ValueError(
      f"feed_forward_proj must be one of {sorted(_GATED)}, got {form!r}: no "
      "released T5, mT5 or UMT5 has another"
    )
  return encoder.Config(
    **{ours: source[theirs] for ours, theirs in _FIELDS.items()},
    gated=_GATED[form],
    layer_bias=layer_bias,
    dtype=jnp.dtype(dtype).name,
  )


def table(module: encoder.TextEncoder) -> tuple[rules.Rule, ...]:
  """Make the rules of an encoder."""
  mlp = [("layer.1.DenseReluDense.(wi_0|wi_1|wo)", r"mlp/\2/kernel")]
  if not module.cfg.gated:
    mlp = [
      ("layer.1.DenseReluDense.wi", "mlp/wi_0/kernel"),
      ("layer.1.DenseReluDense.wo", "mlp/wo/kernel"),
    ]
  linear = [
    ("layer.0.SelfAttention.(q|k|v)", r"attention/\2/kernel"),
    ("layer.0.SelfAttention.o", "attention/out/kernel"),
    *mlp,
  ]
  norms = [
    ("layer.0.layer_norm", "norm_1/scale"),
    ("layer.1.layer_norm", "norm_2/scale"),
  ]
  block, ours = r"encoder.block.(\d+)", r"block_\1"
  bias = f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"
  return (
    rules.Rule("shared.weight", "embedding"),
    rules.Rule(bias, r"position_bias_\1/embedding"),
    *(
      rules.Rule(f"{block}.{key}.weight", f"{ours}/{path}", rules.LINEAR)
      for key, path in linear
    ),
    *(
      rules.Rule(f"{block}.{key}.weight", f"{ours}/{path}")
      for key, path in norms
    ),
    rules.Rule("encoder.final_layer_norm.weight", "norm_out/scale"),
  )


def _components(name: str, **form: Any) -> dict[str, rules.Component]:
  """Make the components of one family, the encoder's and the wholes'."""
  alone = rules.Component(
    module=encoder.TextEncoder,
    config=functools.partial(config, **form),
    example=encoder.example,
    rules=table,
    ignored=(_COPY,),
    copies={_COPY: "shared.weight"},
  )
  whole = dataclasses.replace(alone, ignored=(_COPY, *_DECODER))
  return {
    f"{name}EncoderModel": alone,
    f"{name}ForConditionalGeneration": whole,
    f"{name}Model": whole,
  }


COMPONENTS = {
  **_components("T5", absent=_T5, layer_bias=False),
  **_components("MT5", absent=_MT5, layer_bias=False),
  **_components("UMT5", absent=_MT5, layer_bias=True),
}
