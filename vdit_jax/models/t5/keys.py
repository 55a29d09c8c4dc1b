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

from vdit_jax.convert import configs, rules
from vdit_jax.models.t5 import encoder

# Which forms of `feed_forward_proj` are gated. transformers takes gated-gelu
# to mean the tanh form, gelu_new.
_GATED = {"relu": False, "gated-gelu": True, "gated-gelu_new": True}

# Nothing here looks at these, beside the dozens that a config may have.
_UNUSED = {
  "is_encoder_decoder": configs.unused(True),
  **dict.fromkeys(
    ("pad_token_id", "eos_token_id", "decoder_start_token_id"),
    configs.unused(None),
  ),
  **dict.fromkeys(("dtype", "torch_dtype"), configs.text(None)),
}

# Our fields, and theirs with what they may be.
_FIELDS = {
  "vocab_size": ("vocab_size", configs.size()),
  "width": ("d_model", configs.size()),
  "depth": ("num_layers", configs.layers()),
  "heads": ("num_heads", configs.size()),
  "head_dim": ("d_kv", configs.size()),
  "mlp_width": ("d_ff", configs.size()),
  "buckets": (
    "relative_attention_num_buckets",
    configs.Row(configs.REQUIRED, encoder.LIMITS["buckets"]),
  ),
  "max_distance": (
    "relative_attention_max_distance",
    configs.Row(128, encoder.LIMITS["max_distance"]),
  ),
  "eps": ("layer_norm_epsilon", configs.number()),
}

_COPY = "encoder.embed_tokens.weight"
_DECODER = r"decoder\..+", r"lm_head\.weight"


def _config(
  given: dict[str, Any], dtype: Any, *, layer_bias: bool
) -> encoder.Config:
  """Translate a config.json.

  Args:
    given: its fields.
    dtype: compute type.
    layer_bias: whether each layer has a position bias, which the class says
      and not its config.
  """
  return encoder.Config(
    **{ours: given[theirs] for ours, (theirs, _) in _FIELDS.items()},
    gated=_GATED[given["feed_forward_proj"]],
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


def _components(
  name: str, form: str, layer_bias: bool
) -> dict[str, rules.Component]:
  """Make the components of one family, the encoder's and the wholes'.

  Args:
    name: of the family.
    form: transformers' feed_forward_proj where a config.json is silent, as
      the older ones are.
    layer_bias: see `_config`.
  """
  rows = dict(_FIELDS.values()) | _UNUSED
  rows["feed_forward_proj"] = configs.word(form, *_GATED)
  alone = rules.Component(
    module=encoder.TextEncoder,
    fields=configs.Table(rows, strict=False, products=(("num_heads", "d_kv"),)),
    config=functools.partial(_config, layer_bias=layer_bias),
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
  **_components("T5", "relu", layer_bias=False),
  **_components("MT5", "gated-gelu", layer_bias=False),
  **_components("UMT5", "gated-gelu", layer_bias=True),
}
