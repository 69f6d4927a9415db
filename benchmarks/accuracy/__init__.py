"""The accuracy of every policy at the same true budget, with memory and time beside it: a grid of fine-tuning runs.

plan.py          what is to be run: a JSON file -> runs in the order of their value
one.py           one run, resumable                      grid.py     many, by several processes; progress; shards
tuning.py        the learning rate of every policy       records.py  runs.jsonl: one line per finished run
significance.py  intervals and tests                     report.py   the page; tables.py and figures.py its parts
choosing.py      seconds and bytes that choosing costs
maps.py          where channels were selected, what selections share (chosen.py), what the channels respond to
                 (responding.py); maps_page.py and maps_figures.py its parts
importance.py    does velocity say which channels lower the loss (parts.py); importance_statistics.py, ..._report.py
states.py        runs of a plan made again, to look into their states
"""
