"""What runs on the Docker host itself, as root, outside a deploy: `python3 /usr/local/lib/bulkhead/host.pyz <verb>`.

Standard library only and nothing of the other packages, since it is shipped to hosts that have only Debian's python3.
It talks to the engine through the `docker` command, to the kernel through /proc, /sys/fs/cgroup and `nft`.
"""
