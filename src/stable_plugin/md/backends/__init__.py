"""Ways to execute the steps of a simulation: eager, compiled, CUDA graphs."""
