"""Helpers of the test-suite: oracles, toy architectures, one tracked step."""
