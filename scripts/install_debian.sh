#!/bin/sh
# Install one package as root on Debian or Ubuntu: sh scripts/install_debian.sh PACKAGE
# Elsewhere it only prints a note. Without bubblewrap there is no sandbox, without Chromium the page tests are skipped.
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"
else
  echo "$1 is not installed. What needs it is skipped (see docs/sandbox.md)." >&2
fi
exit 0
