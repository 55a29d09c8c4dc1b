"""Any TFDS dataset: what its records are told to be, where they lie."""

import contextlib
import http.server
import io
import json
import threading
import urllib.parse

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.forms import build, wanted, words
from vdit_jax.data import index, reading, sources

LABEL = tfds.features.ClassLabel(names=["ApplyEyeMakeup", "jump_rope"])
FRAMES = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3)))


def png(image):
  file = io.BytesIO()
  Image.fromarray(image.squeeze()).save(file, "PNG")
  return file.getvalue()


def noise(seed, *shape):
  return np.random.default_rng(seed).integers(0, 255, shape, np.uint8)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
  """Images of five clips with class labels, as the catalogue's ucf101 has."""
  path = tmp_path_factory.mktemp("catalogue")
  clips = [noise(n, n + 2, 24, 32, 3) for n in range(5)]
  examples = [
    {"video": [png(frame) for frame in clip], "label": n % 2}
    for n, clip in enumerate(clips)
  ]
  return path, build(path, {"video": FRAMES, "label": LABEL}, examples), clips


def test_frames_and_labels_are_read(catalogue, trained):
  path, name, clips = catalogue
  source = reading.open_source(name, "train", path)
  assert (source.kind, source.shape) == ("frames", None)
  assert source.index.num_frames.tolist() == [2, 3, 4, 5, 6]
  assert set(source.index.height) == {24} and set(source.index.width) == {32}
  with pytest.raises(ValueError, match="shape must be given"):
    reading.evaluation_batches(source, wanted(None, 8), 2)
  read = reading.evaluation_batches(source, wanted(trained, 20), 2, (3, 24, 32))
  (first, keys), (second, _) = read
  assert keys == ["train[1]", "train[2]"]
  video = np.concatenate([first.video, second.video])
  np.testing.assert_array_equal(video, [clip[:3] for clip in clips[1:]])
  said = ["a video of jump rope", "a video of apply eye makeup"]
  tokens, _ = trained.encode(said, 20)
  np.testing.assert_array_equal(words(first).tokens, tokens)


def test_sizes_are_looked_for_once(catalogue, monkeypatch):
  path, name, _ = catalogue
  first = reading.open_source(name, "train", path).index
  monkeypatch.setattr(sources, "_scan", None)
  second = reading.open_source(name, "train", path).index
  np.testing.assert_array_equal(first.num_frames, second.num_frames)
  part = reading.open_source(name, "train[1:3]", path)
  assert part.num_records == 2
  assert part.index.num_frames.tolist() == [3, 4]


def test_index_of_another_dataset_is_refused(catalogue, tmp_path):
  path, name, clips = catalogue
  other = build(
    tmp_path,
    {"video": FRAMES, "label": LABEL},
    [{"video": [png(clips[0][0])], "label": 0}],
  )
  folder = path / name / "1.0.0"
  index.write(tmp_path / other / "1.0.0", "train", index.read(folder, "train"))
  with pytest.raises(ValueError, match="index of 5 records.*files of 1"):
    reading.open_source(other, "train", tmp_path)


def test_one_tensor_of_any_name_is_the_video(tmp_path):
  """As the catalogue's moving_mnist: no caption, no label, no key."""
  encoding = tfds.features.Encoding.BYTES
  shape = (4, 16, 16, 1)
  feature = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=encoding)
  clips = [noise(n, *shape) for n in range(3)]
  name = build(
    tmp_path,
    {"image_sequence": feature},
    [{"image_sequence": clip} for clip in clips],
  )
  source = reading.open_source(name, "train", tmp_path)
  assert (source.kind, source.shape) == ("video", (4, 16, 16, 1))
  with pytest.raises(ValueError, match="neither captions nor labels"):
    reading.evaluation_batches(source, wanted(None, 8), 3)
  options = reading.Options(caption_template="digits that move")
  [(batch, keys)] = reading.evaluation_batches(
    source, wanted(None, 8, options), 3
  )
  want = np.broadcast_to(clips, (3, 4, 16, 16, 3))
  np.testing.assert_array_equal(batch.video, want)
  assert keys == ["train[0]", "train[1]", "train[2]"]
  texts = [r["caption"] for r in reading.records(source, options=options)]
  assert texts == ["digits that move"] * 3


