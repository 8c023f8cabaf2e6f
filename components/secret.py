"""Secret: one secret value of an environment: given, or generated once and kept in the stack's encrypted state.

It never becomes an engine-side object: services get it as a file, and only those that ask for it.
"""

from dataclasses import dataclass

import pulumi
from pulumi_command import local

from settings.ledger import Tier


@dataclass(frozen=True)
class SecretArgs:
    """`value`, `generate` (random bytes; the secret is their URL-safe base64), or both: then `value` counts, and what
    was generated stays in the state."""

    tier: Tier
    value: pulumi.Input[str] | None = None
    generate: int | None = None


class Secret(pulumi.ComponentResource):
    """`value` is a Pulumi secret: encrypted in state, hidden in previews."""

    value: pulumi.Output[str]

    def __init__(self, name: str, args: SecretArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Secret", name, None, opts)
        if args.generate is not None:
            # Generated once, whatever changes later: a database's password must live as long as its volume
            # does, so it is protected with it, and another length would not reach into the database.
            generated = local.Command(
                f"{name}-generated",
                create=f"head -c {args.generate} /dev/urandom | base64 -w0 | tr '+/' '-_' | tr -d '='",
                logging=local.Logging.NONE,
                opts=pulumi.ResourceOptions(
                    parent=self,
                    additional_secret_outputs=["stdout"],
                    protect=args.tier is Tier.PROTECTED,
                    ignore_changes=["create"],
                ),
            )
            self.value = pulumi.Output.secret(generated.stdout)
        if args.value is not None:
            self.value = pulumi.Output.secret(args.value)
        self.register_outputs({"value": self.value})
