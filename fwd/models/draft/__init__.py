"""Draft models: what foresees the target's ids, in the layouts that checkpoints have."""
