"""A second engine, on a machine that the ledger does not count."""

import pulumi
import pulumi_docker as docker

from components.labels import label_inputs, labels
from stacks import environment


def build() -> None:
    """The environment, and a volume on the other machine."""
    built = environment.build()
    other = docker.Provider("other", host="ssh://build@10.0.0.7", opts=pulumi.ResourceOptions(parent=built))
    docker.Volume(
        "elsewhere",
        name="corpus-dev-elsewhere",
        labels=label_inputs(labels("corpus-dev", "best-effort")),
        opts=pulumi.ResourceOptions(parent=built, provider=other),
    )
