#!/bin/sh
# Install the sandbox for generated code where this can be done unasked: as root on Debian or Ubuntu.
# Elsewhere the tests that need it skip, and `ultrafuser eval` says what is missing.
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap
else
  echo "bubblewrap is not installed; generated code will not be run (see docs/sandbox.md)" >&2
fi
exit 0
