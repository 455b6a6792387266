"""Exit codes that schedulers, launchers and scripts can act on."""

FINISHED = 0
CRASHED = 1  # Python's own, for an exception that nobody foresaw
REFUSED = 2  # one sentence said why; nothing was written
DIVERGED = 3  # the loss or a weight is not finite: running again would do the same
UNREAD = 141  # a shell's, for a process that SIGPIPE ended: nobody reads the output any more, as after `| head`
RUN_AGAIN = 75  # EX_TEMPFAIL: stopped on request and saved; the same command continues
