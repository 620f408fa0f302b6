"""WarPI: sampled vectors rectify the logits of suspect labels (Sun et al., 2022).

An amortised network reads an example's logits z and its (possibly wrong) label and
tells the mean and log-variance of a vector in (0, 1)^C that multiplies the logits
before the softmax. With S draws, e ~ N(0, 1):

    v = sigmoid(mean + exp(log_variance / 2) e)
    l_rect(z, v, y) = -log softmax(v * z)_y, averaged over the draws

    virtual step   p' = p - a grad_p mean l_rect           v moves with phi
    meta step      phi by Adam on grad_phi of the clean loss at p', not rectified
    real step      p on grad_p mean l_rect, fresh draws, new phi, v constant

The network's inputs are held constant. v = 1 is cross-entropy, v = c a temperature
1 / c, v -> 0 takes the example's gradient away. At test time there is no v. There
is no prior and no KL term, as in the released code.

From the released code: hyperbolic tangents, hidden width 100, Xavier-normal kernels
(the log-variance layer keeps the framework's uniform default), a learned label
embedding of width C drawn from N(0, 1). Ours: the log-variance is clipped to
+-10, beyond which exp would overflow in training gone wrong, and where it no longer
learns; the released meta set overlaps the training set, ours never does. The
released default is 3 draws and its example 1; the default here is 3.

`Gradients.weights` are not weights here but, for each example, the mean of v at its
own label over B: roughly, the factor on the pull towards that label (the softmax
changes with v too). It is no verdict of the method on the label.

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
  """(logits, label) to the distribution of a rectifying vector.

  Attributes:
    num_classes: C; 14,320 parameters for C = 10 and hidden = 100.
    hidden: width of both hidden layers; the released code takes 200 for 101
      classes.
    max_log_variance: the log-variance is clipped to +- this.
  """

  num_classes: int
  hidden: int = 100
  max_log_variance: float = 10.0

  @nn.compact
  def __call__(self, logits: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """Logits [B, C], labels [B] to (mean, log_variance), both [B, C]."""
    embed = nn.Embed(
      self.num_classes, self.num_classes, embedding_init=nn.initializers.normal(1.0)
    )
    with base.implicit_promotion():  # flax brings inputs and parameters to one type
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

  >>> import jax.numpy as jnp
  >>> z, y = jnp.array([[2., -1., .5]]), jnp.array([0])
  >>> print(f"{rectified_cross_entropy(z, jnp.array([[[.9, .5, .2]]]), y)[0]:.4f}")
  0.2492
  """
  losses = jax.vmap(losses_lib.softmax_cross_entropy, in_axes=(0, None))
  # The product is at least as precise as the vectors, also for half-precision logits.
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
  """Rectified losses under phi, which sees the logits as constants.

  Args:
    net: the amortised network.
    phi: its variables.
    logits: [B, C].
    labels: [B].
    noise: [S, B, C] or None.

  Returns:
    (losses [B], v [S, B, C]). Differentiable in phi through v, and in the logits
    through v * z alone.
  """
  found: Any = net.apply(phi, jax.lax.stop_gradient(logits), labels)
  mean, log_variance = found
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
    learning_rate: of the virtual step; the classifier's, number or schedule.
    num_samples: S, draws of the rectifying vector.
    deterministic: the ablation v = sigmoid(mean), without draws.
    hidden: width of the amortised network.
    optimizer: of that network; None is Adam at 3e-4, constant, as released.
    every: steps from one meta step to the next. More than 1 is not in the paper.
    noise_fn: `(key, shape, dtype) -> noise`, called once for the virtual and once
      for the real step with a shape of [B, S, C], B the global batch; for draws of
      one's choice, such as recorded or antithetic ones.

  Returns:
    A `base.Method` that needs a meta batch; its state is a `meta_network.State`.

  Raises:
    InputError: fewer than 1 draw or step, or (when traced) a binary classifier
      with a single logit.
  """
  if num_samples < 1:
    raise base.InputError(f"warpi: num_samples={num_samples} must be at least 1.")
  meta_network.check_every("warpi", every)
  meta_optimizer = optimizer or optax.adam(3e-4)

  def init(key, problem, params):
    del params
    net, logits = RectifierNet(problem.num_classes, hidden), (1, problem.num_classes)
    phi = net.init(key, jnp.zeros(logits), jnp.zeros(1, jnp.int32))
    return meta_network.init(phi, meta_optimizer)

  def gradients(state, problem, inputs):
    net = RectifierNet(problem.num_classes, hidden)
    labels = inputs.batch["label"]
    # Not the keys that dropout and augmentation draw from.
    virtual_key, real_key = jax.random.split(jax.random.fold_in(inputs.key, _NOISE_KEY))

    def logits_fn(params, batch):
      return problem.forward(params, inputs.model_state, batch, inputs.key, True)

    params = base.local(inputs.params, problem.axis_name)
    linearized = problem.linearize_outputs(
      logits_fn, params, inputs.batch, has_aux=True
    )
    logits = linearized.outputs
    _check_logits(logits)
    size = base.global_size(labels.shape[0], problem.axis_name)

    def noise(key):
      if deterministic:
        return None
      # Drawn for the global batch, so that every example has its own on any
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
    own_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=vectors.dtype)
    pull = (vectors.mean(axis=0) * own_label).sum(axis=-1)
    metrics = {
      **meta_network.metrics(state),
      "rectifier": base.pmean(vectors.mean(), problem.axis_name),
      "rectifier_of_label": base.pmean(pull.mean(), problem.axis_name),
    }
    losses = problem.loss(logits, inputs.batch)
    found = base.Gradients(
      grads,
      pull / size,
      losses,
      linearized.aux,
      metrics,
      fault=state.fault,
      zero_slope=state.zero_slope,
    )
    return found, state

  return base.Method(gradients, init, needs_meta=True)


def _check_logits(logits):
  if not hasattr(logits, "shape") or logits.shape[-1] < 2:
    raise base.InputError(
      "warpi rectifies logits against each other: give the classifier one output a"
      " class and nothing else, not a single logit."
    )
