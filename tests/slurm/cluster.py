"""A real Slurm cluster on one machine: Debian's own daemons, several nodes, nothing left behind.

    <folder>/etc      slurm.conf, gres.conf, hosts, munge.key      <folder>/run    sockets
    <folder>/bin      sacct, made from squeue                      <folder>/log    one file a daemon
    <folder>/state    the controller's                             <folder>/spool  one folder a node

Each slurmd lives in its own UTS, mount and PID namespace: it has its own hostname and hosts file, and whatever runs on
the node dies with it. Every daemon is a child of this process and the kernel kills it when this process ends, however
that ends. Ports lie below the ephemeral range, munge has a socket of its own, and a Slurm already on the machine is
neither seen nor disturbed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

INSTALL = "apt-get install -y slurmctld slurmd slurm-client munge"
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "unshare", "setpriv")
SBIN = "/usr/sbin:/sbin"  # where Debian puts the daemons; not everyone's PATH has it
CLIENT_SECONDS = 20  # a Slurm command that has not answered by then never will: the controller is gone

CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job starts again only when its old credential has expired, after two minutes by default
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=3
SlurmdTimeout=5
InactiveLimit=0
MinJobAge=300
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=INFINITE PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL Default=NO PriorityTier=1 MaxTime=INFINITE PreemptMode=REQUEUE GraceTime=15 State=UP
"""

# submitit reads job states from sacct alone, and sacct needs a database. The controller remembers jobs long enough.
SACCT = """\
#!/bin/sh
ids= header='JobID|State|NodeList'
while [ $# -gt 0 ]; do
  case $1 in -j|--jobs) shift; ids="$ids${ids:+,}$1";; --noheader) header=;; esac
  shift
done
[ -z "$header" ] || echo "$header"
squeue --noheader --states=all --format='%i|%T|%N' ${ids:+--jobs="$ids"} 2>/dev/null
exit 0
"""


def why_not() -> str | None:
    """What keeps a cluster from being started here, in one sentence; None if nothing does."""
    if os.geteuid() != 0:
        return f"a Slurm of the tests' own needs root; run the tests as root after {INSTALL}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"{', '.join(missing)} not found; install Slurm with {INSTALL}" if missing else None


