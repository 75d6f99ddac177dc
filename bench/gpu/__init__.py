"""What the benches for a GPU share; `bench/gpu.sh` runs them all."""
