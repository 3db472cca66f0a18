"""Self-attention through JAX's own function, which has a fused kernel for GPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

ATTENTIONS = ("auto", "xla")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto") -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of each head; the softmax is float32.

    Args:
        q, k, v: `[R, T, heads, d]`.
        implementation: `auto` takes cuDNN's flash attention where the device and the shapes allow
            it, which stores no `[T, T]` matrix; `xla`: never.

    Returns:
        `[R, T, heads, d]`, in the dtype of `v`.
    """
    fused = implementation == "auto" and jax.default_backend() == "gpu"
    fused = fused and _cudnn_takes(q.shape, q.dtype)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")


def weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """Attention of the queries `[R, S, heads, d]` to the keys: `[R, heads, S, T]` float32."""
    logits = jnp.einsum("rshd,rthd->rhst", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits / q.shape[-1] ** 0.5)


@functools.cache
def _cudnn_takes(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether JAX accepts these shapes for cuDNN, forward and backward; tracing tells."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").sum()

    x = jax.ShapeDtypeStruct(shape, dtype)
    try:
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), x, x, x)
    except (RuntimeError, ValueError, NotImplementedError):  # such as without cuDNN, or in float32
        return False
    return True
