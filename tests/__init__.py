"""Tests: unit (Python only), policies (the pack alone), e2e (real tools and engine)."""
