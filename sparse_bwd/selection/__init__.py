"""What to train: selections, budgets and the policies that choose."""

from sparse_bwd.selection.apply import apply
from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.costs import CostTable, cost_table
from sparse_bwd.selection.policies import (
    FrozenPolicy,
    FullPolicy,
    RandomPolicy,
    SparseUpdatePolicy,
    VelocityPolicy,
)
from sparse_bwd.selection.policy import Policy, PolicyReport
from sparse_bwd.selection.schemes import SCHEMES, Scheme
from sparse_bwd.selection.selection import Channels, Selection, Summary

__all__ = [
    "SCHEMES",
    "Budget",
    "Channels",
    "CostTable",
    "FrozenPolicy",
    "FullPolicy",
    "Policy",
    "PolicyReport",
    "RandomPolicy",
    "Scheme",
    "Selection",
    "SparseUpdatePolicy",
    "Summary",
    "VelocityPolicy",
    "apply",
    "cost_table",
]
