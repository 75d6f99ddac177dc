"""Drafters in plain torch, whole sequences at a time, from what papers and layouts say: what `fwd` is compared with."""

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(x, positions, theta):
    """x [rows, heads, dim], half pairing."""
    dim = x.shape[-1]
    angles = positions[:, None].double() * theta ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    low, high = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Block:
    """A block of a dense model by its tensors."""

    def __init__(self, tensors, prefix, sizes):
        self._tensors, self._prefix, self.sizes = tensors, prefix, sizes

    def tensor(self, name):
        return self._tensors[self._prefix + name]

    def linear(self, name, x):
        return F.linear(x, self.tensor(f"{name}.weight"), self._tensors.get(f"{self._prefix}{name}.bias"))

    def heads(self, name, x, positions=None):
        """Projected, and where there are positions normed and rotated: [rows, heads, dim]."""
        sizes = self.sizes
        found = self.linear(f"self_attn.{name}_proj", x).view(len(x), -1, sizes.head_dim)
        if positions is None:
            return found
        if sizes.qk_norm:
            found = rms(found, self.tensor(f"self_attn.{name}_norm.weight"), sizes.eps)
        return rotated(found, positions, sizes.theta)

    def attended(self, q, keys, values, seen, sinks=None):
        """softmax(q·k)·v where `seen` [queries, keys]; q [queries, heads, dim]."""
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, len(q), 1)), dim=-1)
        weights = scores.softmax(-1)[..., : len(keys)]
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)

    def mlp(self, hidden):
        x = rms(hidden, self.tensor("post_attention_layernorm.weight"), self.sizes.eps)
        return hidden + self.linear(
            "mlp.down_proj", F.silu(self.linear("mlp.gate_proj", x)) * self.linear("mlp.up_proj", x)
        )

    def run(self, x, residual, window=0):
        """A causal block over all rows, whose attention takes x."""
        positions = torch.arange(len(x))
        age = positions[:, None] - positions
        seen = (age >= 0) & (age < window) if window else age >= 0
        q, keys, values = self.heads("q", x, positions), self.heads("k", x, positions), self.heads("v", x)
        return self.mlp(residual + self.linear("self_attn.o_proj", self.attended(q, keys, values, seen)))

    def normed(self, hidden):
        return rms(hidden, self.tensor("input_layernorm.weight"), self.sizes.eps)


class Eagle:
    """EAGLE-3 with its flags."""

    def __init__(self, tensors, sizes, embedding, head, *, first="midlayer.", windows=None, **flags):
        self._tensors, self.sizes, self._flags = tensors, sizes, flags
        self._embedding = tensors.get("embed_tokens.weight", embedding)
        self._head = tensors.get("lm_head.weight", head)
        self._blocks = [Block(tensors, f"layers.{i}." if i else first, sizes) for i in range(sizes.layers)]
        self._windows = windows or [0] * sizes.layers
        self._first = first

    def fused(self, features):
        eps = self.sizes.eps
        if self._flags.get("norm_before_fc"):
            features = rms(features, self._tensors["input_norm.weight"], eps)
        if self._flags.get("fc_norm"):
            weights = [tensor for name, tensor in sorted(self._tensors.items()) if name.startswith("fc_norm.")]
            parts = features.chunk(len(weights), dim=-1)
            features = torch.cat([rms(x, weight, eps) for x, weight in zip(parts, weights, strict=True)], dim=-1)
        return features @ self._tensors["fc.weight"].T

    def hidden(self, ids, fused):
        """What the layers make of ids and what stands beside each."""
        first, *others = self._blocks
        beside = rms(fused, self._tensors[f"{self._first}hidden_norm.weight"], self.sizes.eps)
        x = torch.cat((first.normed(self._embedding[ids]), beside), dim=-1)
        residual = beside if self._flags.get("norm_before_residual") else fused
        hidden = first.run(x, residual, self._windows[0])
        for block, window in zip(others, self._windows[1:], strict=True):
            hidden = block.run(block.normed(hidden), hidden, window)
        return hidden

    def fed(self, hidden):
        return self._normed(hidden) if self._flags.get("norm_output") else hidden

    def logits(self, hidden):
        return self._normed(hidden) @ self._head.T

    def _normed(self, hidden):
        return rms(hidden, self._tensors["norm.weight"], self.sizes.eps)


class DFlash:
    """Keys and values of the context from features, a block of an anchor and masks that sees it and itself."""

    def __init__(self, tensors, sizes, embedding, head, *, causal, windows=None, block=8, sinks=False):
        self._tensors, self.sizes, self._embedding, self._head = tensors, sizes, embedding, head
        self._causal, self._windows, self._block, self._sinks = causal, windows or [0] * sizes.layers, block, sinks

    def logits(self, ids, features):
        """Logits of a block's rows behind as many positions as there are features."""
        known, eps = len(features), self.sizes.eps
        context = rms(features @ self._tensors["fc.weight"].T, self._tensors["hidden_norm.weight"], eps)
        places, hidden = torch.arange(known, known + len(ids)), self._embedding[ids]
        for index in range(self.sizes.layers):
            block = Block(self._tensors, f"layers.{index}.", self.sizes)
            x, before = block.normed(hidden), torch.arange(known)
            keys = torch.cat((block.heads("k", context, before), block.heads("k", x, places)))
            values = torch.cat((block.heads("v", context), block.heads("v", x)))
            sinks = block.tensor("self_attn.attention_sink_bias") if self._sinks else None
            mixed = block.attended(block.heads("q", x, places), keys, values, self._seen(index, known, len(ids)), sinks)
            hidden = block.mlp(hidden + block.linear("self_attn.o_proj", mixed))
        return rms(hidden, self._tensors["norm.weight"], eps) @ self._head.T

    def _seen(self, layer, known, count):
        """Which of all positions each row sees."""
        rows, keys, window = torch.arange(known, known + count), torch.arange(known + count), self._windows[layer]
        seen = keys <= (rows[:, None] if self._causal[layer] else known + count - 1)
        if window and self._causal[layer]:
            return seen & (keys > rows[:, None] - window)
        return seen & (keys > known + count - 1 - (window + self._block - 1)) if window else seen
