"""Files of records."""

import numpy as np
import tensorflow_datasets as tfds

from vdit_jax.data import shards


def test_a_record_is_the_same_to_the_bit_in_every_process():
  """Its fields lie in the order of their names, not of a hash."""
  names = [f"number_{i:02d}" for i in range(12)]
  number = tfds.features.Scalar(np.int64)
  features = tfds.features.FeaturesDict(dict.fromkeys(names, number))
  record = shards.serializer(features)({name: 1 for name in names})
  places = [record.index(name.encode()) for name in names]
  assert places == sorted(places)
