"""Processes that a test started."""

from pathlib import Path


def gone(pid: int) -> bool:
    """Whether the process ended (a zombie that nobody reaped counts)."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
