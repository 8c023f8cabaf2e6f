"""What the user wrote, typed and validated: the ledger, the compose files and an environment's settings.
No Pulumi import, and nothing of ours is imported: components, policies and host programs all read from here."""
