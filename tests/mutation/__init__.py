"""A mutation run over the rules of the pack: what no fixture notices, no fixture proves.
`python -m tests.mutation`, or `make mutate`."""
