#!/bin/sh
# Runs set-up with a Python >= 3.11, and installs Debian's one where a bare machine has none.
# Everything after that is engine/setup.py; this file only finds the interpreter for it.
set -eu
cd "$(dirname "$0")/.."

for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
	if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		exec "$python" -m engine.setup "$@"
	fi
done

if [ ! -x /usr/bin/python3 ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
	echo "Installing Debian package: python3"
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends python3
	if /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		exec /usr/bin/python3 -m engine.setup "$@"
	fi
fi

echo "Bulkhead needs Python 3.11 or newer, and found none." >&2
echo "Next step: install it (Debian 12: sudo apt-get install python3), then run the same command again." >&2
exit 1
