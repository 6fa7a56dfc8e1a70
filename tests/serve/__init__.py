"""Tests of the endpoint: a package, so that what they share ends with them."""
