"""The fwd protocol: messages, frames, and the public clients."""
