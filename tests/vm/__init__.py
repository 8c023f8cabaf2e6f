"""A server as users have it, Debian with systemd and cgroup v2, as a virtual machine that Bulkhead deploys to."""
