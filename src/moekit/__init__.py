"""Fine-grained Mixture-of-Experts language models: plan, train, look inside, adapt, compress and run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit.checkpoint.load import load, load_tokenizer
    from moekit.checkpoint.save import save
    from moekit.config.errors import InputError
    from moekit.config.model import ModelConfig
    from moekit.config.moe import MoEConfig, split
    from moekit.config.run import RunConfig
    from moekit.generation.generate import generate
    from moekit.model.transformer import Output, Transformer
    from moekit.moe.layer import MoE
    from moekit.moe.routing import Routing

__version__ = "0.1.0"

_PLACES = {
    "InputError": "moekit.config.errors",
    "MoE": "moekit.moe.layer",
    "MoEConfig": "moekit.config.moe",
    "ModelConfig": "moekit.config.model",
    "Output": "moekit.model.transformer",
    "Routing": "moekit.moe.routing",
    "RunConfig": "moekit.config.run",
    "Transformer": "moekit.model.transformer",
    "generate": "moekit.generation.generate",
    "load": "moekit.checkpoint.load",
    "load_tokenizer": "moekit.checkpoint.load",
    "save": "moekit.checkpoint.save",
    "split": "moekit.config.moe",
}

__all__ = [
    "InputError",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "Output",
    "Routing",
    "RunConfig",
    "Transformer",
    "generate",
    "load",
    "load_tokenizer",
    "save",
    "split",
]


def __getattr__(name: str) -> Any:
    # torch takes more than a second to import; a name pays for it when it is used.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'moekit' has no attribute {name!r}")
