"""The conformance suite: what every backend must do, ours or another package's."""
