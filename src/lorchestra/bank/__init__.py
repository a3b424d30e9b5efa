"""K adapters mounted on one model, one coefficient row per sequence."""

from lorchestra.bank.layer import TrainableMember
from lorchestra.bank.mount import Bank, adapter_free, linear_shape

__all__ = ["Bank", "TrainableMember", "adapter_free", "linear_shape"]
