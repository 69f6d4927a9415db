"""The scheme search: contribution of every layer and ratio, then evolution under a budget. Needs the extra `search`."""

from sparse_bwd.training.search.conclude import finetune_words
from sparse_bwd.training.search.points import Grid
from sparse_bwd.training.search.report import schemes_table
from sparse_bwd.training.search.run import search
from sparse_bwd.training.search.settings import SearchConfig, changed_grid, saved_search, short_run

__all__ = [
    "Grid",
    "SearchConfig",
    "changed_grid",
    "finetune_words",
    "saved_search",
    "schemes_table",
    "search",
    "short_run",
]
