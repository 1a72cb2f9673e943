"""blt_edge: Byte Latent Transformers on edge devices. The library is `blt_edge.runtime`.

Installed as `blt_edge` itself. Imports nothing: each part of the package stays as quick as it is alone.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
"""The release: pyproject.toml takes it from here."""
