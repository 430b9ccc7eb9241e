"""Tendon: from a mix of robot datasets to a vision-language-action policy that acts."""

__version__ = "0.1.0"