class SlurmCluster:
    """A cluster that is up from ``up()`` to ``down()``, or inside ``with``.

    ``env`` is the environment in which Slurm's commands, and submitit, talk to it.
    """

    def __init__(self, nodes: int = 4) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.env = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "etc/slurm.conf"),
            "PATH": f"{self.folder / 'bin'}:{_path()}",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, seconds: float = 30) -> None:
        """Start everything and wait until every node is idle."""
        self._write_files()
        run = self.folder / "run"
        self._start(
            "munged",
            *("munged", "--foreground", f"--socket={run}/munge.socket", f"--key-file={self.folder}/etc/munge.key"),
            *(f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed", "--num-threads=2"),
        )
        self._until(lambda: (run / "munge.socket").exists(), "munged opens its socket", seconds)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.node_up(node)
        self._until(lambda: set(self.node_states().values()) == {"idle"}, "every node is idle", seconds)

    def down(self) -> None:
        """Stop everything, nodes first, and remove the folder."""
        for name in sorted(self._daemons, key=lambda name: name not in self.nodes):
            self._stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def node_up(self, node: str) -> None:
        """Start a node's slurmd, in namespaces of its own."""
        script = f"hostname {node} && mount --bind {self.folder}/etc/hosts /etc/hosts && exec slurmd -D -N {node}"
        isolated = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._start(node, *isolated, "sh", "-c", script)

    def node_down(self, node: str) -> None:
        """Lose a node at once, with all that runs on it, as if its power failed and a health check saw it.

        The controller alone would take half a minute to miss it.
        """
        self._stop(node)
        self.client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def controller_down(self) -> None:
        """Take the controller away; jobs run on, and nothing can be asked."""
        self._stop("slurmctld")

    def controller_up(self, seconds: float = 30) -> None:
        """Bring it back, with every job it knew."""
        self._start("slurmctld", "slurmctld", "-D")
        self._until(lambda: self.client("squeue", "--noheader", "--states=all"), "the controller answers", seconds)

    def node_states(self) -> Mapping[str, str]:
        """State of each node as Slurm has it: idle, allocated, down, …"""
        lines = self.client("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
        return {node: state for node, _, state in (line.partition(" ") for line in lines)}

    def client(self, *command: str) -> str:
        """Output of a Slurm command; empty when it fails, which it does while the controller starts."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=CLIENT_SECONDS)
        return done.stdout.strip() if done.returncode == 0 else ""

    def squeue(self, job: str | None = None) -> Mapping[str, str]:
        """State of every job the controller remembers, or of one: {"7": "RUNNING"}."""
        one = (f"--jobs={job}",) if job else ()
        lines = self.client("squeue", "--noheader", "--states=all", "--format=%i %T", *one).splitlines()
        return {number: state for number, _, state in (line.partition(" ") for line in lines)}

    def wait(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of ``states`` and say which; AssertionError after so many seconds."""
        self._until(lambda: self.squeue(job).get(job) in states, f"job {job} is {' or '.join(states)}", seconds)
        return self.squeue(job)[job]

    def cancel_all(self, seconds: float = 30) -> None:
        """End every job and wait until the nodes are free, so that the next test finds them so."""
        self.client("scancel", "--quiet", "--user=root")
        self._until(lambda: not self.client("squeue", "--noheader"), "no job is left", seconds)

    def processes(self) -> list[int]:
        """Process ids of the daemons that are alive."""
        return [daemon.pid for daemon in self._daemons.values() if daemon.poll() is None]

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "spool", "bin"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munged wants its socket within everyone's reach
        port, *node_ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        places = {node: f"127.0.1.{i + 1}" for i, node in enumerate(self.nodes)}
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr={places[node]} Port={node_port}"
            for node, node_port in zip(self.nodes, node_ports, strict=True)
        ]
        conf = CONF.format(host=host, port=port, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "etc/slurm.conf").write_text(conf)
        # Slurm counts a node's devices by their files, and opens none of them.
        gpus = "".join(f"NodeName={','.join(self.nodes)} Name=gpu File={file}\n" for file in ("/dev/null", "/dev/zero"))
        (self.folder / "etc/gres.conf").write_text(gpus)
        (self.folder / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # read, never loaded
        hosts = [f"127.0.0.1 localhost {host}", *(f"{address} {node}" for node, address in places.items())]
        (self.folder / "etc/hosts").write_text("\n".join(hosts) + "\n")
        key = self.folder / "etc/munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        sacct = self.folder / "bin/sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *command),
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is pytest's; it stops these in order
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        # A node is killed outright: unshare forwards no signal, and its death takes the whole node along.
        daemon.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        try:
            daemon.wait(timeout=5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(timeout=5)

    def _until(self, true: Callable[[], object], what: str, seconds: float) -> None:
        end, pause = time.monotonic() + seconds, 0.1
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self._diagnosis()}")
            time.sleep(pause)
            pause = min(0.5, 1.2 * pause)  # each question to Slurm is a process

    def _diagnosis(self) -> str:
        ends = [
            f"{log.name}: {' | '.join(log.read_text(errors='replace').splitlines()[-3:])}"
            for log in sorted((self.folder / "log").glob("*.log"))
        ]
        return "\n".join([str(dict(self.squeue())), str(dict(self.node_states())), *ends])


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"


def _free_ports(count: int) -> list[int]:
    """A run of free ports below the ephemeral range, where no outgoing connection can take one first."""
    start = 10000 + os.getpid() * 8 % 9000
    for base in [*range(start, 19900, count), *range(10000, start, count)]:
        ports = list(range(base, base + count))
        if all(_is_free(port) for port in ports):
            return ports
    raise AssertionError("no free ports between 10000 and 20000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
