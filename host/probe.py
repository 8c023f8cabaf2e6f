"""Probe: what runs inside the prover's throwaway containers: it tries paths, or listens for what arrives.
Standard library only, one file: the container holds Python and this. It judges nothing; `host.prove` does."""

import concurrent.futures
import contextlib
import ctypes
import errno
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

PORT = 7007  # where a listener answers, TCP and UDP
CONTROL = 7008  # where it tells what it has seen, on its own loopback only
TIMEOUT = 1.0
WORKERS = 64
TOKEN = b"bulkhead-probe:"
SEEN_AT_MOST = 20_000
ETH_P_ALL, PACKET_OUTGOING = 3, 4
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
CLONE_NEWNS = 0x00020000


def tcp(to: str, port: int) -> str:
    """A refusal is an answer too: the packet arrived, and one came back."""
    return _reached(lambda: socket.create_connection((to, port), TIMEOUT).close(), "connected")


def udp(to: str, port: int, token: str) -> str:
    """A closed port is told by the kernel over there (ICMP port unreachable): an answer as well."""

    def send() -> None:
        with socket.socket(_family(to), socket.SOCK_DGRAM) as one:
            one.settimeout(TIMEOUT)
            one.connect(socket.getaddrinfo(to, port, type=socket.SOCK_DGRAM)[0][4])
            one.send(TOKEN + token.encode())
            one.recv(1500)

    return _reached(send, "answered")


def icmp(to: str, token: str) -> str:
    """An echo request. Needs NET_RAW, as `ping` did."""
    six = _family(to) == socket.AF_INET6

    def send() -> None:
        kind, protocol = (128, socket.IPPROTO_ICMPV6) if six else (8, socket.IPPROTO_ICMP)
        with socket.socket(_family(to), socket.SOCK_RAW, protocol) as one:
            one.connect(socket.getaddrinfo(to, 0)[0][4])
            one.send(_echo(kind, token))
            end = time.monotonic() + TIMEOUT
            while (left := end - time.monotonic()) > 0:
                one.settimeout(left)
                packet = one.recv(1500)
                header = packet[(packet[0] & 15) * 4 :] if not six else packet
                if TOKEN + token.encode() in packet and header[0] in (0, 129):
                    return
            raise TimeoutError

    return _reached(send, "answered")


def forged(sender: str, to: str, token: str) -> str:
    """An echo request and a datagram whose sender is somebody else's address. Whether it arrives, a listener tells."""

    def send() -> None:
        payload = _echo(8, token)
        datagram = TOKEN + token.encode()
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as one:
            one.sendto(_ip(ICMP, sender, to, payload), (to, 0))
            head = struct.pack("!HHHH", PORT, PORT, 8 + len(datagram), 0)
            one.sendto(_ip(UDP, sender, to, head + datagram), (to, 0))

    return _reached(send, "sent")


def name(of: str) -> str:
    """The addresses that the engine's name server gives for a name."""
    try:
        found = sorted({str(one[4][0]) for one in socket.getaddrinfo(of, None)})
    except socket.gaierror:
        return "not found"
    return f"resolved {' '.join(found)}"


def write(path: str) -> str:
    """Opens a file for writing and writes nothing."""
    return _reached(lambda: os.close(os.open(path, os.O_WRONLY)), "opened")


def unix(path: str) -> str:
    """Connects to a socket file."""

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(TIMEOUT)
            one.connect(path)

    return _reached(connect, "connected")


def device(major: int, minor: int) -> str:
    """Makes a node of a disk of the host and opens it for reading."""

    def make() -> None:
        node = Path(f"/dev/bulkhead-probe-{major}-{minor}")  # elsewhere, /dev/shm too, nodes may mean nothing (nodev)
        try:
            os.mknod(node, 0o600 | 0o060000, os.makedev(major, minor))
            os.close(os.open(node, os.O_RDONLY))
        finally:
            node.unlink(missing_ok=True)

    return _reached(make, "opened")


def mount(kind: str) -> str:
    """Mounts a file system of the kernel's, in a mount namespace of its own."""

    def call() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        at = Path("/dev/shm/bulkhead-probe-mount")  # noqa: S108 - the container's own
        at.mkdir(exist_ok=True)
        for made in (
            partial(libc.unshare, CLONE_NEWNS),
            partial(libc.mount, kind.encode(), str(at).encode(), kind.encode(), 0, None),
        ):
            if made():
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        libc.umount(str(at).encode())

    return _reached(call, "mounted")


def processes() -> str:
    """Whose processes are seen: in a namespace of its own, the first is a probe."""
    first = Path("/proc/1/cmdline").read_bytes()
    return "only its own" if b"probe.py" in first else "others'"


def fork(most: int) -> str:
    """Starts processes until the kernel refuses, at most so many, and ends them all."""
    read, held = os.pipe()
    children: list[int] = []
    refused = ""
    try:
        while len(children) < most:
            try:
                pid = os.fork()
            except OSError as error:
                refused = f" and then refused ({errno.errorcode.get(error.errno or 0, '?')})"
                break
            if pid == 0:
                os.close(held)
                os.read(read, 1)  # until the parent closes its end
                os._exit(0)
            children.append(pid)
    finally:
        os.close(held)
        os.close(read)
        for pid in children:
            os.waitpid(pid, 0)
    return f"{len(children)} processes{refused}"


