"""Ragged paged attention, interim."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ..kv_pages import gather_pages


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap"))
def ragged_paged_attention(
    queries, kv_pages, kv_lens, page_table, query_starts, num_seqs, *, scale, sliding_window, soft_cap, sinks
):
    T, H, D = queries.shape
    K = kv_pages.num_kv_heads
    q = queries.astype(jnp.float32).reshape(T, K, H // K, D)
    token = jnp.arange(T, dtype=jnp.int32)

    def body(i, carry):
        out, lse = carry
        kv = gather_pages(kv_pages, page_table[i])  # P 2 K page D
        kv = kv.swapaxes(0, 2).swapaxes(0, 1)  # 2 K P page D
        kv = kv.reshape(2, K, -1, D).astype(jnp.float32)
        n = kv.shape[2]
        pos = jnp.arange(n, dtype=jnp.int32)
        kv = jnp.where((pos < kv_lens[i])[None, None, :, None], kv, 0.0)
        s = jnp.einsum("tkgd,knd->tkgn", q, kv[0], precision="highest") * scale
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        qpos = kv_lens[i] - query_starts[i + 1] + token
        see = pos[None] <= qpos[:, None]
        if sliding_window is not None:
            see &= pos[None] > qpos[:, None] - sliding_window
        see &= (pos < kv_lens[i])[None]
        s = jnp.where(see[:, None, None], s, -jnp.inf)
        m = s.max(-1)
        if sinks is not None:
            sk = sinks.astype(jnp.float32).reshape(1, K, H // K)
            m = jnp.maximum(m, sk)
        m0 = jnp.where(jnp.isfinite(m), m, 0.0)
        p = jnp.exp(s - m0[..., None])
        l = p.sum(-1)
        if sinks is not None:
            l = l + jnp.exp(sk - m0)
        o = jnp.einsum("tkgn,knd->tkgd", p, kv[1], precision="highest") / jnp.where(l == 0, 1.0, l)[..., None]
        mine = (token >= query_starts[i]) & (token < query_starts[i + 1]) & (kv_lens[i] > 0)
        out = jnp.where(mine[:, None, None], o.reshape(T, H, D), out)
        lse = jnp.where(mine[:, None], (m0 + jnp.log(l)).reshape(T, H), lse)
        return out, lse

    init = jnp.zeros((T, H, D), jnp.float32), jnp.full((T, H), -jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, num_seqs[0], body, init)
