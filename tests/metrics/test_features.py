"""I3D against published logits and PyTorch; resizing; AlexNet on frames."""

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_nn

from vdit_jax.data import digits as scenes
from vdit_jax.metrics import consistency, features, frechet
from vdit_jax.metrics import weights as files

# The reference (google-research/frechet_video_distance with TensorFlow Hub's
# deepmind/i3d-kinetics-400/1) on 15 black frames, as a run of its example
# printed them in github.com/zhanganny/cal_FVD, my_suc.py: classes 0..2 and
# 397..399.
_BLACK = (0.7422105, 2.829727, 0.39993525, -0.38092658, 0.65539014, -1.4021297)
_FRAMES = 15


@pytest.fixture(scope="module")
def weights():
  """Weights of I3D."""
  return files.read(files.I3D)


@pytest.fixture(scope="module")
def clips():
  """A black, a white and a random clip, [3, 15, 224, 224, 3]."""
  shape = _FRAMES, 224, 224, 3
  noise = np.random.default_rng(0).uniform(-1, 1, (_FRAMES, 14, 28, 3))
  noise = noise.repeat(16, axis=1).repeat(8, axis=2)
  return np.stack([np.full(shape, -1), np.ones(shape), noise]).astype("f4")


@pytest.fixture(scope="module")
def logits(weights, clips):
  """I3D's logits of the clips."""
  return np.asarray(features.i3d(weights, clips))


def test_logits_are_the_published_ones(logits):
  np.testing.assert_allclose(
    logits[0][[0, 1, 2, -3, -2, -1]], _BLACK, atol=1e-5
  )


def test_fvd_of_the_reference_example(logits):
  """16 black clips from 16 white ones: "should be around 131".

  Ours is 133.9; JunyaoHu/common_metrics_on_video_quality has 134.2 from
  another port of the weights.
  """
  black, white = (np.tile(x, (16, 1)) for x in logits[:2])
  assert abs(frechet.distance(black, white) - 131) < 4


def test_logits_are_pytorchs(weights, clips, logits):
  expected = _torch_i3d(weights, torch.tensor(clips[2:]))
  assert expected.std() > 0.5
  np.testing.assert_allclose(logits[2:], expected, rtol=1e-5, atol=2e-5)


def _torch_i3d(weights, video):
  """I3D by PyTorch's operations, its paddings written out as TensorFlow's."""

  def pad(x, window, strides, value):
    sides = []
    for n, k, s in zip(x.shape[2:], window, strides, strict=True):
      total = max((-(-n // s) - 1) * s + k - n, 0)
      sides = [total // 2, total - total // 2, *sides]
    return torch_nn.pad(x, sides, value=value)

  def pool(x, window, strides):
    x = pad(x, window, strides, -float("inf"))
    return torch_nn.max_pool3d(x, window, strides)

  def unit(x, name, stride=1):
    kernel = torch.tensor(weights[f"params/{name}/Conv_0/kernel"])
    kernel = kernel.permute(4, 3, 0, 1, 2)
    x = pad(x, kernel.shape[2:], (stride,) * 3, 0)
    x = torch_nn.conv3d(x, kernel, stride=stride)
    norm = f"{name}/BatchNorm_0"
    mean, var = (
      torch.tensor(weights[f"batch_stats/{norm}/{leaf}"]).flatten()
      for leaf in ("mean", "var")
    )
    bias = torch.tensor(weights[f"params/{norm}/bias"])
    x = torch_nn.batch_norm(x, mean, var, None, bias, eps=1e-3)
    return torch_nn.relu(x)

  def mixed(x, name):
    name = f"Mixed_{name}"
    one = unit(x, f"{name}/Branch_0/Conv3d_0a_1x1")
    two = unit(x, f"{name}/Branch_1/Conv3d_0a_1x1")
    two = unit(two, f"{name}/Branch_1/Conv3d_0b_3x3")
    three = unit(x, f"{name}/Branch_2/Conv3d_0a_1x1")
    three = unit(three, f"{name}/Branch_2/Conv3d_0b_3x3")
    four = pool(x, (3, 3, 3), (1, 1, 1))
    four = unit(four, f"{name}/Branch_3/Conv3d_0b_1x1")
    return torch.cat([one, two, three, four], 1)

  x = unit(video.permute(0, 4, 1, 2, 3), "Conv3d_1a_7x7", 2)
  x = pool(x, (1, 3, 3), (1, 2, 2))
  x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
  x = pool(x, (1, 3, 3), (1, 2, 2))
  x = mixed(mixed(x, "3b"), "3c")
  x = pool(x, (3, 3, 3), (2, 2, 2))
  for name in ("4b", "4c", "4d", "4e", "4f"):
    x = mixed(x, name)
  x = pool(x, (2, 2, 2), (2, 2, 2))
  x = mixed(mixed(x, "5b"), "5c")
  x = torch_nn.avg_pool3d(x, (2, 7, 7), 1)
  name = "params/Logits/Conv3d_0c_1x1/Conv_0"
  kernel = torch.tensor(weights[f"{name}/kernel"]).permute(4, 3, 0, 1, 2)
  x = torch_nn.conv3d(x, kernel, torch.tensor(weights[f"{name}/bias"]))
  return x.mean((2, 3, 4)).numpy()


def test_short_clips_are_refused(weights):
  with pytest.raises(ValueError, match="at least 9 frames"):
    features.i3d(weights, np.zeros((1, 8, 32, 32, 3), np.float32))


@pytest.mark.parametrize("size", [(5, 7), (300, 224), (224, 224)])
def test_stretching_is_tensorflow_1s_formula(size):
  """Pixel i of the output lies at i H / 224 of the input."""
  H, W = size
  image = np.random.default_rng(0).normal(size=(H, W, 1)).astype(np.float32)
  found = np.asarray(features.stretch(image, 224))
  for i, j in ((0, 0), (1, 2), (100, 150), (223, 223)):
    y, x = i * H / 224, j * W / 224
    top, left = int(y), int(x)
    rows = [image[min(top + k, H - 1), :, 0] for k in (0, 1)]
    row = rows[0] * (1 - y + top) + rows[1] * (y - top)
    low, high = row[left], row[min(left + 1, W - 1)]
    expected = low * (1 - x + left) + high * (x - left)
    np.testing.assert_allclose(found[i, j, 0], expected, atol=1e-5)


def test_resize_keeps_the_aspect():
  video = np.zeros((1, 2, 30, 45, 3), np.float32)
  assert features.resize(video, 96).shape == (1, 2, 96, 144, 3)


def test_a_digit_that_changes_is_less_consistent():
  """Real clips of digits, and the same with their second half exchanged."""
  images, labels = scenes.scans("test")
  chosen = [images[np.flatnonzero(labels == n)[0]] for n in range(4)]
  clips = np.stack([_moving(image) for image in chosen])
  mixed = clips.copy()
  mixed[:, 4:] = np.roll(clips, 1, axis=0)[:, 4:]
  network = files.read(files.ALEXNET)
  steady, changed = (
    np.asarray(features.frames(network, x)) for x in (clips, mixed)
  )
  for measure in (consistency.neighbour, consistency.first):
    assert (measure(steady) > measure(changed)).all()


def _moving(image):
  """A digit [H, W] of ink moving right: [8, 32, 32, 3] in [-1, 1]."""
  patch = scenes.resize(image, 16)
  video = np.full((8, 32, 32, 3), -1.0, np.float32)
  for i in range(8):
    h, w = patch.shape
    video[i, 6 : 6 + h, 1 + i : 1 + i + w] = 2 * patch[..., None] - 1
  return video
