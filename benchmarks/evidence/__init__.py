"""What the repair does to failures, errors and observables: systems × architectures × seeds, run in pieces that are kept."""
