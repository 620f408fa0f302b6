"""WarPI: random vectors rectify the logits of examples (Sun et al., 2022).

An amortized network maps an example's logits z and its (possibly wrong) label to the
mean and log-variance of a random vector v in (0, 1)^C, which multiplies the logits
before the softmax. With S draws, e ~ N(0, 1):

    v = sigmoid(mean + exp(log_variance / 2) e)
    l_rect(z, v, y) = -log softmax(v * z)_y, averaged over the draws

    virtual step   p' = p - a grad_p mean l_rect           v depends on phi
    meta step      phi by Adam on grad_phi of the meta loss at p', without v
    real step      p on grad_p mean l_rect, with new draws and the new phi, v constant

phi are the parameters of the amortized network, whose inputs are held constant. v = 1
gives the cross-entropy, v = c gives a temperature of 1 / c, and v -> 0 removes the
example's gradient. At test time v is not used. There is no prior and no KL term, as in
the released code.

These details are from the released code: tanh activations, hidden width 100,
Xavier-normal kernels (the log-variance layer has the uniform default of PyTorch), and a
learned label embedding of width C that is initialized from N(0, 1). There are two
differences from the released code. The log-variance is clipped to +-10, because exp
could overflow in diverging training; its gradient is 0 where it is clipped. The meta
set is disjoint from the training set. The released default is 3 draws, and the released
example uses 1; the default of this library is 3.

`Gradients.weights` contains the entry of v at the example's label, averaged over the
draws and divided by B. The averaged entry is roughly a factor on the gradient with
respect to the logit of that label (v also changes the softmax). It does not indicate
whether the label is wrong.

References:
  Sun, Guo, Wei, Han, Yin, "Learning to Rectify for Robust Learning with Noisy
  Labels", Pattern Recognition 124 (2022), arXiv:2111.04239.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import losses as losses_lib
from l2rw_jax import meta_network

_xavier = nn.initializers.glorot_normal()
_NOISE_KEY = 0x77617270


class RectifierNet(nn.Module):
  """Maps (logits, label) to the distribution of a rectifying vector.

  Attributes:
    num_classes: C; 14,320 parameters for C = 10 and hidden = 100.
    hidden: width of both hidden layers; the released code uses 200 for 101 classes.
    max_log_variance: the log-variance is clipped to plus or minus this value.
  """

  num_classes: int
  hidden: int = 100
  max_log_variance: float = 10.0

  @nn.compact
  def __call__(self, logits: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """Maps logits [B, C] and labels [B] to (mean, log_variance), both [B, C]."""
    embed = nn.Embed(
      self.num_classes, self.num_classes, embedding_init=nn.initializers.normal(1.0)
    )
    with base.implicit_promotion():  # flax promotes inputs and parameters to one type.
      x = jnp.concatenate([logits, base.take(embed.embedding, labels)], axis=-1)
      for _ in range(2):
        x = nn.tanh(nn.Dense(self.hidden, kernel_init=_xavier)(x))
      mean = nn.Dense(self.num_classes, kernel_init=_xavier)(x)
      log_variance = meta_network.dense(self.num_classes, self.hidden)(x)
    bound = self.max_log_variance
    return mean, jnp.clip(log_variance, -bound, bound)


def rectifiers(
  mean: base.Array, log_variance: base.Array, noise: base.Array | None
) -> base.Array:
  """Vectors v in (0, 1), [S, B, C].

  Args:
    mean: [B, C].
    log_variance: [B, C].
    noise: standard normal, [S, B, C]; None for the deterministic ablation,
      v = sigmoid(mean) with S = 1.

  >>> import jax.numpy as jnp
  >>> print(rectifiers(jnp.zeros((1, 2)), jnp.zeros((1, 2)), None))
  [[[0.5 0.5]]]
  """
  if noise is None:
    return nn.sigmoid(mean)[None]
  deviation = jnp.exp(log_variance / 2)[None]
  dtype = base.common_dtype(mean, noise)
  scaled = deviation.astype(dtype) * noise.astype(dtype)
  return nn.sigmoid(mean[None].astype(dtype) + scaled)


def rectified_cross_entropy(
  logits: base.Array, vectors: base.Array, labels: base.Array
) -> base.Array:
  """Mean over draws of -log softmax(v * z)_y, [B], in nats.

  Args:
    logits: z, [B, C].
    vectors: v, [S, B, C].
    labels: y, [B].

  Raises:
    InputError: the shapes do not match, or C is 1.

  >>> import jax.numpy as jnp
  >>> z, y = jnp.array([[2., -1., .5]]), jnp.array([0])
  >>> print(f"{rectified_cross_entropy(z, jnp.array([[[.9, .5, .2]]]), y)[0]:.4f}")
  0.2492
  """
  losses = jax.vmap(losses_lib.softmax_cross_entropy, in_axes=(0, None))
  # The product is at least as precise as the vectors, even if the logits have half
  # precision.
  dtype = base.common_dtype(vectors, logits)
  rectified = vectors.astype(dtype) * logits[None].astype(dtype)
  return losses(rectified, labels).mean(axis=0)


def inner_loss(
  net: RectifierNet,
  phi: base.PyTree,
  logits: base.Array,
  labels: base.Array,
  noise: base.Array | None,
) -> tuple[base.Array, base.Array]:
  """Rectified losses with the network phi, whose input logits are constant.

  Args:
    net: the amortized network.
    phi: variables of the amortized network.
    logits: [B, C].
    labels: [B].
    noise: [S, B, C] or None, see `rectifiers`.

  Returns:
    (losses [B], v [S, B, C]). The losses are differentiable in phi through v, and in
    the logits only through v * z.
  """
  distribution: Any = net.apply(phi, jax.lax.stop_gradient(logits), labels)
  mean, log_variance = distribution
  vectors = rectifiers(mean, log_variance, noise)
  return rectified_cross_entropy(logits, vectors, labels), vectors


def warpi(
  learning_rate: meta_network.Schedule,
  *,
  num_samples: int = 3,
  deterministic: bool = False,
  hidden: int = 100,
  optimizer: optax.GradientTransformation | None = None,
  every: int = 1,
  noise_fn: Callable[..., base.Array] = jax.random.normal,
) -> base.Method:
  """WarPI for the training loop.

  Args:
    learning_rate: learning rate of the virtual step, a number or a schedule; in the
      paper, it is the learning rate of the classifier.
    num_samples: S, the number of draws of the rectifying vector.
    deterministic: whether to use the ablation v = sigmoid(mean), without draws.
    hidden: hidden width of the amortized network.
    optimizer: optimizer of the amortized network; None is Adam at a constant 3e-4, as
      released.
    every: number of steps from one meta step to the next; 1 in the paper.
    noise_fn: `(key, shape, dtype) -> noise`, with one key for the virtual step and
      another for the real step. It may be called several times with the same key, and
      must then return the same noise. The shape is [B, S, C], where B is the global
      batch size. Use `noise_fn` to supply other draws, such as recorded or antithetic
      ones.

  Returns:
    A `base.Method` that needs a meta batch; its state is a `meta_network.State`.

  Raises:
    InputError: `num_samples` or `every` is not a positive integer, or (when traced) the
      classifier has a single logit or other outputs, the labels are not integers of
      shape [B], or `noise_fn` returns another shape.
  """
  num_samples = base.check_integer("warpi: num_samples", num_samples)
  every = base.check_integer("warpi: every", every)
  meta_optimizer = optimizer or optax.adam(3e-4)

  def init(key, problem, params):
    del params
    net, logits = RectifierNet(problem.num_classes, hidden), (1, problem.num_classes)
    phi = net.init(key, jnp.zeros(logits), jnp.zeros(1, jnp.int32))
    return meta_network.init(phi, meta_optimizer)

  def gradients(state, problem, inputs):
    net = RectifierNet(problem.num_classes, hidden)
    labels = inputs.batch["label"]
    # These keys differ from those of dropout and augmentation.
    virtual_key, real_key = jax.random.split(jax.random.fold_in(inputs.key, _NOISE_KEY))

    linearized = problem.linearize_batch_outputs(inputs)
    logits = linearized.outputs
    _check_logits(logits)
    losses_lib.check_logits(logits, labels)
    size = base.global_size(labels.shape[0], problem.axis_name)

    def noise(key):
      if deterministic:
        return None
      # The noise is drawn for the global batch, so that it does not depend on the
      # number of devices.
      shape = (size, num_samples, logits.shape[-1])
      drawn = noise_fn(key, shape, logits.dtype)
      if drawn.shape != shape:
        raise base.InputError(
          f"warpi: noise_fn must return an array of shape {shape}; got {drawn.shape}."
        )
      return base.local_slice(drawn, problem.axis_name).swapaxes(0, 1)

    def loss_fn(key):
      drawn = noise(key)

      def loss(logits, phi):
        return inner_loss(net, phi, logits, labels, drawn)[0].sum() / size

      return loss

    grads, state = meta_network.iterate(
      state,
      problem,
      inputs,
      linearized,
      loss_fn(virtual_key),
      loss_fn(real_key),
      learning_rate=learning_rate,
      optimizer=meta_optimizer,
      every=every,
    )
    _, vectors = inner_loss(net, state.params, logits, labels, noise(real_key))
    is_label = losses_lib.label_mask(labels, logits.shape[-1])
    label_factors = jnp.where(is_label, vectors.mean(axis=0), 0).sum(axis=-1)
    metrics = {
      **meta_network.metrics(state),
      "rectifier": base.pmean(vectors.mean(), problem.axis_name),
      "rectifier_of_label": base.pmean(label_factors.mean(), problem.axis_name),
    }
    losses = problem.loss(logits, inputs.batch)
    gradients = base.Gradients(
      grads,
      label_factors / size,
      losses,
      linearized.aux,
      metrics,
      fault=state.fault,
      zero_slope=state.zero_slope,
    )
    return gradients, state

  return base.Method(gradients, init, needs_meta=True)


def _check_logits(logits):
  if not hasattr(logits, "shape") or logits.shape[-1] < 2:
    raise base.InputError(
      "warpi needs one logit per class and no other outputs: use a classifier with as"
      " many outputs as there are classes, not a single logit."
    )
