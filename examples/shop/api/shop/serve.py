"""Gunicorn's configuration. One process with threads: more capacity is more replicas, not more processes."""

from shop import logs
from shop.settings import Settings

bind = "0.0.0.0:8000"
workers = 1
threads = 8
worker_class = "gthread"
worker_tmp_dir = "/dev/shm"  # noqa: S108 - heartbeats in memory: the root file system is read-only
graceful_timeout = 8  # seconds for requests under way; below the container's stop_grace_period
logconfig_dict = logs.configuration(Settings.read().log_level)