def memory(most: int) -> str:
    """Takes memory in steps, at most so many bytes, in a process that says after each step how far it came."""
    read, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        step = 8 * 2**20
        held: list[bytes] = []
        while len(held) * step < most:
            held.append(b"x" * step)
            os.write(told, b".")
        os._exit(0)
    os.close(told)
    steps = 0
    while some := os.read(read, 4096):
        steps += len(some)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    return f"{steps * 8} MiB" + (" and then killed" if os.WIFSIGNALED(status) else "")


KINDS: Mapping[str, Callable[..., str]] = {
    one.__name__: one for one in (tcp, udp, icmp, forged, name, write, unix, device, mount, processes, fork, memory)
}
ALONE = ("fork", "memory", "mount")  # these change the process or its group


def attempt(wanted: list[dict[str, Any]]) -> list[str]:
    """What came of each attempt, in order."""

    def one(given: dict[str, Any]) -> str:
        return KINDS[given["kind"]](**given["with"])

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        running = {index: pool.submit(one, given) for index, given in enumerate(wanted) if given["kind"] not in ALONE}
        found = {index: task.result() for index, task in running.items()}
    for index, given in enumerate(wanted):
        if index not in found:
            found[index] = one(given)
    return [found[index] for index in range(len(wanted))]


def listen() -> None:
    """Answers on `PORT`, and remembers every packet that arrives; `CONTROL` tells of them, once all of it listens."""
    seen: set[tuple[str, str, int, str]] = set()
    with contextlib.suppress(PermissionError):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        threading.Thread(target=_sniff, args=(wire, seen), daemon=True).start()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("", PORT))
    threading.Thread(target=_answer_udp, args=(udp,), daemon=True).start()
    six = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if six else socket.AF_INET
    tcp = socket.create_server(("::" if six else "", PORT), family=family, dualstack_ipv6=six)
    threading.Thread(target=_answer_tcp, args=(tcp,), daemon=True).start()
    with socket.create_server(("127.0.0.1", CONTROL)) as control:
        while True:
            asker, _ = control.accept()
            with asker:
                asker.sendall(json.dumps(sorted(seen)).encode())


def seen() -> str:
    """What the listener of this container has seen: [[protocol, sender, port, token], …] as JSON."""
    with socket.create_connection(("127.0.0.1", CONTROL), 5) as control:
        return b"".join(iter(lambda: control.recv(65536), b"")).decode()


def _sniff(wire: socket.socket, seen: set[tuple[str, str, int, str]]) -> None:
    while True:
        packet, where = wire.recvfrom(65536)
        if where[2] != PACKET_OUTGOING and len(seen) < SEEN_AT_MOST and packet:
            with contextlib.suppress(IndexError, struct.error, OSError):
                seen.add(_read(packet))


def _read(packet: bytes) -> tuple[str, str, int, str]:
    """Protocol, sender, port it is for, and the token in it."""
    if packet[0] >> 4 == 6:
        protocol, sender, body = packet[6], socket.inet_ntop(socket.AF_INET6, packet[8:24]), packet[40:]
    else:
        protocol, sender, body = packet[9], socket.inet_ntoa(packet[12:16]), packet[(packet[0] & 15) * 4 :]
    port = struct.unpack("!H", body[2:4])[0] if protocol in (TCP, UDP) else 0
    start = packet.find(TOKEN)
    token = packet[start + len(TOKEN) :][:32].split(b"\0")[0].decode(errors="replace") if start >= 0 else ""
    return {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMP6: "icmp6"}.get(protocol, str(protocol)), sender, port, token


def _answer_tcp(server: socket.socket) -> None:
    while True:
        server.accept()[0].close()


def _answer_udp(server: socket.socket) -> None:
    while True:
        said, sender = server.recvfrom(1500)
        server.sendto(said, sender)


def _reached(action: Callable[[], object], success: str) -> str:
    try:
        action()
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "no answer"
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, str(error))
        return (
            f"unreachable ({code})" if code in ("ENETUNREACH", "EHOSTUNREACH", "EADDRNOTAVAIL") else f"denied ({code})"
        )
    return success


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _echo(kind: int, token: str) -> bytes:
    body = TOKEN + token.encode()
    head = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, 1)
    return struct.pack("!BBHHH", kind, 0, _sum(head + body), os.getpid() & 0xFFFF, 1) + body


def _ip(protocol: int, sender: str, to: str, body: bytes) -> bytes:
    """An IPv4 header with this sender; the kernel fills in length and checksum."""
    return (
        struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, protocol, 0, socket.inet_aton(sender), socket.inet_aton(to))
        + body
    )


def _sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        listen()
    elif sys.argv[1] == "seen":
        print(seen())
    else:
        print(json.dumps(attempt(json.load(sys.stdin))))
