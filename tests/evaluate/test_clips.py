"""Which clips are measured: prompts, captions, real clips in batches."""

import dataclasses

import numpy as np
import pytest

from vdit_jax.data import digits, moving_digits, prompt_files, reading
from vdit_jax.evaluate import clips


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """The tiny dataset's test split."""
  folder = tmp_path_factory.mktemp("data")
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=folder, file_format="array_record"
  )
  builder.download_and_prepare()
  return clips.open_real("moving_digits/tiny", folder)


def test_split_is_the_test_split(source):
  assert source.split == "test"


def test_prompts_that_are_given_are_one_group(source):
  given = prompt_files.Prompt("a cat", ("color",)), prompt_files.Prompt("a dog")
  (group,) = clips.groups(source, given, 5, (1, 2), 0)
  assert group == clips.Group("", given)
  assert group.texts == ["a cat", "a dog"]


def test_digits_have_held_out_prompts_of_each_count(source):
  one, two = clips.groups(source, None, 3, (1, 2), 7)
  assert (one.suffix, two.suffix) == ("", "_two")
  assert one.texts == digits.held_out_prompts(3, 7, 1)
  assert [len(digits.parse(text)) for text in two.texts] == [2, 2, 2]


def test_other_data_have_their_captions(source):
  other = dataclasses.replace(source, name="clips/of_mine")
  (group,) = clips.groups(other, None, 3, (1,), 0)
  records = reading.records(source)
  assert group.texts == [next(records)["caption"] for _ in range(3)]
  assert group.digits is None


def test_real_clips_are_those_of_the_keys_in_batches(source):
  captions = clips.captions(source, 2, 5)
  assert len(captions) == 5
  assert {len(digits.parse(text)) for text in captions.values()} == {2}
  data = clips.Data(source, source.shape[:3])
  batches = list(clips.real(data, captions, 2, "real"))
  assert [len(batch) for batch in batches] == [2, 2, 1]
  videos = [r["video"] for r in reading.records(source) if r["key"] in captions]
  found = np.round((np.concatenate(batches) + 1) * 127.5)
  np.testing.assert_array_equal(found, videos)


def test_count_that_no_clip_has_is_refused(source):
  with pytest.raises(ValueError, match="no clips of 3 digits"):
    clips.captions(source, 3, 2)
