"""The policy pack: rules that keep the environments of one Docker host apart, decided at preview.
Imports `settings` only, and nothing heavy: the pack starts with every preview."""
