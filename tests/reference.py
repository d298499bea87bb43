"""The masked form of the mixture of experts: all patches computed, unselected ones set to zero.

Written straight from the description of the network, as a reference for the gathered form.
"""

import jax
import jax.numpy as jnp


def _norm(x, params, epsilon=1e-3):
    """Batch norm over all axes but the last, by the batch's statistics."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    return (x - mean) / jnp.sqrt(var + epsilon) * params["scale"] + params["bias"]


def masked_head(params, features, patches_per_expert):
    """Training-mode logits [B, classes] from features [B, H, W, C]; parameters as in the model."""
    batch, channels = features.shape[0], features.shape[-1]
    patches = features.reshape(batch, -1, channels)
    outputs = []
    for expert in range(params["routers"]["kernel"].shape[0]):
        own = jax.tree.map(lambda leaf, e=expert: leaf[e], params["experts"])
        scores = patches @ params["routers"]["kernel"][expert]
        kept = jax.lax.top_k(scores, patches_per_expert)[1]
        mask = jax.nn.one_hot(kept, patches.shape[1]).sum(1)
        x = patches * (jax.nn.softmax(scores) * mask)[..., None]
        for suffix in ("", "2"):
            if f"norm{suffix}" in own:
                x = jax.nn.relu(_norm(x, own[f"norm{suffix}"]))
                x = x @ own[f"conv{suffix}"]["kernel"] + own[f"conv{suffix}"]["bias"]
        outputs.append(x)
    x = jnp.concatenate(outputs, -1)
    head = {name: leaf.reshape(-1) for name, leaf in params["head_norm"].items()}
    pooled = jax.nn.relu(_norm(x, head)).mean(1)
    return pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
