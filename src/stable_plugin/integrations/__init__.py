"""StABlE training inside trainers: Lightning, fairchem, and recipes."""
