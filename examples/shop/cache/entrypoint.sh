#!/bin/sh
# Becomes Redis. Only the password's hash is passed, on stdin: it shows in no process list and on no disk.
set -eu

: "${REDIS_PASSWORD_FILE:?is not set: name the file that holds the password}"
password=$(cat "$REDIS_PASSWORD_FILE")
hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
unset password

exec redis-server /etc/redis/shop.conf - <<CONFIG
user default on #$hash ~* &* +@all
CONFIG
