import pytest

from tests.training.conftest import bucket, store  # noqa: F401
from vdit_jax.data import moving_digits, reading
from vdit_jax.text import tokenizer


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A TFDS data directory with the tiny moving digits."""
  path = tmp_path_factory.mktemp("data")
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=path, file_format="array_record"
  )
  builder.download_and_prepare()
  return path


@pytest.fixture(scope="session")
def source(data_dir):
  return reading.open_source("moving_digits/tiny", "train", data_dir)


@pytest.fixture(scope="session")
def trained(source, tmp_path_factory):
  """A tokenizer of the tiny data set's captions."""
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  captions = sorted({r["caption"] for r in reading.records(source)})
  return tokenizer.train(captions, path)