def test_two_features_that_may_be_the_video_are_refused(tmp_path):
  frame = png(noise(0, 8, 8, 3))
  features = {"left": FRAMES, "right": FRAMES}
  name = build(tmp_path, features, [{"left": [frame], "right": [frame]}])
  with pytest.raises(ValueError, match="2 of them can be videos"):
    reading.open_source(name, "train", tmp_path)


def test_video_features_need_tensorflow(tmp_path):
  name = build(
    tmp_path, {"video": FRAMES}, [{"video": [png(noise(0, 8, 8, 3))]}]
  )
  path = tmp_path / name / "1.0.0" / "features.json"
  stored = json.loads(path.read_text())
  shape = {"dimensions": ["-1", "8", "8", "3"]}
  stored["featuresDict"]["features"]["video"] = {
    "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
    "video": {"dtype": "uint8", "shape": shape},
  }
  path.write_text(json.dumps(stored))
  with pytest.raises(ValueError, match=r"pip install 'vdit_jax\[tf\]'"):
    reading.open_source(name, "train", tmp_path)


def test_other_file_formats_are_refused_with_the_remedy(tmp_path):
  name = build(
    tmp_path, {"video": FRAMES}, [{"video": [png(noise(0, 8, 8, 3))]}]
  )
  path = tmp_path / name / "1.0.0" / "dataset_info.json"
  info = json.loads(path.read_text())
  info["fileFormat"] = "tfrecord"
  path.write_text(json.dumps(info))
  with pytest.raises(ValueError, match="file_format='array_record'"):
    reading.open_source(name, "train", tmp_path)


class Objects(http.server.BaseHTTPRequestHandler):
  """What of Google Cloud Storage's JSON API is needed to read objects."""

  protocol_version = "HTTP/1.1"

  def do_GET(self):
    path = urllib.parse.urlparse(self.path).path
    name = urllib.parse.unquote(path.rpartition("/o/")[2])
    data = self.server.files["/bucket/" + name].getvalue()
    first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
    begin = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    self.server.asked.append((name, end - begin))
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
    self.send_header("Content-Length", str(end - begin))
    self.send_header("x-goog-generation", "1")
    self.end_headers()
    with contextlib.suppress(OSError):  # the reader had enough
      self.wfile.write(data[begin:end])

  def log_message(self, *args):
    pass


@pytest.fixture
def cloud(store, monkeypatch):
  """A fake gs://, for epath in memory and for array_record over HTTP."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Objects)
  server.files, server.asked = store.store, []
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)
  yield server
  server.shutdown()
  server.server_close()


def test_datasets_are_read_where_they_lie_in_a_bucket(
  catalogue, cloud, bucket, trained
):
  path, name, clips = catalogue
  for file in (path / name).rglob("*"):
    if file.is_file():
      copy = bucket / "data" / file.relative_to(path)
      copy.write_bytes(file.read_bytes())
  local, remote = (
    reading.open_source(name, "train", where)
    for where in (path, bucket / "data")
  )
  how = wanted(trained, 20)
  planned = lambda step: ((2, 16, 16), np.arange(4))
  for (batch, keys), (want, _) in zip(
    reading.batches(remote, how, range(3), seed=1, planned=planned),
    reading.batches(local, how, range(3), seed=1, planned=planned),
    strict=True,
  ):
    assert batch.weight.all() and keys == [f"train[{i}]" for i in range(4)]
    np.testing.assert_array_equal(batch.video, want.video)
    np.testing.assert_array_equal(words(batch).tokens, words(want).tokens)
  assert any(name.endswith("-of-00001") for name, _ in cloud.asked)
