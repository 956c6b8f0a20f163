"""A relay between a process and the coordinator of its run that outlives the coordinator."""

import socket
import threading
from contextlib import suppress


class Relay:
    """Passes connections on `address`, of this machine alone, on to a coordinator elsewhere.

    JAX's client ends its process the moment its connection is cut. Through the relay the
    connection stays, silent, and `lost` is set, so that the process can end in its own words.
    """

    def __init__(self, coordinator: str):
        host, _, port = coordinator.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = threading.Event()
        threading.Thread(target=self._accept, daemon=True, name="mlmjax-relay").start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()  # Not up yet: the client tries again.
                continue
            far.settimeout(None)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass_on, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(far, near, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_far: bool) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        if is_far:
            self.lost.set()
        else:
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)
