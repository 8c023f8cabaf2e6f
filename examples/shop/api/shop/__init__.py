"""The shop: an HTTP API for orders (PostgreSQL) and carts (Redis), and the worker that processes orders."""
