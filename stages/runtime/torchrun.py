"""torchrun on one machine, where its processes need no host name.

torchrun looks up the full name of its host several times, for messages that nobody reads. Where the name does not
resolve, each look-up takes as long as the name servers are waited for.
"""

from __future__ import annotations

import socket

from torch.distributed import run


def _own_name(name: str = "") -> str:
    return name or socket.gethostname()


if __name__ == "__main__":
    socket.getfqdn = _own_name
    run.main()
