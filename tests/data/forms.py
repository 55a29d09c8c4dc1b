"""Makes TFDS datasets of any features, for tests."""

import dataclasses

import tensorflow_datasets as tfds

from vdit_jax.data import reading

ENCODER = "text_encoder"


@dataclasses.dataclass(eq=False, kw_only=True)
class Form(tfds.core.BuilderConfig):
  features: dict
  examples: list


class AnyForm(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  url_infos = None

  def _info(self):
    features = tfds.features.FeaturesDict(self.builder_config.features)
    return tfds.core.DatasetInfo(
      builder=self, features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(self.builder_config.examples)


def build(path, features, examples):
  """Write a data set of any features and give its name."""
  form = Form(name="form", features=features, examples=examples)
  builder = AnyForm(config=form, data_dir=path, file_format="array_record")
  builder.download_and_prepare()
  return "any_form/form"


def wanted(tokenizer, max_length, options=None, cond=()):
  """Captions for one text encoder; without a tokenizer, their embeddings."""
  words = {ENCODER: reading.Words(tokenizer, max_length)}
  return reading.Wanted(words, options or reading.Options(), cond)


def words(batch):
  """The captions of a batch."""
  return batch.captions[ENCODER]
