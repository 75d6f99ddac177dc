"""Model families: config.json → ModelSpec, checkpoint → weights, forward passes written in the ops."""
