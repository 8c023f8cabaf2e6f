"""The benchmark: what Bulkhead's layers cost, as ratios to plain Pulumi and to Compose taken in one run.
`make bench`, or `python -m tests.bench --help`."""
