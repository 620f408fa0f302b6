"""Some of the training steps of `_steps`, in idiomatic PyTorch code.

L2RW and Meta-Weight-Net use double backward: the inner gradient is computed with
`create_graph=True`, the look-ahead is a functional step, and a second, ordinary pass
trains with the weights. `Eager.example_weights` implements Algorithm 1 of Ren et al.
(2018). `Traced` computes the same weights with `torch.func.grad`, because
`torch.compile` (used in its default mode) does not support `create_graph`.

As in the papers' released code, the training batch passes through the network twice;
with Meta-Weight-Net, `Traced` needs a third pass for the losses. In `Eager`, all
passes, including that of the meta batch, update the BatchNorm statistics. In `Traced`,
the passes inside `torch.func.grad` do not.

On a GPU, products of float32 matrices use TF32, as in JAX. Images with several channels
and the networks for them have the memory format channels_last. On a CPU, the default
format is used: channels_last made plain training with BatchNorm faster there, but L2RW
with ResNet-32 slower.
"""

from collections.abc import Callable, Mapping
import contextlib
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel

from benchmarks import _networks
from benchmarks import _torch_networks
from benchmarks import _turns

Batch = tuple[torch.Tensor, torch.Tensor]
METHODS = ("plain", "l2rw", "meta_weight_net")


def select_device(on_gpu: bool) -> torch.device | None:
  """Configures PyTorch and returns its device.

  Args:
    on_gpu: whether JAX computes on a GPU.

  Returns:
    A device of the kind that JAX uses, or None if PyTorch has none.
  """
  if on_gpu:
    # XLA also chooses its convolution algorithms by timing them.
    torch.backends.cudnn.benchmark = True
    # XLA also uses TF32 for float32, which is not the default of PyTorch.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda") if torch.cuda.is_available() else None
  torch.set_num_threads(_turns.num_cpus())
  return torch.device("cpu")


def batch(arrays: Mapping[str, Any], device: torch.device) -> Batch:
  """Converts a batch of this library to PyTorch.

  Args:
    arrays: a batch with images [B, H, W, C] and labels.
    device: the device of the tensors.

  Returns:
    Images [B, C, H, W] and labels [B].
  """
  images = torch.tensor(arrays["image"]).permute(0, 3, 1, 2)
  images = images.contiguous(memory_format=_layout(images.shape[1], device))
  return images.to(device), torch.tensor(arrays["label"]).long().to(device)


def _layout(channels, device):
  if device.type == "cuda" and channels > 1:
    return torch.channels_last
  return torch.contiguous_format


def losses(model: Callable[..., Any], data: Batch) -> torch.Tensor:
  """Returns the cross-entropy of each example in nats, [B]."""
  return functional.cross_entropy(model(data[0]).float(), data[1], reduction="none")


