"""A real Slurm on one machine, for tests: munge, controller and one node daemon on loopback, without systemd.

    python tests/slurm/cluster.py start FOLDER      start it, with its files in FOLDER
    python tests/slurm/cluster.py stop FOLDER       stop exactly what was started there

Needs root and Debian's slurm-wlm and munge. The configuration is written to /etc/slurm, where Slurm looks for
it: the jobs' inner `srun` is started without SLURM_CONF. A configuration that is not ours is left alone.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CONFIGURATION = Path("/etc/slurm")
MARK = "# Made by tests/slurm/cluster.py of fedlm-bench"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
CONTROLLER_PORT = 16817
DAEMONS = ("munged", "slurmctld", "slurmd")

# MinJobAge: without accounting squeue must still know the state of a job that has ended.
# cred_expire: a job that is queued again waits so long before it starts.
SLURM_CONF = """{mark}
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort=16818
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=200000,sched_interval=5,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MinJobAge=86400
KillWait=5
OverTimeLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
SlurmdParameters=config_overrides
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""
# A GPU in name only. Without a device file the node would report none and be drained.
GRES_CONF = "{mark}\nNodeName={host} Name=gpu File=/dev/null\n"
CGROUP_CONF = "{mark}\nCgroupPlugin=autodetect\n"


def missing() -> str:
    """Return why a Slurm cannot be started here, or nothing."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    existing = CONFIGURATION / "slurm.conf"
    if existing.exists() and not existing.read_text().startswith(MARK):
        return f"{existing} is of another cluster"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", CONTROLLER_PORT)) == 0:
            return f"port {CONTROLLER_PORT} is taken (a test cluster is running?)"
    return ""


def run(*command: str, timeout: float = 60) -> str:
    """Run a command of Slurm and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_for(what: str, condition, seconds: float = 60, pause: float = 0.25):
    """Return the first true value of `condition()`; raise TimeoutError naming `what` when there is none."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(pause)


class Cluster:
    """One controller and one node, with their state in `folder`, which begins empty at each start."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.host = os.uname().nodename.partition(".")[0]

    def start(self, cpus: int = 8) -> None:
        """Start the daemons and wait until the node takes jobs. `cpus` may be more than there are."""
        self.stop()
        # What an earlier run left would keep a node drained.
        for name in ("run", "log", "state", "spool", "munge"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self.folder.chmod(0o755)
        self._configure(cpus)
        self._start_munge()
        run("slurmctld")
        self.start_node()

    def _configure(self, cpus: int) -> None:
        memory = int(re.search(r"RealMemory=(\d+)", run("slurmd", "-C")).group(1)) * 9 // 10
        values = {
            "port": CONTROLLER_PORT,
            "mark": MARK,
            "host": self.host,
            "folder": self.folder,
            "cpus": cpus,
            "memory": memory,
        }
        CONFIGURATION.mkdir(exist_ok=True)
        for name, text in (("slurm", SLURM_CONF), ("gres", GRES_CONF), ("cgroup", CGROUP_CONF)):
            (CONFIGURATION / f"{name}.conf").write_text(text.format(**values))

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "munge.key"
        key.parent.chmod(0o700)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        options = {
            "key-file": key,
            "seed-file": key.with_name("munged.seed"),
            "socket": self.folder / "run" / "munge.socket",
            "pid-file": self.folder / "run" / "munged.pid",
            "log-file": self.folder / "log" / "munged.log",
        }
        # --force: the folder may lie below the world-writable /tmp.
        run("munged", "--force", *(f"--{name}={value}" for name, value in options.items()))

    def start_node(self) -> None:
        """Start the node daemon and wait until the node takes jobs."""
        run("slurmd", "-N", self.host)
        wait_for("an idle node", lambda: self.node_state() in ("idle", "mixed", "allocated"))

    def kill_node(self) -> None:
        """Kill the node daemon as a crash would, and wait until the controller takes the node for down."""
        os.kill(self._pid("slurmd"), signal.SIGKILL)
        wait_for("a node that is down", lambda: self.node_state() == "down", 90)

    def node_state(self) -> str:
        """Return the node's state in one word, without the mark of a node that does not answer."""
        try:
            return run("sinfo", "--noheader", "--format=%T").strip().rstrip("*")
        except (RuntimeError, subprocess.TimeoutExpired):
            return "unknown"

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Return state and comment of each job that squeue shows, by its number."""
        lines = run("squeue", "--states=all", "--noheader", "--format=%A|%T|%k").splitlines()
        return {number: (state, comment) for number, state, comment in (line.split("|", 2) for line in lines)}

    def _pid(self, daemon: str) -> int | None:
        """Return the process number of a daemon that was started here and still runs."""
        try:
            number = int((self.folder / "run" / f"{daemon}.pid").read_text())
            return number if Path(f"/proc/{number}/comm").read_text().strip() == daemon else None
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        """End what was started here and remove its configuration, and nothing else."""
        for daemon in reversed(DAEMONS):
            number = self._pid(daemon)
            if number is not None:
                os.kill(number, signal.SIGTERM)
                wait_for(f"the end of {daemon}", lambda daemon=daemon: self._pid(daemon) is None, 30, 0.05)
        for path in CONFIGURATION.glob("*.conf"):
            if path.read_text().startswith(MARK):
                path.unlink()


def main() -> int:
    """Start or stop a Slurm from the command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    cluster = Cluster(Path(sys.argv[2]))
    if sys.argv[1] == "stop":
        cluster.stop()
        return 0
    reason = missing()
    if reason:
        print(f"Slurm cannot be started: {reason}", file=sys.stderr)
        return 2
    cluster.start()
    print(run("sinfo", "--long"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
