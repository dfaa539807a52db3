"""Close a jail around one command, then become it: the inside of `command.py` (paper 3.3).

`command.py` starts this file as `python -I -S command_jail.py STATUS FOLDER TEMPORARY SECONDS COMMAND...`. It
puts both folders in memory, the first with a copy of its files, so what is written there is gone at the end. It
enters new namespaces, in which nothing can be written but these two, no device can be opened but those
that hold nothing, there is no network and no process but its own, and /proc is empty; it forks, sets limits,
and the child becomes the command. That child is process 1 of its namespace: when it ends, or its parent dies,
all that it started dies with it.

A socket in the file system, as that of Docker's daemon, belongs to no network, and neither does one of the host of
a virtual machine. So a filter of system calls lets the command make internet sockets alone, and pairs.

Bounded are the memory and the size of files of each process, its processor time, the bytes and the number of files in each
folder, and the number of processes. Root, whom RLIMIT_NPROC does not bind, is bound by the largest process number
of the jail's namespace, which needs Linux 6.14 and a /proc/sys that may be written; a container may have none.
Otherwise root's processes are not bounded; nor are the folders, which then stay where they are, for a root without
CAP_SETFCAP, which that of a container has. The memory of all processes together is `command.py`'s to watch.

The capabilities that the namespaces bring are lost when the command starts, because its user has no name in
them; with `no_new_privs` none come back. No counterpart in the paper, which names its sandbox but does not
describe it.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import re
import resource
import shutil
import sys
import types

READY = b"+"
"""Written to the descriptor STATUS when the jail is closed; or else why it could not be."""
MEMORY = 4 * 2**30
"""Address space of each process of the command, bytes."""
FILE = 64 * 2**20
"""Size of a file that it may write, bytes."""
FOLDER = 2 * 2**30
"""Bytes of all files in each of the two folders."""
FILES = 2**18
"""Files in each of them."""
PROCESSES = 1024
"""Processes and threads of the command at a time."""
OWN_NUMBERS = (6, 14)
"""Version of Linux from which a namespace has a largest process number of its own; before, it was the machine's."""
BIND = 4096  # MS_BIND
FAMILIES = (2, 10, 16)  # AF_INET, AF_INET6, AF_NETLINK: those that a network namespace confines
SOCKET = {"x86_64": 41, "aarch64": 198}  # number of the system call, linux/unistd.h
IO_URING_SETUP = 425  # it could make sockets without the call
X32 = 0x40000000  # bit of a second set of numbers on x86_64
WRITABLE = (ctypes.c_uint64 * 4)(0, 1, 0, 0)  # struct mount_attr with attr_clr = MOUNT_ATTR_RDONLY
WITHOUT_DEVICES = (ctypes.c_uint64 * 4)(4, 0, 0, 0)  # attr_set = MOUNT_ATTR_NODEV
WITH_DEVICES = (ctypes.c_uint64 * 4)(0, 4, 0, 0)
KERNEL = "/proc/sys/kernel"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
"""The only ones that the command can open; a disk could be written through its device, read-only mount or not."""


