"""A component of the user's own in prod, that groups a network and a volume made with ours."""

import pulumi

from components.network import Network, NetworkArgs
from components.volume import Volume, VolumeArgs
from settings.ledger import Tier
from stacks import environment


class Reports(pulumi.ComponentResource):
    """Where reports are kept, and the network over which they are fetched."""

    def __init__(self, name: str, opts: pulumi.ResourceOptions) -> None:
        super().__init__("shop:index:Reports", name, None, opts)
        own = pulumi.ResourceOptions(parent=self)
        Network(
            f"{name}-lan", NetworkArgs("corpus-prod-reports", "corpus-prod", Tier.PROTECTED, "10.86.200.0/24"), opts=own
        )
        kept = VolumeArgs("corpus-prod-reports", "corpus-prod", Tier.PROTECTED, declared={"ephemeral": True})
        Volume(name, kept, opts=own)
        self.register_outputs({})


def build() -> None:
    """The environment, and the component beside it."""
    Reports("reports", pulumi.ResourceOptions(parent=environment.build()))
