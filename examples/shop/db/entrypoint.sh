#!/bin/sh
# Creates the cluster on an empty volume, sets the shop's password from its secret, becomes PostgreSQL.
set -eu

cluster=/var/lib/postgresql/data/15
: "${POSTGRES_PASSWORD_FILE:?is not set: name the file that holds the password of user shop}"

# PostgreSQL without a network, for the statements on stdin: each ends with ";" and an empty line.
# A failing statement is not logged, for one of them holds the password.
statements() {
    postgres --single -j -D "$1" -c exit_on_error=on -c log_min_error_statement=panic postgres >/dev/null
}

if [ ! -s "$cluster/PG_VERSION" ]; then
    # Beside its final place, so that an interrupted start leaves no half-made cluster.
    rm -rf "$cluster.new"
    initdb --pgdata="$cluster.new" --auth-local=peer --auth-host=scram-sha-256 \
        --encoding=UTF8 --locale=C.UTF-8 --data-checksums
    echo "host all all all scram-sha-256" >>"$cluster.new/pg_hba.conf"
    statements "$cluster.new" <<'SQL'
CREATE ROLE shop LOGIN;

CREATE DATABASE shop OWNER shop;

SQL
    mv "$cluster.new" "$cluster"
fi

# At every start: the volume may be older than the secret.
password=$(sed "s/'/''/g" "$POSTGRES_PASSWORD_FILE")
statements "$cluster" <<SQL
ALTER ROLE shop PASSWORD '$password';

SQL
unset password

exec postgres -D "$cluster" "$@"
