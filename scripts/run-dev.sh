#!/usr/bin/env bash
# Starts the service for development: http://127.0.0.1:8000, Redis included. Ctrl-C stops what it started.
# Variables choose how, for example: ENABLE_COST_THROTTLING=true THROTTLE_BACKEND=legacy PORT=8001 ./scripts/run-dev.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source scripts/python.sh
exec "$PYTHON" -S scripts/setup.py scripts/dev.py "$@"
