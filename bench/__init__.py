"""Measurements that take a machine to themselves. `interference`: what dev's misbehaviour costs prod, with Bulkhead
and without. Each module says how it is run; nothing here is part of a deploy."""
