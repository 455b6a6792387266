"""What launch/doctor.py is made of, and its short form at a job's start.

    node.py     what one task measures of its machine         findings.py   from measurements to sentences (pure)
    shared.py   what all tasks find out together              gather.py     starts the tasks, here or on Slurm
    probe.py    what each task runs: the two above            limits.py     how much is enough
    start.py    the short form

A task prints what it has measured as lines of JSON; nothing depends on the folder that is being examined.
"""
