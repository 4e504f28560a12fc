"""Faults: commands that are killed, stopped, out of disk space or memory, and hostile inputs."""