def load_jail() -> types.ModuleType:
    """Return the module `jail` beside this file, without the package that it belongs to."""
    place = pathlib.Path(__file__).with_name("jail.py")
    spec = importlib.util.spec_from_file_location("jail", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


jail = load_jail()


def bind(path: str) -> None:
    """Make a mount of a file or a folder, at its own place."""
    place = os.fsencode(path)
    jail.libc_call("mount", place, place, None, BIND, None)


def change_mount(path: str, attributes: ctypes.Array, recursive: bool = False) -> None:
    """Change what a mount allows, and with `recursive` all mounts below it."""
    here = -100  # AT_FDCWD
    flags = 0x8000 if recursive else 0  # AT_RECURSIVE
    size = ctypes.sizeof(attributes)
    number = jail.MOUNT_SETATTR
    jail.libc_call("syscall", number, here, os.fsencode(path), flags, attributes, size)


def may_have_a_name() -> bool:
    """Return whether this user can be known by a name in a namespace of its own: root needs CAP_SETFCAP for it."""
    if os.geteuid():
        return True
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(capabilities >> 31 & 1)


def put_in_memory(folder: str, temporary: str) -> None:
    """Lay a file system of bounded size over both folders, over the first with a copy of its files.

    Files there need a user who has a name, so this is done in namespaces of its own, from which `enter` leads on.
    """
    user, group = os.geteuid(), os.getegid()
    jail.libc_call("unshare", 0x10000000 | 0x00020000)  # CLONE_NEWUSER, CLONE_NEWNS
    names = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for file, text in names.items():
        pathlib.Path("/proc/self", file).write_text(text, encoding="utf-8")
    size = f"size={FOLDER},nr_inodes={FILES},mode=700".encode()
    jail.libc_call("mount", b"memory", os.fsencode(temporary), b"tmpfs", 0, size)
    try:
        shutil.copytree(folder, temporary, symlinks=True, dirs_exist_ok=True)
    except shutil.Error as error:
        raise OSError(f"{FOLDER >> 30} GiB of memory for {folder}: {error.args[0][0][2]}") from None
    jail.libc_call("mount", os.fsencode(temporary), os.fsencode(folder), None, BIND, None)
    jail.libc_call("mount", b"memory", os.fsencode(temporary), b"tmpfs", 0, size)


def enter(folders: list[str]) -> int | None:
    """Enter new namespaces in which only these folders can be written, and no device.

    Return a descriptor for `bound_processes`. Raises OSError where the system refuses.
    """
    jail.enter_namespaces()
    change_mount("/", WITHOUT_DEVICES, recursive=True)
    # A mount of its own, made here, is one that may be changed back.
    for device in filter(os.path.exists, DEVICES):
        bind(device)
        change_mount(device, WITH_DEVICES)
    for folder in folders:
        bind(folder)
        change_mount(folder, WRITABLE)
    numbers = kernel_numbers()
    jail.libc_call("mount", b"nothing", b"/proc", b"tmpfs", 1, None)  # 1: MS_RDONLY
    return numbers


def kernel_numbers() -> int | None:
    """Open the folder of the kernel's numbers, to write; None where a process number is the whole machine's, or refused."""
    version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    if version < OWN_NUMBERS:
        return None
    try:
        bind(KERNEL)
        change_mount(KERNEL, WRITABLE)
        return os.open(KERNEL, os.O_RDONLY)
    except OSError:
        return None


def bound_processes(numbers: int) -> None:
    """Allow this namespace no more than PROCESSES. numbers: of `kernel_numbers`, which is closed."""
    with contextlib.suppress(OSError):
        file = os.open("pid_max", os.O_WRONLY, dir_fd=numbers)
        os.write(file, str(PROCESSES).encode())
        os.close(file)
    os.close(numbers)


def socket_filter(machine: str) -> ctypes.Structure:
    """Return the filter by which sockets of other families, and ways around it, fail with EPERM."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # opcodes: load a word, jump, jump, return
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # verdicts
    families = [(equal, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)]
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, jail.ALLOWED[machine].audit_architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the system call
        (at_least, len(families) + 3, 0, X32),
        (equal, len(families) + 2, 0, IO_URING_SETUP),
        (equal, 0, len(families) + 2, SOCKET[machine]),
        (load, 0, 0, 16),  # its first argument, the family
        *families,
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return jail.Program(len(program), (jail.Instruction * len(program))(*program))


def filter_sockets() -> None:
    """Enter the filter. Raises OSError where the system has none."""
    if jail.MACHINE not in SOCKET:
        raise OSError(f"no numbers of system calls for {jail.MACHINE}")
    program = socket_filter(jail.MACHINE)
    jail.libc_call("prctl", jail.PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


def become(command: list[str], folder: str, temporary: str, seconds: float, status: int) -> None:
    """Set limits and become the command, in its folder."""
    jail.die_with_parent()
    os.setsid()
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_FSIZE": FILE, "RLIMIT_CORE": 0}
    limits["RLIMIT_NPROC"] = PROCESSES
    limits["RLIMIT_CPU"] = int(seconds) + 1
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.chdir(folder)
    variables = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": temporary,
        "TMPDIR": temporary,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }
    filter_sockets()
    os.write(status, READY)
    os.set_inheritable(status, False)
    try:
        os.execvpe(command[0], command, variables)
    except OSError as error:  # said and ended as a shell does
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def main() -> None:
    """Close the jail, run the command, end with its exit status."""
    descriptor, folder, temporary, seconds, *command = sys.argv[1:]
    status = int(descriptor)
    try:
        jail.die_with_parent()
        if may_have_a_name():
            put_in_memory(folder, temporary)
        numbers = enter([folder, temporary])
        pid = os.fork()
        if pid == 0:
            if numbers is not None:
                bound_processes(numbers)
            become(command, folder, temporary, float(seconds), status)
    except (OSError, AttributeError) as error:
        os.write(status, str(error).encode())
        os._exit(1)
    os.close(status)
    ended = os.waitpid(pid, 0)[1]
    os._exit(os.waitstatus_to_exitcode(ended) & 0xFF)


if __name__ == "__main__":
    main()