class Eager:
  """Training steps of a network in eager mode.

  Args:
    model: the network.
    learning_rate: the learning rate of SGD and of Meta-Weight-Net's look-ahead.
    dtype: the type of the computation. The parameters are float32.
  """

  def __init__(
    self, model: nn.Module, learning_rate: float, dtype: str = "float32"
  ) -> None:
    self.model = model
    self._rate, self._dtype = learning_rate, getattr(torch, dtype)
    self._optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    self._device = next(model.parameters()).device
    self.weight_net = nn.Sequential(
      nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()
    ).to(self._device)
    self._weight_optimizer = torch.optim.Adam(
      self.weight_net.parameters(), lr=1e-3, weight_decay=1e-4
    )

  def precision(self) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that casts to the type of the computation if necessary."""
    if self._dtype == torch.float32:
      return contextlib.nullcontext()
    return torch.autocast(self._device.type, self._dtype)

  def plain(self, data: Batch, meta: Batch | None = None) -> torch.Tensor:
    """Takes an SGD step on the mean loss and returns that loss."""
    del meta
    with self.precision():
      loss = losses(self.model, data).mean()
    return self._update(loss)

  def l2rw(self, data: Batch, meta: Batch) -> torch.Tensor:
    """Takes a step of L2RW and returns the weighted loss."""
    weights = self.example_weights(data, meta)
    with self.precision():
      loss = (weights * losses(self.model, data)).sum()
    return self._update(loss)

  def meta_weight_net(self, data: Batch, meta: Batch) -> torch.Tensor:
    """Takes a step of Meta-Weight-Net and returns the weighted loss."""
    gradient = self.network_gradient(data, meta)
    for parameter, g in zip(self.weight_net.parameters(), gradient, strict=True):
      parameter.grad = g
    self._weight_optimizer.step()
    with self.precision():
      values = losses(self.model, data)
      with torch.no_grad():
        weights = self.weight_net(values[:, None])[:, 0]
      loss = (weights * values).mean()
    return self._update(loss)

  def example_weights(self, data: Batch, meta: Batch) -> torch.Tensor:
    """Returns the weights of L2RW, [B]. Their sum is 1, or all of them are 0."""
    epsilon = torch.zeros(len(data[1]), device=self._device, requires_grad=True)
    meta_loss = self._lookahead_meta_loss(
      lambda values: (epsilon * values).sum(), data, meta, 1.0
    )
    (weight_gradient,) = torch.autograd.grad(meta_loss, epsilon)
    return _rectified(weight_gradient)

  def network_gradient(self, data: Batch, meta: Batch) -> tuple[torch.Tensor, ...]:
    """Returns dM/dphi, for the parameters phi of the weighting network."""

    def loss_fn(values):
      return (self.weight_net(values.detach()[:, None])[:, 0] * values).mean()

    meta_loss = self._lookahead_meta_loss(loss_fn, data, meta, self._rate)
    return torch.autograd.grad(meta_loss, tuple(self.weight_net.parameters()))

  def _lookahead_meta_loss(self, loss_fn, data, meta, rate):
    """The differentiable meta loss after an SGD step on `loss_fn` of the losses."""
    parameters = dict(self.model.named_parameters())
    with self.precision():
      with _twice_differentiable():
        inner = loss_fn(losses(self._model_fn(parameters), data))
      gradient = torch.autograd.grad(
        inner, tuple(parameters.values()), create_graph=True
      )
      lookahead_parameters = {
        name: value - rate * g
        for (name, value), g in zip(parameters.items(), gradient, strict=True)
      }
      return losses(self._model_fn(lookahead_parameters), meta).mean()

  def _model_fn(self, parameters):
    return lambda x: torch.func.functional_call(self.model, parameters, (x,))

  def _update(self, loss):
    self._optimizer.zero_grad()
    loss.backward()
    self._optimizer.step()
    return loss.detach()


class Traced(Eager):
  """The same steps for `torch.compile`: derivatives are computed by `torch.func`."""

  def __init__(self, model: nn.Module, *options: Any) -> None:
    super().__init__(model, *options)
    self.model = torch.compile(model)
    self._inner_model = model
    self.weight_gradient_fn = torch.compile(self.weight_gradient, fullgraph=True)

  def example_weights(self, data: Batch, meta: Batch) -> torch.Tensor:
    """See `Eager`."""
    zeros = torch.zeros(len(data[1]), device=self._device)
    return _rectified(self._compiled_weight_gradient(zeros, data, meta, 1.0))

  def network_gradient(self, data: Batch, meta: Batch) -> tuple[torch.Tensor, ...]:
    """See `Eager`. The derivative of the weighting network is not compiled."""
    with torch.no_grad(), self.precision():
      values = losses(self.model, data)
    weights = self.weight_net(values[:, None])[:, 0] / len(values)
    weight_gradient = self._compiled_weight_gradient(
      weights.detach(), data, meta, self._rate
    )
    parameters = tuple(self.weight_net.parameters())
    return torch.autograd.grad(weights, parameters, weight_gradient)

  def _compiled_weight_gradient(self, *arguments):
    parameters = {k: v.detach() for k, v in self._inner_model.named_parameters()}
    with self.precision():
      return self.weight_gradient_fn(parameters, *arguments)

  def weight_gradient(
    self,
    parameters: dict[str, torch.Tensor],
    weights: torch.Tensor,
    data: Batch,
    meta: Batch,
    rate: float,
  ) -> torch.Tensor:
    """Returns dM/dw at `weights`, [B]; `rate` is the look-ahead's learning rate."""

    def losses_at(parameters, data):
      # `torch.func.grad` does not allow in-place updates of the BatchNorm statistics.
      copies = {k: v.clone() for k, v in self._inner_model.named_buffers()}
      both = (parameters, copies)
      return losses(
        lambda x: torch.func.functional_call(self._inner_model, both, (x,)), data
      )

    def meta_loss(weights):
      def inner(parameters):
        with _twice_differentiable():
          return (weights * losses_at(parameters, data)).sum()

      gradient = torch.func.grad(inner)(parameters)
      lookahead_parameters = {
        k: value - rate * gradient[k] for k, value in parameters.items()
      }
      return losses_at(lookahead_parameters, meta).mean()

    return torch.func.grad(meta_loss)(weights)


def _twice_differentiable():
  """Avoids fused attention kernels, which have no second derivative."""
  return sdpa_kernel(SDPBackend.MATH)


def _rectified(weight_gradient):
  weights = torch.clamp(-weight_gradient, min=0)
  total = weights.sum()
  return weights / torch.where(total > 0, total, torch.ones_like(total))


def implementation(
  setting: _networks.Setting,
  method: str,
  learning_rate: float,
  device: torch.device,
  compiled: bool = False,
) -> _turns.Implementation:
  """Returns a training step of a newly initialized network.

  Args:
    setting: the network, the type of the computation, and the batch sizes.
    method: one of `METHODS`.
    learning_rate: see `Eager`.
    device: the device to compute on.
    compiled: whether to use `torch.compile`. This function takes the first step, which
      compiles.
  """
  train, meta_arrays = setting.batches()
  data = batch(train, device)
  meta = None if meta_arrays is None else batch(meta_arrays, device)
  layout = _layout(data[0].shape[1], device)
  model = _torch_networks.NETWORKS[setting.network]().train()
  model = model.to(device, memory_format=layout)
  trainer = (Traced if compiled else Eager)(model, learning_rate, setting.dtype)
  step = getattr(trainer, method)

  def run(steps):
    for _ in range(steps):
      loss = step(data, meta)
    return float(loss)  # Waits for the step.

  info: dict[str, Any] = {
    "compile_seconds": None,
    "num_parameters": sum(p.numel() for p in model.parameters()),
    **dict.fromkeys(("flops", "bytes_accessed", "flops_counted")),
    "temporary_bytes": None,
  }
  started = time.perf_counter()
  run(1)
  if compiled:
    info["compile_seconds"] = time.perf_counter() - started
  if device.type == "cuda":
    info["temporary_bytes"] = _peak_memory(run)
  framework = "torch.compile" if compiled else "torch"
  engine = None
  if method != "plain":
    engine = "torch.func.grad" if compiled else "double backward"
  return _turns.Implementation(method, engine, framework, run, info)


def _peak_memory(run):
  """The additional memory at the peak of a step, in bytes."""
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  run(1)
  return torch.cuda.max_memory_allocated() - before
