"""Suites for pytest-benchmark, comparable across commits: `make suites`, or `python -m pytest benchmarks/suites`."""
