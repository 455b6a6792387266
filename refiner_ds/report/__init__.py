"""What the runs of tables have shown, beside the paper's values: one HTML file and Markdown, from run folders alone.

runs.py        what one run folder tells                  statistics.py   means over seeds, intervals, verdicts
contents.py    the parts of the page                      curves.py       learning curves as SVG
"""
