"""The same training steps in PyTorch, as its users write them.

L2RW and Meta-Weight-Net by double backward: the inner gradient is taken with
`create_graph=True`, the look-ahead is a functional step, and a second, ordinary pass
trains with the weights. `Eager.example_weights` is that of Algorithm 1 in Ren et al.
(2018); `Traced` takes the same weights by `torch.func.grad` for `torch.compile`
(in its default mode), which does not go through `create_graph`.

As in released code the training batch passes the network twice, and in `Eager` all
three passes move BatchNorm's statistics; the look-ahead of `Traced` leaves them alone.
On a GPU products of float32 are TF32, as JAX takes them, and images of several
channels and the kernels of convolutions lie channels last. On a CPU that made L2RW of
ResNet-32 slower, but plain training with BatchNorm faster; there they lie as usual.
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


def device(on_gpu: bool) -> torch.device | None:
  """Where PyTorch computes beside ours; None if it sees no such device."""
  if on_gpu:
    torch.backends.cudnn.benchmark = True  # XLA chooses its convolutions by time too.
    # And computes products of float32 in TF32, which here is not the default.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda") if torch.cuda.is_available() else None
  torch.set_num_threads(_turns.num_cpus())
  return torch.device("cpu")


def batch(arrays: Mapping[str, Any], where: torch.device) -> Batch:
  """Images NCHW and labels of a batch of ours."""
  images = torch.tensor(arrays["image"]).permute(0, 3, 1, 2)
  images = images.contiguous(memory_format=_layout(images.shape[1], where))
  return images.to(where), torch.tensor(arrays["label"]).long().to(where)


def _layout(channels, where):
  if where.type == "cuda" and channels > 1:
    return torch.channels_last
  return torch.contiguous_format


def losses(model: Callable[..., Any], data: Batch) -> torch.Tensor:
  """[B], in nats."""
  return functional.cross_entropy(model(data[0]).float(), data[1], reduction="none")


class Eager:
  """A network in training.

  Args:
    model: it.
    learning_rate: of SGD, and of Meta-Weight-Net's look-ahead.
    dtype: of the computation; the parameters are float32.
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
    """Casts to the computation's type, where it is another."""
    if self._dtype == torch.float32:
      return contextlib.nullcontext()
    return torch.autocast(self._device.type, self._dtype)

  def plain(self, data: Batch, meta: Batch | None = None) -> torch.Tensor:
    """A step of SGD on the mean loss, which is returned."""
    del meta
    with self.precision():
      loss = losses(self.model, data).mean()
    return self._update(loss)

  def l2rw(self, data: Batch, meta: Batch) -> torch.Tensor:
    """A step of L2RW; the weighted loss is returned."""
    weights = self.example_weights(data, meta)
    with self.precision():
      loss = (weights * losses(self.model, data)).sum()
    return self._update(loss)

  def meta_weight_net(self, data: Batch, meta: Batch) -> torch.Tensor:
    """A step of Meta-Weight-Net; the weighted loss is returned."""
    gradient = self.network_gradient(data, meta)
    for parameter, g in zip(self.weight_net.parameters(), gradient, strict=True):
      parameter.grad = g
    self._weight_optimizer.step()
    with self.precision():
      own = losses(self.model, data)
      with torch.no_grad():
        weights = self.weight_net(own[:, None])[:, 0]
      loss = (weights * own).mean()
    return self._update(loss)

  def example_weights(self, data: Batch, meta: Batch) -> torch.Tensor:
    """L2RW's, [B]; they add up to 1, or are all zero."""
    epsilon = torch.zeros(len(data[1]), device=self._device, requires_grad=True)
    meta_loss = self._look_ahead(lambda own: (epsilon * own).sum(), data, meta, 1.0)
    (slopes,) = torch.autograd.grad(meta_loss, epsilon)
    return _rectified(slopes)

  def network_gradient(self, data: Batch, meta: Batch) -> tuple[torch.Tensor, ...]:
    """Of the meta loss in the parameters of Meta-Weight-Net's network."""

    def loss_fn(own):
      return (self.weight_net(own.detach()[:, None])[:, 0] * own).mean()

    meta_loss = self._look_ahead(loss_fn, data, meta, self._rate)
    return torch.autograd.grad(meta_loss, tuple(self.weight_net.parameters()))

  def _look_ahead(self, loss_fn, data, meta, rate):
    """The meta loss after a step on `loss_fn` of the losses, as a graph."""
    parameters = dict(self.model.named_parameters())
    with self.precision():
      with _twice_differentiable():
        inner = loss_fn(losses(self._at(parameters), data))
      gradient = torch.autograd.grad(
        inner, tuple(parameters.values()), create_graph=True
      )
      ahead = {
        name: value - rate * g
        for (name, value), g in zip(parameters.items(), gradient, strict=True)
      }
      return losses(self._at(ahead), meta).mean()

  def _at(self, parameters):
    return lambda x: torch.func.functional_call(self.model, parameters, (x,))

  def _update(self, loss):
    self._optimizer.zero_grad()
    loss.backward()
    self._optimizer.step()
    return loss.detach()


