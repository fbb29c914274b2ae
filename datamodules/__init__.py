"""What is seen: data sets, their latent caches and the order of training."""
