"""Speed beside well-known peers, as ratios of one run."""
