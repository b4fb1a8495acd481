"""Which other programs are here, and how the others are installed."""

from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

PEERS = MappingProxyType({"transformers": ("transformers",), "llama.cpp": ("llama-cpp-python", "gguf")})
"""Name of a peer: the packages that it takes."""


def missing(peer: str) -> tuple[str, ...]:
    """The packages of `peer` that are not installed."""
    return tuple(package for package in PEERS[peer] if found_version(package) is None)


def found_version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def install_command(peer: str) -> str:
    """What installs `peer`."""
    return f"pip install {' '.join(PEERS[peer])}"
