"""IsoDiff: diffusion backbones compared at equal compute."""

__version__ = "0.1.0"
