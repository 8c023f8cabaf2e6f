"""Every key of the Compose schema that Bulkhead does not carry over, and what to write instead.
A test holds this table against the schema of the Compose release in use: a key is carried, or it is here."""

from collections.abc import Mapping

_LIMITS = "Write it as deploy.resources.limits.{}."
_PIDS = "The ceiling on processes is the environment's: write it as its limits.pids in Pulumi.host.yaml."
_RESERVATIONS = "Write it as deploy.resources.reservations.{}."
_SLICE = "CPU time is shared by the environment's slice; remove the key and use deploy.resources."
_BUILD = "Images are built by the engine's own builder with context, dockerfile, args and target; remove the key."
_SWARM = "It is a Swarm setting without meaning on one host; remove the key."
_DNS = "Only dns is carried; set search domains and options in the image's resolver, or remove the key."
_WINDOWS = "It applies to Windows containers; remove the key."
_NETWORK = "Bulkhead owns the network's addresses and driver options; remove the key."
_SHARED = "Give each environment its own, without depending on another project; remove the key."
_HOOK = "Do it in the image's entrypoint, or in a service of its own with depends_on."

RESOLVED = frozenset({"env_file", "extends", "label_file", "profiles"})
"""Keys of a service that Compose has worked into the others by the time we read its output."""

LOST = frozenset({"service.pull_refresh_after", "network.ipam.options"})
"""Keys that Compose's schema knows and its output omits: they are looked for in the files."""

