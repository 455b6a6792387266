"""What a run takes before it is started: ``python -m refiner_ds.plan``; see planning.py.

planning.py     the plan as one JSON object
trace.py        a micro-batch on fake tensors
checking.py     the plan with what a run file comes to, for ``train.py --check`` and ``launch/submit.py``
tables.py       the plans of a table's runs, and their sum
"""
