"""A volume of prod that is said to be backed up, but that its stack deletes when it is destroyed."""

import pulumi

from components.volume import Volume, VolumeArgs
from settings.ledger import Tier
from stacks import environment


def build() -> None:
    """The environment, and the volume beside it, made as if it were a best-effort one's."""
    Volume(
        "reports",
        VolumeArgs(
            name="corpus-prod-reports",
            environment="corpus-prod",
            tier=Tier.BEST_EFFORT,
            declared={"backup": {"engine": "files", "schedule": "daily"}},
        ),
        opts=pulumi.ResourceOptions(parent=environment.build()),
    )
