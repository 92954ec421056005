"""`gyre report`: one HTML file of a run, a search, an evaluation or a comparison, from what each has written.

`evidence` reads a run's files, `run` makes its page; `scores` makes those of evaluations and comparisons. A search
makes its own (`cluster/search/report.py`). All stand on `evaluation/page.py` and its charts; no model is asked again.
"""
