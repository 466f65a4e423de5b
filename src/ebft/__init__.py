"""Energy-Based Fine-Tuning of language models: the public names, imported on first use.

`import ebft` alone loads neither torch nor transformers, which keeps `ebft --help` fast. Method: Jelassi et al.,
"Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models", arXiv 2603.12248.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebft import advantages, rewards
    from ebft.blocks import BlockLayout
    from ebft.config import EBFTConfig
    from ebft.features import FeatureNetwork
    from ebft.logprobs import block_log_probs, document_and_block_log_probs
    from ebft.rollout import sample_blocks
    from ebft.trainer import EBFTTrainer

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "EBFTConfig",
    "EBFTTrainer",
    "FeatureNetwork",
    "advantages",
    "block_log_probs",
    "document_and_block_log_probs",
    "rewards",
    "sample_blocks",
]

# Public name -> the module that holds it.
_HOMES = {
    "BlockLayout": "ebft.blocks",
    "EBFTConfig": "ebft.config",
    "EBFTTrainer": "ebft.trainer",
    "FeatureNetwork": "ebft.features",
    "block_log_probs": "ebft.logprobs",
    "document_and_block_log_probs": "ebft.logprobs",
    "sample_blocks": "ebft.rollout",
}
_SUBMODULES = ("advantages", "rewards")


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562) and keep it."""
    if name in _SUBMODULES:
        return import_module(f"ebft.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ebft' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
