#!/bin/sh
# Install a package where this can be done unasked, as root on Debian or Ubuntu: sh scripts/install_debian.sh PACKAGE
# Elsewhere what needs it says so: `ultrafuser eval` without the sandbox (bubblewrap), page tests without Chromium.
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"
else
  echo "$1 is not installed; what needs it is left out (see docs/sandbox.md)" >&2
fi
exit 0