class Traced(Eager):
  """The same for `torch.compile`: derivatives by `torch.func`."""

  def __init__(self, model: nn.Module, *options: Any) -> None:
    super().__init__(model, *options)
    self.model = torch.compile(model)
    self._inner_model = model
    self.slopes_fn = torch.compile(self.slopes, fullgraph=True)

  def example_weights(self, data: Batch, meta: Batch) -> torch.Tensor:
    """See `Eager`."""
    start = torch.zeros(len(data[1]), device=self._device)
    return _rectified(self._slopes_at(start, data, meta, 1.0))

  def network_gradient(self, data: Batch, meta: Batch) -> tuple[torch.Tensor, ...]:
    """See `Eager`; of its chain of derivatives the last link is not compiled."""
    with torch.no_grad(), self.precision():
      own = losses(self.model, data)
    weights = self.weight_net(own[:, None])[:, 0] / len(own)
    slopes = self._slopes_at(weights.detach(), data, meta, self._rate)
    return torch.autograd.grad(weights, tuple(self.weight_net.parameters()), slopes)

  def _slopes_at(self, *arguments):
    parameters = {k: v.detach() for k, v in self._inner_model.named_parameters()}
    with self.precision():
      return self.slopes_fn(parameters, *arguments)

  def slopes(
    self,
    parameters: dict[str, torch.Tensor],
    weights: torch.Tensor,
    data: Batch,
    meta: Batch,
    rate: float,
  ) -> torch.Tensor:
    """dM/dw [B] at `weights`, not compiled."""

    def losses_at(parameters, data):
      # `torch.func.grad` refuses changes of BatchNorm's own statistics.
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
      ahead = {k: value - rate * gradient[k] for k, value in parameters.items()}
      return losses_at(ahead, meta).mean()

    return torch.func.grad(meta_loss)(weights)


def _twice_differentiable():
  """Not the fused kernels of attention: they have no derivative of the second order."""
  return sdpa_kernel(SDPBackend.MATH)


def _rectified(slopes):
  weights = torch.clamp(-slopes, min=0)
  total = weights.sum()
  return weights / torch.where(total > 0, total, torch.ones_like(total))


def contestant(
  setting: _networks.Setting,
  method: str,
  learning_rate: float,
  where: torch.device,
  compiled: bool = False,
) -> _turns.Contestant:
  """A step of a fresh network.

  Args:
    setting: network, type and batches.
    method: one of `METHODS`.
    learning_rate: see `Eager`.
    where: the device.
    compiled: by `torch.compile`; the first step, which compiles, is taken here.
  """
  train, clean = setting.batches()
  data, meta = batch(train, where), None if clean is None else batch(clean, where)
  layout = _layout(data[0].shape[1], where)
  model = _torch_networks.NETWORKS[setting.network]().train()
  model = model.to(where, memory_format=layout)
  made = (Traced if compiled else Eager)(model, learning_rate, setting.dtype)
  step = getattr(made, method)

  def run(steps):
    for _ in range(steps):
      loss = step(data, meta)
    return float(loss)  # waits

  facts: dict[str, Any] = {
    "compile_seconds": None,
    "num_parameters": sum(p.numel() for p in model.parameters()),
    **dict.fromkeys(("flops", "bytes_accessed", "flops_counted")),
    "temporary_bytes": None,
  }
  started = time.perf_counter()
  run(1)
  if compiled:
    facts["compile_seconds"] = time.perf_counter() - started
  if where.type == "cuda":
    facts["temporary_bytes"] = _peak_memory(run)
  framework = "torch.compile" if compiled else "torch"
  engine = None
  if method != "plain":
    engine = "torch.func.grad" if compiled else "double backward"
  return _turns.Contestant(method, engine, framework, run, facts)


def _peak_memory(run):
  """Bytes of a step beyond what is kept from step to step."""
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  run(1)
  return torch.cuda.max_memory_allocated() - before
