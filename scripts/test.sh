#!/usr/bin/env bash
# Installs what is needed and runs the tests; arguments go to pytest:
#   ./scripts/test.sh                                                 everything, with the coverage gate; twice where there is a redis-server
#   ./scripts/test.sh --quick                                         most of it, in less than two minutes
#   ./scripts/test.sh tests/test_abuse_prevention.py::test_cost_throttling
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source scripts/python.sh
exec "$PYTHON" -S scripts/setup.py scripts/run_tests.py "$@"
