"""From a run file to a job: checks, a snapshot of the code, submission through submitit, and what happens afterwards.

    submit.py        the command              flags.py        sbatch's and srun's flags in one
    cluster.py       a site's profile (YAML)
    allocation.py    a run and its machines   checks.py       everything checked beforehand
    planned.py       whether it fits, how long it takes      slurm_time.py   times as Slurm writes them
    submission.py    one at a time a run      snapshot.py     the code a job will run
    batch.py         the batch script         slurm.py        Slurm's commands
    supervisor.py    starts tasks and acts    local.py        the same on this machine
    standby.py       waits for its end        takeover.py     and acts where it was killed
    job.py           what every task does     environment.py  addresses, ports, a node's faults
    policy.py        what follows when tasks end, one pure function
    diagnosis.py     which rank failed first  symptoms.py     and of what
    attempts.py      what a job leaves about itself           why.py    in one sentence      cost.py    in GPU-hours
    registry.py      runs submitted from here                 follow.py a log as it grows
    jobs.py          looks after submitted runs               asking.py a question that Slurm may not answer
    chain.py         runs that follow one another             commands.py what else can follow: evaluate, export
    elastic.py       jobs that can do with fewer nodes
    doctor.py        examines nodes; made of health/
    stopwatch.py     where the seconds of a submission go

Nothing here knows a tensor: torch is imported by the job, never by the command that submits it.
"""
