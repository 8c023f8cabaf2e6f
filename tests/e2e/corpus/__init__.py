"""Programs that are previewed with the real Pulumi and the real pack: bad.yaml, good.yaml and world.yaml say of each
what the pack has to say. `cases` reads them, `previews` runs them."""
