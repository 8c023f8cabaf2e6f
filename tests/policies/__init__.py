"""Tests of the policy pack: every rule with every kind of fixture, driven through its real servicer.
`fixtures.py` is the table to extend; `test_rules.py` fails when a rule lacks a kind."""
