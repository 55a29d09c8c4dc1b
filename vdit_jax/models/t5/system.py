"""The encoders of T5, mT5 and UMT5 as a network that systems share."""

from typing import Any

from etils import epath

from vdit_jax import strict_json
from vdit_jax.models import system
from vdit_jax.models.t5 import encoder, keys, tokenizer
from vdit_jax.text import tokenizer as tokenizers

NETWORK = system.Network(
  family="t5",
  kind="text_encoder",
  module=encoder.TextEncoder,
  config=encoder.Config,
  variants=encoder.VARIANTS,
  example=encoder.example,
  layers=("depth",),
  classes=keys.COMPONENTS,
  tokenizer=tokenizer.load,
  tokenizer_files=((tokenizer.FILE,), (tokenizer.JSON_FILE,)),
)

# Sentinels of transformers' tokenizer, behind the pieces of its model.
_SENTINELS = 100
_PIECES = 400  # at most, of a small one


def tiny(width: int, pieces: int, form: str = "T5") -> dict[str, Any]:
  """The config.json of a small encoder.

  Args:
    width: E of its embeddings.
    pieces: of its tokenizer's model.
    form: "T5", "MT5" or "UMT5".
  """
  return dict(
    architectures=[f"{form}EncoderModel"],
    model_type=form.lower(),
    vocab_size=pieces + _SENTINELS,
    d_model=width,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    feed_forward_proj="gated-gelu",
    layer_norm_epsilon=1e-6,
    is_encoder_decoder=True,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    dtype="float32",
  )


def write_tiny_tokenizer(folder: epath.Path, captions: list[str]) -> int:
  """Write a small tokenizer's folder; return its number of pieces.

  Args:
    folder: to write.
    captions: that its model is trained on.
  """
  words = tokenizers.train(captions, folder / tokenizer.FILE, _PIECES)
  config = dict(tokenizer_class="T5Tokenizer", extra_ids=_SENTINELS)
  text = strict_json.dumps(config, indent=2, sort_keys=True) + "\n"
  (folder / "tokenizer_config.json").write_text(text)
  return words.vocab_size
