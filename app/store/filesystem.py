"""Which kind of file system a path lies on, and whether SQLite's write-ahead log is safe there.

The log needs memory and locks that every process shares, so one host and a disk of its own: a network mount corrupts it in silence.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "9p", "afs"})
_CLUSTER: Final = frozenset({"ceph", "lustre", "beegfs", "gpfs", "glusterfs", "ocfs2", "gfs2", "orangefs"})
_OF_ANOTHER_KERNEL: Final = frozenset({"vboxsf", "vmhgfs"})


def filesystem_type(path: Path) -> str:
    """Type of the mount that holds `path` (which need not exist yet), as the kernel names it; '' where it does not say."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    wanted = path.resolve()
    best, found = -1, ""
    for line in lines:
        mount, kind = _mount_and_type(line)
        if (wanted == mount or mount in wanted.parents) and len(mount.parts) >= best:
            best, found = len(mount.parts), kind
    return found


def is_shared_between_hosts(kind: str) -> bool:
    return kind in _NETWORK | _CLUSTER | _OF_ANOTHER_KERNEL or kind == "fuse" or kind.startswith("fuse.")


def _mount_and_type(line: str) -> tuple[Path, str]:
    """Fields of mountinfo(5): the fifth is the mount point, the first after the lone dash is the type."""
    fields, _, after = line.partition(" - ")
    mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code.group(1), 8)), fields.split()[4])
    return Path(mount), after.split()[0]
