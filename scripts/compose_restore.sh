#!/bin/sh
# Restore what scripts/compose_backup.sh wrote into a stack without volumes, and start it: `scripts/compose_restore.sh FOLDER`.
# A database that already holds something is left as it is, with an error.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
docker compose create  # builds the images where they are missing, for the parts that start first, too
docker compose up --detach --wait postgres
docker compose exec -T postgres pg_restore --username=cliprd --dbname=cliprd --no-owner --single-transaction --exit-on-error <"$1/database.dump"
docker compose run --rm --no-deps -T api tar --extract --directory=/var/lib/cliprd/artifacts <"$1/artifacts.tar"
docker compose up --detach --wait
