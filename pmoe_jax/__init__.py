"""pmoe_jax: backdoor attacks against patch-based mixtures of experts, in JAX.

The package itself imports nothing heavy: import what you need from it, for example
`pmoe_jax.triggers` or `pmoe_jax.models`.
"""

from importlib import metadata

try:
    __version__ = metadata.version("pmoe_jax")
except metadata.PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.1.0"
