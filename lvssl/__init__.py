"""Latent-variable contrastive learning of image encoders."""

__version__ = "0.1.0"
