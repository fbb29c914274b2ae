"""What is learned and how it is sampled: backbones, processes, samplers, autoencoders; torch and Lightning only."""
