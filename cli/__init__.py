"""The commands behind the Makefile's targets: they order stacks, call the Pulumi CLI and explain what they see.
What is deployed is decided elsewhere; everything here can also be done with `pulumi` itself."""
