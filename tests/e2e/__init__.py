"""End to end tests: they deploy for real, so each module starts from a copy of the checkout."""
