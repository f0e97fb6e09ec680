"""The system calls that model-written code may not make, as a program of the kernel's packet filter (seccomp).

A limit on address space doesn't count memory that belongs to no process, and a new process has limits of its own. So
the calls that make either are refused, and with them those by which most ways out of a sandbox began. Everything else
that Python and its standard library use is left alone: threads, files, pipes, sockets in one process.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

LOAD, IS_EQUAL, IS_AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF: a word, and what is asked of it
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # the places of words in the kernel's ``struct seccomp_data``
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # what a program returns; a refusal has the number of an error in it
ANOTHER_ABI = 0x40000000  # calls from here on are those of x32, with numbers of their own
CLONE_THREAD = 0x00010000
AF_UNIX = 1


class Machine(NamedTuple):
    """One kind of processor: its audit number, and the numbers of calls that differ from kind to kind."""

    audit: int
    clone: int
    socket: int
    refused: tuple[int, ...]


REFUSED_EVERYWHERE = (
    425,  # io_uring_setup: makes other calls unseen
    438,  # pidfd_getfd
    447,  # memfd_secret
)
CLONE3 = 435  # its flags are out of a filter's sight; where it is missing, C libraries use ``clone``
MACHINES = {
    "x86_64": Machine(
        audit=0xC000003E,
        clone=56,
        socket=41,
        refused=(
            *(57, 58),  # fork, vfork
            *(319, 29, 64, 68, 240),  # memfd_create, shmget, semget, msgget, mq_open
            *(248, 249, 250),  # add_key, request_key, keyctl
            *(272, 308),  # unshare, setns
            *(101, 310, 311),  # ptrace, process_vm_readv, process_vm_writev
            *(103, 298, 321, 323),  # syslog, perf_event_open, bpf, userfaultfd
        ),
    ),
    "aarch64": Machine(
        audit=0xC00000B7,
        clone=220,
        socket=198,
        refused=(
            *(279, 194, 190, 186, 180),  # memfd_create, shmget, semget, msgget, mq_open
            *(217, 218, 219),  # add_key, request_key, keyctl
            *(97, 268),  # unshare, setns
            *(117, 270, 271),  # ptrace, process_vm_readv, process_vm_writev
            *(116, 241, 280, 282),  # syslog, perf_event_open, bpf, userfaultfd
        ),
    ),
}


def call_filter(machine: str) -> bytes:
    """Return the filter for a kind of processor, as ``bwrap --seccomp`` reads it: 8 bytes an instruction.

    Raises:
        KeyError: the kind is not known.
    """
    kind = MACHINES[machine]
    refuse, no_such_call = (_return(REFUSE | number) for number in (errno.EPERM, errno.ENOSYS))
    program = [
        *(_load(ARCHITECTURE), _step(IS_EQUAL, kind.audit, 1, 0), no_such_call),
        *(_load(NUMBER), _step(IS_AT_LEAST, ANOTHER_ABI, 0, 1), no_such_call),
        *(_step(IS_EQUAL, CLONE3, 0, 1), no_such_call),
    ]
    for number in (*REFUSED_EVERYWHERE, *kind.refused):
        program += [_step(IS_EQUAL, number, 0, 1), refuse]
    for number, question, needed in (
        (kind.clone, HAS_BITS, CLONE_THREAD),  # threads, but no processes
        (kind.socket, IS_EQUAL, AF_UNIX),  # others reach beyond the network namespace: to the host of a machine
    ):
        program += [_step(IS_EQUAL, number, 0, 4), _load(FIRST_ARGUMENT), _step(question, needed, 0, 1)]
        program += [_return(ALLOW), refuse]
    return b"".join([*program, _return(ALLOW)])


def _load(place: int) -> bytes:
    return _step(LOAD, place, 0, 0)


def _return(value: int) -> bytes:
    return _step(RETURN, value, 0, 0)


def _step(code: int, value: int, if_so: int, if_not: int) -> bytes:
    """Return one instruction; the last two numbers say how many steps to skip after a question."""
    return struct.pack("=HBBI", code, if_so, if_not, value)
