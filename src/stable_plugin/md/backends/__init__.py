"""Ways to run the steps of a simulation: eager, compiled, CUDA graphs."""