REMEDIES: Mapping[str, str] = {
    # services
    "service.annotations": "Use labels.",
    "service.attach": "Containers run detached; remove the key and read logs with `docker logs`.",
    "service.blkio_config": "IO is shared by the environment's slice; remove the key.",
    "service.cgroup": "The container keeps its private cgroup namespace; remove the key.",
    "service.cgroup_parent": "Bulkhead sets the cgroup parent itself: it is the environment's slice. Remove the key.",
    "service.cpu_count": _WINDOWS,
    "service.cpu_percent": _WINDOWS,
    "service.cpu_period": _LIMITS.format("cpus"),
    "service.cpu_quota": _LIMITS.format("cpus"),
    "service.cpu_rt_period": "Real-time scheduling would starve other environments; remove the key.",
    "service.cpu_rt_runtime": "Real-time scheduling would starve other environments; remove the key.",
    "service.cpu_shares": _SLICE,
    "service.cpus": _LIMITS.format("cpus"),
    "service.cpuset": _SLICE,
    "service.credential_spec": _WINDOWS,
    "service.develop": "It is for `docker compose watch`; keep it in a compose file that Bulkhead does not read.",
    "service.device_cgroup_rules": "List the device itself under devices.",
    "service.dns_opt": _DNS,
    "service.dns_search": _DNS,
    "service.domainname": "Write the full name as hostname.",
    "service.external_links": _SHARED,
    "service.gpus": "Accelerators are not handed out yet; remove the key, or list the device under devices.",
    "service.group_add": "Name the group in user, as in user: '1000:1000'.",
    "service.isolation": _WINDOWS,
    "service.links": "Services on a common network reach each other by name: use networks and depends_on.",
    "service.mac_address": "The engine assigns it; remove the key.",
    "service.mem_limit": _LIMITS.format("memory"),
    "service.mem_reservation": _RESERVATIONS.format("memory"),
    "service.mem_swappiness": "Containers run without swap; remove the key.",
    "service.memswap_limit": "Containers run without swap; remove the key and set deploy.resources.limits.memory.",
    "service.oom_kill_disable": "A container that cannot be killed can freeze its environment; remove the key.",
    "service.oom_score_adj": "Who is killed first follows from the environment's tier; remove the key.",
    "service.pids_limit": _PIDS,
    "service.deploy.resources.limits.pids": _PIDS,
    "service.post_start": _HOOK,
    "service.pre_stop": "Handle stop_signal in the image's entrypoint.",
    "service.provider": "Provision it with Pulumi and hand its address over in environment.",
    "service.pull_policy": "An image is pulled when its digest changes; remove the key.",
    "service.pull_refresh_after": "An image is pulled when its digest changes; remove the key.",
    "service.scale": "Write it as deploy.replicas.",
    "service.storage_opt": "Put growing data on a volume; remove the key.",
    "service.userns_mode": "The user namespace is the engine's setting; remove the key.",
    "service.uts": "Set hostname; the host's own name space is not shared.",
    "service.volumes_from": "Mount the named volume in both services under volumes.",
    # services: nested
    "service.build.additional_contexts": "Copy what is needed into the context, or use a multi-stage Dockerfile.",
    "service.build.cache_from": _BUILD,
    "service.build.cache_to": _BUILD,
    "service.build.dockerfile_inline": "Write it to a file and name it in build.dockerfile.",
    "service.build.entitlements": _BUILD,
    "service.build.extra_hosts": _BUILD,
    "service.build.isolation": _WINDOWS,
    "service.build.labels": "Write LABEL in the Dockerfile.",
    "service.build.network": _BUILD,
    "service.build.no_cache": _BUILD,
    "service.build.platforms": "Set platform on the service.",
    "service.build.privileged": "A privileged build would own the host; remove the key.",
    "service.build.pull": _BUILD,
    "service.build.secrets": "Fetch what needs a secret outside the build, and copy the result into the context.",
    "service.build.shm_size": _BUILD,
    "service.build.ssh": "Fetch what needs a key outside the build, and copy the result into the context.",
    "service.build.tags": "The tag is derived from the content of the build context; remove the key.",
    "service.build.ulimits": _BUILD,
    "service.deploy.endpoint_mode": _SWARM,
    "service.deploy.labels": "Write them as labels of the service.",
    "service.deploy.mode": "Only 'replicated' runs on one host; remove the key and set deploy.replicas.",
    "service.deploy.placement": _SWARM,
    "service.deploy.restart_policy": "Write it as restart of the service, as in restart: on-failure:3.",
    "service.deploy.rollback_config": "A failed deploy keeps the old container; remove the key.",
    "service.deploy.resources.reservations.devices": "List the device under devices of the service.",
    "service.deploy.resources.reservations.generic_resources": _SWARM,
    "service.deploy.update_config.delay": "Replicas are replaced one after another; remove the key.",
    "service.deploy.update_config.failure_action": "A failed deploy keeps the old container; remove the key.",
    "service.deploy.update_config.max_failure_ratio": "A failed deploy keeps the old container; remove the key.",
    "service.deploy.update_config.monitor": "Health decides: write a healthcheck and remove the key.",
    "service.deploy.update_config.parallelism": "Replicas are replaced one after another; remove the key.",
    "service.networks.driver_opts": _NETWORK,
    "service.networks.gw_priority": _NETWORK,
    "service.networks.ipv6_address": "Environments use IPv4 addresses of the ledger's subnet; remove the key.",
    "service.networks.link_local_ips": _NETWORK,
    "service.networks.mac_address": "The engine assigns it; remove the key.",
    "service.networks.priority": _NETWORK,
    "service.ports.app_protocol": "It is a hint for other platforms; remove the key.",
    "service.ports.name": "It is a hint for other platforms; remove the key.",
    "service.volumes.bind.recursive": "A bind mount is recursive; remove the key.",
    "service.volumes.bind.selinux": "Label the files on the host instead (chcon); remove z or Z.",
    "service.volumes.consistency": "It only matters on Docker Desktop; remove the key (:cached, :delegated).",
    "service.volumes.image": "Copy the files in the Dockerfile (COPY --from).",
    "service.volumes.type": "Mount a named volume (volume), a path of the host (bind) or memory (tmpfs).",
    "service.volumes.volume.labels": "Write them as labels of the volume under volumes.",
    # networks
    "network.attachable": _SWARM,
    "network.driver": "Every network of an environment is a bridge; remove the key.",
    "network.driver_opts": _NETWORK,
    "network.enable_ipv4": "Environments use IPv4 addresses of the ledger's subnet; remove the key.",
    "network.enable_ipv6": "Environments use IPv4 addresses of the ledger's subnet; remove the key.",
    "network.ipam.driver": _NETWORK,
    "network.ipam.options": _NETWORK,
    "network.ipam.config.aux_addresses": _NETWORK,
    "network.ipam.config.gateway": _NETWORK,
    "network.ipam.config.ip_range": _NETWORK,
    # volumes, secrets, configs
    "volume.driver": "Only 'local' volumes belong to this host; remove the key.",
    "secret.driver": "Secrets come from Pulumi, a file or a variable; remove the key.",
    "secret.driver_opts": "Secrets come from Pulumi, a file or a variable; remove the key.",
    "secret.labels": _SWARM,
    "secret.template_driver": _SWARM,
    "config.external": "Give the config as file, environment or content: there is no store of configs outside Swarm.",
    "config.labels": _SWARM,
    "config.template_driver": _SWARM,
}
