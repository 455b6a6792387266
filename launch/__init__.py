"""From a run file to a job: checks, a snapshot of the code, submission through submitit, and what runs on a task.

    submit.py    the command                     job.py       what every task of a job runs
    cluster.py   a site's profile (YAML)         slurm.py     what is asked of Slurm, and told by it
    checks.py    everything checked beforehand   local.py     the same job on this machine
    snapshot.py  the code a job will run         follow.py    a job's log, as it grows
    allocation.py  a run and the machines it gets

Nothing here knows a tensor: torch is imported by the job, never by the command that submits it.
"""
