"""What to train: selections, budgets and the policies that choose."""

from sparse_bwd.selection.apply import apply
from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.costs import CostTable, cost_table
from sparse_bwd.selection.neq import NEqPolicy
from sparse_bwd.selection.policies import (
    FrozenPolicy,
    FullPolicy,
    RandomPolicy,
    SparseUpdatePolicy,
    VelocityPolicy,
)
from sparse_bwd.selection.policy import BudgetPolicy, Policy, PolicyReport
from sparse_bwd.selection.probe import noise_images
from sparse_bwd.selection.ranked import GradientNormPolicy, RankedPolicy, WeightNormPolicy
from sparse_bwd.selection.schemes import SCHEMES, Scheme
from sparse_bwd.selection.selection import Channels, Selection, Summary
from sparse_bwd.selection.trady import TraDyPolicy

__all__ = [
    "SCHEMES",
    "Budget",
    "BudgetPolicy",
    "Channels",
    "CostTable",
    "FrozenPolicy",
    "FullPolicy",
    "GradientNormPolicy",
    "NEqPolicy",
    "Policy",
    "PolicyReport",
    "RandomPolicy",
    "RankedPolicy",
    "Scheme",
    "Selection",
    "SparseUpdatePolicy",
    "Summary",
    "TraDyPolicy",
    "VelocityPolicy",
    "WeightNormPolicy",
    "apply",
    "cost_table",
    "noise_images",
]
