"""A Slurm of one node in a temporary folder: munge, controller and node daemon, for a test of batch scripts."""

import contextlib
import os
import secrets
import socket
import subprocess
import time

MEMORY_MEGABYTES = 500


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(holds, seconds, what):
    """Wait until holds() is true."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"{what}: not within {seconds} seconds"
        time.sleep(0.2)


class Slurm:
    """The commands of a user."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment

    def ask(self, *words, **extra):
        """Run a command; return what it prints."""
        environment = {**self.environment, **extra}
        done = subprocess.run(
            words, env=environment, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sbatch(self, script, environment):
        """Submit a script; return the job's number."""
        path = self.folder / "job.sh"
        path.write_text(script)
        return self.ask("sbatch", "--parsable", str(path), **environment)

    def wait_until_job(self, number, word):
        """Wait until Slurm says a word of a job."""
        wait_until(lambda: word in self.ask("scontrol", "show", "job", number), 240, word)


@contextlib.contextmanager
def single_node(folder):
    """Start the daemons; yield a `Slurm`."""
    host = socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    sock = folder / "munge" / "socket"
    # A GPU whose device is /dev/null: Slurm counts it, and nothing uses it.
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n")
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={sock}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
GresTypes=gpu
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 RealMemory={MEMORY_MEGABYTES} Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []

    def start(name, *words):
        log = open(folder / f"{name}.log", "w")
        process = subprocess.Popen([*words], env=environment, stdout=log, stderr=log, cwd=folder)
        daemons.append(process)
        log.close()

    def ask(*words):
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    try:
        start(
            "munged",
            *("munged", "--foreground", "--force", "--key-file", str(key), "--socket", str(sock)),
            *(
                "--pid-file",
                str(folder / "munge" / "pid"),
                "--seed-file",
                str(folder / "munge" / "seed"),
            ),
        )
        wait_until(sock.exists, 120, "munge")
        start("slurmctld", "slurmctld", "-D")
        start("slurmd", "slurmd", "-D", "-N", host)
        wait_until(
            lambda: "idle" in ask("sinfo", "-h", "-o", "%T").stdout, 240, "a node that is idle"
        )

        yield Slurm(folder, environment)
    except AssertionError:
        for log in sorted(folder.glob("*.log")):
            print(log, log.read_text()[-2000:], sep="\n")
        raise
    finally:
        for process in reversed(daemons):
            process.terminate()
        for process in daemons:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:  # it waits for the job, which may wait for its turn
                process.kill()
                process.wait()
