"""PyTorch's 3D convolutions at given shapes: the best that a CPU is known for.

It hands them to oneDNN. Either layout of memory can be the faster one.
"""

from collections.abc import Callable, Sequence

import torch

Shape = tuple[int, ...]


def alone(
  calls: Sequence[tuple[Shape, Shape]], *, last: bool, gradients: bool
) -> Callable[[], None]:
  """Run convolutions one by one, causal in time, of the same size in space.

  Args:
    calls: shapes of each input [B, F, H, W, C] and kernel [kt, kh, kw, C, D].
    last: whether channels lie last in memory.
    gradients: whether those of the input and the kernel are computed too.
  """
  runs = [_one(*shapes, last, gradients) for shapes in calls]

  def run():
    for one in runs:
      one()

  return run


def _one(x_shape: Shape, kernel_shape: Shape, last: bool, gradients: bool):
  kt, kh, kw, C, D = kernel_shape
  B, F, H, W, _ = x_shape
  # Filled up in time before it is timed.
  x, kernel = torch.randn(B, C, F + kt - 1, H, W), torch.randn(D, C, kt, kh, kw)
  if last:
    x, kernel = (
      a.contiguous(memory_format=torch.channels_last_3d) for a in (x, kernel)
    )
  for a in (x, kernel):
    a.requires_grad_(gradients)

  def run():
    x.grad = kernel.grad = None
    with torch.set_grad_enabled(gradients):
      y = torch.nn.functional.conv3d(x, kernel, padding=(0, kh // 2, kw // 2))
      if gradients:
        y.backward(y.detach())

  return run
