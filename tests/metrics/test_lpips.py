"""LPIPS against PyTorch with the same weights, and against published values."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_nn

from vdit_jax.metrics import lpips
from vdit_jax.metrics import weights as files

# SHA-256 of the linear layers of version 0.1 in the package lpips 0.1.4
# (weights/v0.1/alex.pth, vgg.pth: lin0..lin4, float32, one after the other).
_LINEAR = {
  "alex": "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
  "vgg": "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
}


@pytest.fixture(scope="module")
def weights():
  """Weights of both networks, by name."""
  return {n: files.read(file) for n, file in lpips.NETWORKS.items()}


def _pair(shape, seed=0):
  rng = np.random.default_rng(seed)
  a = rng.uniform(-1, 1, shape).astype(np.float32)
  return a, np.clip(a + rng.normal(size=shape) * 0.3, -1, 1).astype(np.float32)


def _torch_features(weights, network, images):
  """Features of images [N, 3, H, W] by PyTorch's own operations."""
  mean = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
  std = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
  x = (images - mean) / std

  def layer(prefix, i, x, **how):
    kernel = torch.tensor(weights[f"{prefix}/Conv_{i}/kernel"])
    bias = torch.tensor(weights[f"{prefix}/Conv_{i}/bias"])
    kernel = kernel.permute(3, 2, 0, 1)
    return torch_nn.relu(torch_nn.conv2d(x, kernel, bias, **how))

  if network == "alex":
    one = layer("AlexNet_0", 0, x, stride=4, padding=2)
    two = torch_nn.max_pool2d(one, 3, 2)
    two = layer("AlexNet_0", 1, two, padding=2)
    three = torch_nn.max_pool2d(two, 3, 2)
    three = layer("AlexNet_0", 2, three, padding=1)
    four = layer("AlexNet_0", 3, three, padding=1)
    return [one, two, three, four, layer("AlexNet_0", 4, four, padding=1)]
  found = []
  for i in range(13):
    if i in (2, 4, 7, 10):
      found.append(x)
      x = torch_nn.max_pool2d(x, 2, 2)
    x = layer("VGG16_0", i, x, padding=1)
  return [*found, x]


def _torch_lpips(weights, network, a, b):
  """LPIPS of images [N, H, W, 3], as lpips 0.1.4 computes it."""
  pairs = zip(
    *(
      _torch_features(weights, network, torch.tensor(x).permute(0, 3, 1, 2))
      for x in (a, b)
    ),
    strict=True,
  )
  total = 0
  for i, (x, y) in enumerate(pairs):
    x, y = (v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (x, y))
    kernel = torch.tensor(weights[f"NetLinLayer_{i}/Conv_0/kernel"])
    error = torch_nn.conv2d((x - y) ** 2, kernel.permute(3, 2, 0, 1))
    total = total + error.mean((1, 2, 3))
  return total.numpy()


@pytest.mark.parametrize(
  "network, size",
  [("alex", (64, 64)), ("alex", (31, 75)), ("vgg", (32, 41))],
)
def test_values_are_pytorchs(weights, network, size):
  a, b = _pair((2, 2, *size, 3))
  found = lpips.distance(weights[network], a, b, network=network)
  flat = (x.reshape(-1, *x.shape[2:]) for x in (a, b))
  expected = _torch_lpips(weights[network], network, *flat)
  expected = expected.reshape(2, 2).mean(1)
  assert expected.min() > 0.02
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_linear_layers_are_those_of_lpips(weights, network):
  digest = hashlib.sha256()
  for i in range(5):
    kernel = weights[network][f"NetLinLayer_{i}/Conv_0/kernel"]
    digest.update(kernel.reshape(-1).tobytes())
  assert digest.hexdigest() == _LINEAR[network]


def test_published_value_of_vgg(weights):
  """The example in torchmetrics' documentation of LPIPS: 0.3493.

  Its random numbers come after those that initialise VGG16, 138,357,544, and
  the linear layers, 1,472.
  """
  torch.manual_seed(123)
  for _ in range(8):
    torch.rand((138_357_544 + 1_472) // 8)
  pair = [torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2)]
  a, b = (x.permute(0, 2, 3, 1).numpy()[None] for x in pair)
  found = lpips.distance(weights["vgg"], a, b, network="vgg")
  np.testing.assert_allclose(found, [0.3493], atol=5e-5)


def test_equal_videos_have_no_distance(weights):
  a, _ = _pair((1, 2, 40, 40, 3))
  assert lpips.distance(weights["alex"], a, a, network="alex") == 0


def test_too_small_frames_are_refused(weights):
  a, b = _pair((1, 1, 30, 64, 3))
  with pytest.raises(ValueError, match="at least 31 pixels"):
    lpips.distance(weights["alex"], a, b, network="alex")


def test_pairs_of_unlike_shape_are_refused(weights):
  a, b = _pair((1, 2, 40, 40, 3))
  with pytest.raises(ValueError, match="one shape"):
    lpips.distance(weights["alex"], a, b[:, :1], network="alex")
