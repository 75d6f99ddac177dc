"""The operations a model is made of (`ops`), and what executes them (`reference` today)."""
