"""What to train: selections, budgets, costs, and the policies that choose under a budget."""

from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.policies import FrozenPolicy, FullPolicy, RandomPolicy, SparseUpdatePolicy, VelocityPolicy
from sparse_bwd.selection.policy import Policy
from sparse_bwd.selection.selection import Channels, Selection

__all__ = [
    "Budget", "Channels", "FrozenPolicy", "FullPolicy", "Policy", "RandomPolicy", "Selection", "SparseUpdatePolicy",
    "VelocityPolicy",
]  # fmt: skip
