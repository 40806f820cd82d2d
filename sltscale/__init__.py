"""sltscale: gloss-free sign language translation and sign-text retrieval at corpus scale."""

__version__ = "0.1.0"
