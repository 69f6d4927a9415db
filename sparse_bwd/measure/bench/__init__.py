"""`sparse-bwd bench`: what a budget buys in time and memory on a model and a machine, beside the alternatives.

asked.py       what is asked, checked before any work, and its cases
strategies.py  the strategies by name; dense.py, ours.py, partial.py, adapters.py make a step of each
correct.py     gradients of a case beside those of dense PyTorch, before anything is timed
one.py         measures one case; processes.py gives each a process of its own
report.py      the table, CSV and JSON; figures.py and page.py the HTML page
"""
