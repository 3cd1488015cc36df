"""The StABlE method: schedule, Boltzmann estimator, reweighting, training loop."""
