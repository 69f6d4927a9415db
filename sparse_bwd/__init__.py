"""Train the channels that a budget pays for, and make the rest of backward free: no work, no memory, no state."""

from sparse_bwd import memory
from sparse_bwd.convert import Report, convert, restore
from sparse_bwd.nn import (
    BatchNorm2d,
    Chain,
    Dropout,
    Hardtanh,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    ReLU6,
    SparseConv2d,
    SparseLinear,
    layers,
    norms,
    trainable_parameters,
)
from sparse_bwd.selection import (
    Budget,
    Channels,
    FrozenPolicy,
    FullPolicy,
    GradientNormPolicy,
    NEqPolicy,
    RandomPolicy,
    Selection,
    SparseUpdatePolicy,
    TraDyPolicy,
    VelocityPolicy,
    WeightNormPolicy,
)
from sparse_bwd.selection.apply import apply
from sparse_bwd.sharing import Trained, load_trained, merge_trained, save_trained
from sparse_bwd.version import __version__

__all__ = [
    "BatchNorm2d",
    "Budget",
    "Chain",
    "Channels",
    "Dropout",
    "FrozenPolicy",
    "FullPolicy",
    "GradientNormPolicy",
    "Hardtanh",
    "LeakyReLU",
    "MaxPool2d",
    "NEqPolicy",
    "RandomPolicy",
    "ReLU",
    "ReLU6",
    "Report",
    "Selection",
    "SparseConv2d",
    "SparseLinear",
    "SparseUpdatePolicy",
    "TraDyPolicy",
    "Trained",
    "VelocityPolicy",
    "WeightNormPolicy",
    "__version__",
    "apply",
    "convert",
    "layers",
    "load_trained",
    "memory",
    "merge_trained",
    "norms",
    "restore",
    "save_trained",
    "trainable_parameters",
]
