"""What EBFT is compared with, on TRL's own trainers: SFT, and RLVR with verifiable rewards. Run by `ebft train`."""

from .rlvr import rlvr_trainer
from .sft import sft_trainer

__all__ = ["rlvr_trainer", "sft_trainer"]
